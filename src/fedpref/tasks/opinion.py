"""Predicting a group's opinions from a few that it has given."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedpref.data.preferences import ClientData, Feedback, Opinion, Preference, Prompt, Row, key
from fedpref.data.unusable import Unusable
from fedpref.errors import UserError
from fedpref.models import devices
from fedpref.models.encoder import Encoder
from fedpref.models.own_parts import Parts
from fedpref.models.predictor import Predictor, gaussian_loss, softmax_within
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import ALIGNMENT
from fedpref.numerics.trees import Tree
from fedpref.privacy import Unit
from fedpref.rewards.reward import OpenGroups, no_groups
from fedpref.tasks.alignment import alignment, calibration_error, wasserstein_alignment
from fedpref.tasks.batches import BatchSize, chance_of
from fedpref.tasks.task import Apart, ExampleOutcome, TaskSettings
from fedpref.types import Count

Texts = tuple[str, ...]
FILE, CONFIG = "predictor.safetensors", "predictor.json"

EMBEDDINGS = "embeddings-"  # begins the names of folders of texts' vectors


@dataclass(frozen=True, kw_only=True)
class OpinionTask(TaskSettings):
    """A group's opinions, predicted from a few of them in context.

    It is GPO's task, and PluralLLM's with one group a client. An example is a task: so many of the
    group's questions at random as context, as many others as targets. Preference pairs are
    questions with two options, and the shares of comparisons that each of them won.
    """

    measures: ClassVar[frozenset[str]] = frozenset(
        {ALIGNMENT, "alignment_wasserstein", "accuracy", "error", "uniform", "calibration_error"}
        | {"coverage"}
    )
    units: ClassVar[frozenset[str]] = frozenset({"question"})
    pieces_of_unit: ClassVar[int] = 2

    name: Literal["opinion"] = "opinion"
    measures_examples: ClassVar[bool] = True
    can_be_thinned: ClassVar[bool] = False
    objectives: ClassVar[tuple[str, ...]] = ("loss",)
    model: Encoder = Encoder()
    """The model that turns texts into vectors."""
    predictor: Predictor = Predictor()
    """The sizes of the transformer that is trained."""
    context_questions: tuple[Count, Count] = (9, 90)
    """How many questions are shown: a number between these, evenly; fewer where a client has not so
    many."""
    target_questions: tuple[Count, Count] = (9, 90)
    """How many other questions are asked, likewise."""
    evaluation_context: Count = 20
    """How many questions are shown in evaluations, the same in each."""
    evaluate_on: Literal["held-out", "all"] = "held-out"
    """Evaluate on held-out questions, or on all, those trained on too, as PluralLLM's program
    does."""

    def __post_init__(self) -> None:
        for name in ("context_questions", "target_questions"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"task.{name}: {low} is more than {high}")

    def check(self, parts: Parts) -> None:
        raise UserError(
            "algorithm: a predictor of opinions has no parts of a client's own. Take pluralllm, "
            "feddpo, alone or pooled."
        )

    def build(self, open_groups: OpenGroups = no_groups) -> OpinionLearner:
        return OpinionLearner(self)


@dataclass(frozen=True)
class Question:
    """A group's answer: the texts that stand for the options, and their shares."""

    group: str
    texts: tuple[str, ...]
    shares: tuple[float, ...]

    @cached_property  # asked for in every draw
    def digest(self) -> str:
        return blake2b("\0".join(self.texts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class OpinionShard:
    """One group's questions, or for training those of several, and what an evaluation shows and
    asks.
    """

    name: str
    train: tuple[Question, ...]
    test: tuple[Question, ...]
    context: tuple[Question, ...]
    asked: tuple[Question, ...]
    truncated: int = 0
    validation: tuple[Question, ...] = ()

    def __len__(self) -> int:
        return len(self.train)

    def validating(self) -> OpinionShard:
        return replace(self, test=self.validation, asked=self.validation)


@dataclass(frozen=True)
class Batch:
    """Tasks: the context's points, which of them there are, and the targets' points.

    `question` numbers the targets' questions.
    """

    context: Float[Tensor, "B C D"]
    answers: Float[Tensor, "B C"]
    shown: Bool[Tensor, "B C"]
    targets: Float[Tensor, "B T D"]
    asked: Bool[Tensor, "B T"]
    question: Int[Tensor, " n"]
    shares: Float[Tensor, " n"]


class OpinionLearner:
    """The task with its encoder, loaded once, and the embeddings of all questions."""

    def __init__(self, settings: OpinionTask) -> None:
        self.settings = settings
        self.encoder = settings.model.open()
        self.known: dict[str, Tensor] = {}

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.settings.objectives

    @property
    def description(self) -> str:
        inputs = self.encoder.dimensions
        count = sum(tensor.numel() for tensor in self.init(torch.Generator()).values())
        return (
            f"predictor: {count / 1e6:,.2f} M parameters over embeddings of {inputs} "
            f"dimensions by {self.settings.model.path}"
        )

    @property
    def pieces_of_unit(self) -> int:
        return self.settings.pieces_of_unit

    @property
    def prepares(self) -> str:
        return "embeddings"

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def devices(self) -> int:
        return devices.count(self.encoder.wanted)

    adapted_ends: ClassVar[frozenset[str]] = frozenset()

    def move_to(self, worker: int) -> None:
        self.encoder.move_to(worker)

    # ---- data

    def encode(self, data: ClientData, unusable: list[Unusable] | None = None) -> OpinionShard:
        """Return a group's rows as questions.

        Which of them are an evaluation's context depends on the group's name alone.

        Raises:
            UserError: The group has too few questions.
        """
        train, test, validation = (
            _questions(data.name, rows) for rows in (data.train, data.test, data.validation)
        )
        if len(train) < 2:
            raise UserError(
                f"{data.name}: one question of a group is shown while another is asked, but it "
                f"has {len(train)} to train on. "
                "Leave such groups out: partition.min_rows."
            )
        order = torch.randperm(
            len(train), generator=seeds.generator(0, f"context/{data.name}")
        ).tolist()
        count = self.settings.evaluation_context
        context, others = (tuple(train[i] for i in part) for part in (order[:count], order[count:]))
        everything = train + test + validation
        cut = sum(any(map(self.encoder.cuts, question.texts)) for question in everything)
        return OpinionShard(
            data.name,
            train,
            test,
            context,
            test if self.settings.evaluate_on == "held-out" else test + others,
            cut,
            validation,
        )

    def prepare(self, shard: OpinionShard, cache: Path) -> OpinionShard:
        """Embed the questions that are not known yet.

        Each question's embeddings are kept in a file of `cache` that is named after the model and
        its texts.
        """
        wanted = {
            question.digest: question
            for question in shard.train + shard.test + shard.validation
            if question.digest not in self.known
        }
        folder = cache / f"{EMBEDDINGS}{self.encoder.fingerprint}"
        for digest in [digest for digest in wanted if (folder / f"{digest}.safetensors").exists()]:
            self.known[digest] = trees.load(folder / f"{digest}.safetensors")["embeddings"]
            del wanted[digest]
        if wanted:
            folder.mkdir(parents=True, exist_ok=True)
            self.embed(list(wanted.values()))
            for digest in wanted:
                trees.save({"embeddings": self.known[digest]}, folder / f"{digest}.safetensors")
        return shard

    def embed(self, questions: Sequence[Question]) -> list[str]:
        """Embed those of these questions that are not known yet, and return their digests.

        Each is embedded by itself: what else stands in a batch changes the last bits.
        """
        wanted = {
            question.digest: question.texts
            for question in questions
            if question.digest not in self.known
        }
        self.known |= {digest: self.encoder.embed(texts) for digest, texts in wanted.items()}
        return list(wanted)

    def forget(self, digests: Sequence[str]) -> None:
        """Forget the embeddings of these digests."""
        for digest in digests:
            del self.known[digest]

    # ---- learning

    def parts(self, settings: Parts, rng: torch.Generator) -> Tree:
        self.settings.check(settings)
        return {}

    def init(self, rng: torch.Generator) -> Tree:
        return self.settings.predictor.init(self.encoder.dimensions, rng)

    def draw(
        self, params: Tree, start: Tree, shard: OpinionShard, size: BatchSize, rng: torch.Generator
    ) -> Batch:
        """Draw a batch of tasks, of random groups where there are several.

        All groups come before one comes again.
        """
        if size.max_tokens:
            raise UserError(
                "algorithm.local.max_tokens_per_batch: a predictor's batches are counted in "
                "tasks. Set batch_size."
            )
        groups = _by_group(shard.train)
        turn = torch.randperm(len(groups), generator=rng).tolist()
        tasks = []
        for number in range(size.examples):
            questions = groups[turn[number % len(turn)]]
            order = torch.randperm(len(questions), generator=rng).tolist()
            context = _between(self.settings.context_questions, len(order) - 1, rng)
            targets = _between(self.settings.target_questions, len(order) - context, rng)
            size.note(order[: context + targets], turn[number % len(turn)])
            tasks.append(
                (
                    [questions[i] for i in order[:context]],
                    [questions[i] for i in order[context : context + targets]],
                )
            )
        return self._batch(tasks)

    def units(self, shard: OpinionShard, unit: Unit) -> list[int]:
        """Return which unit each training question is; see `Task.units`."""
        return list(range(len(shard.train)))

    def private_batch(self, shard: OpinionShard, batch: int) -> tuple[float, list[float]]:
        """Return the chance of a question to be in a batch, and the number of tasks of that."""
        settings = self.settings
        bounds = (*settings.context_questions, *settings.target_questions)
        # a task has so many questions in the middle, if there are as many
        size = min(len(shard.train), sum(bounds) // 2)
        return chance_of(len(shard.train), max(1, batch * size)), [float(batch)]

    def gradients_apart(
        self,
        params: Tree,
        start: Tree,
        shard: OpinionShard,
        units: Sequence[Sequence[int]],
        batch: int,
        wanted: Collection[str],
        draws: seeds.Draws,
    ) -> Iterator[Apart]:
        """Yield the gradients of tasks that share no question; see `Task.gradients_apart`.

        A question shown changes what is learned of those asked, so that no question has a gradient
        of its own. Each question of the batch is in one of its tasks, by a draw of its own, and
        what is clipped is the task's gradient: a question that is there or not changes one of
        them, from one short vector to another.
        """
        leaves = {n: t.detach().requires_grad_() for n, t in trees.select(params, wanted).items()}
        settings = self.settings
        tasks: dict[tuple[str, int], list[Question]] = defaultdict(list)
        for (i,) in units:
            question = shard.train[i]
            number = int(torch.randint(batch, (), generator=draws(f"question/{i}")))
            tasks[question.group, number].append(question)
        for (group, number), questions in tasks.items():
            if len(questions) < 2:
                continue  # nothing can be shown while it is asked
            rng = draws(f"task/{number}/{group}")
            order = torch.randperm(len(questions), generator=rng).tolist()
            context = _between(settings.context_questions, len(order) - 1, rng)
            targets = _between(settings.target_questions, len(order) - context, rng)
            shown, asked = order[:context], order[context : context + targets]
            one = self._batch([([questions[i] for i in shown], [questions[i] for i in asked])])
            losses, _ = self.losses({**params, **leaves}, one)
            found = torch.autograd.grad(losses[0], list(leaves.values()))
            gradients = {n: g[None] for n, g in zip(leaves, found, strict=True)}
            yield Apart(gradients, [0], [0])

    def losses(self, params: Tree, batch: Batch) -> tuple[Float[Tensor, 1], Mapping[str, float]]:
        raw, std = self.settings.predictor(
            params, batch.context, batch.answers, batch.shown, batch.targets
        )
        losses = gaussian_loss(raw[batch.asked], std[batch.asked], batch.question, batch.shares)
        error = softmax_within(raw[batch.asked].detach(), batch.question) - batch.shares
        metrics = {"loss": float(losses.detach().mean()), "error": float(error.abs().mean())}
        return losses.mean()[None], metrics | {
            "num_examples": float(len(batch.context)),
            "num_points": float(len(batch.shares) + batch.shown.sum()),
        }

    def batches(self, shard: OpinionShard) -> Iterator[tuple[Batch, float]]:
        """Yield all training questions, each half of a group's predicted from the other."""
        for questions in _by_group(shard.train):
            middle = (len(questions) + 1) // 2
            halves = questions[:middle], questions[middle:]
            for context, targets in (halves, halves[::-1]):
                yield self._batch([(context, targets)]), len(targets) / len(shard.train)

    @torch.no_grad()
    def predict(
        self,
        params: Tree,
        context: Sequence[Question],
        targets: Sequence[Question],
        *,
        logits: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Predict how the context's group would answer.

        Args:
            params: The predictor's parameters.
            context: Questions that the group has answered.
            targets: Questions that are asked.
            logits: Return what shares are a softmax of, in their place.

        Returns:
            Each target's shares, and their standard deviations.
        """
        batch = self._batch([(context, targets)])
        raw, std = self.settings.predictor(
            trees.to(params, self.device), batch.context, batch.answers, batch.shown, batch.targets
        )
        sizes = [len(question.shares) for question in targets]
        means = raw[0] if logits else softmax_within(raw[0], batch.question)
        return list(means.cpu().split(sizes)), list(std[0].cpu().split(sizes))

    def evaluate(self, params: Tree, shard: OpinionShard) -> Mapping[str, float]:
        """Return means over questions.

        `alignment` is 1 - the Jensen-Shannon distance (natural logarithm) of predicted and true
        shares, `alignment_wasserstein` 1 - the Wasserstein distance over options in their order, as
        a share of the largest possible one. `accuracy` is the share of questions whose likeliest
        option is found, of k equally likely ones 1/k of it. `coverage` is that of shares within a
        standard deviation of what was predicted (0.683 of a calibrated one), `calibration_error` is
        of all options together; `uniform` is the alignment of equal shares.
        """
        predicted, stds = self.predict(params, shard.context, shard.asked)
        inside = [
            float(((p - torch.tensor(question.shares)).abs() <= std).float().mean())
            for p, std, question in zip(predicted, stds, shard.asked, strict=True)
        ]
        return {**self.judged(predicted, shard), "coverage": float(np.mean(inside))}

    @staticmethod
    def judged(predicted: Sequence[Float[Tensor, " n"]], shard: OpinionShard) -> dict[str, float]:
        """Return how near predicted shares come to those of the questions that are asked.

        Args:
            predicted: Of each question.
            shard: Whose questions.
        """
        truth = [torch.tensor(question.shares) for question in shard.asked]
        measured: dict[str, list[float]] = defaultdict(list)
        for p, y in zip(predicted, truth, strict=True):
            measured[ALIGNMENT].append(alignment(p, y))
            measured["alignment_wasserstein"].append(wasserstein_alignment(p, y))
            likeliest = y == y.max()
            measured["accuracy"].append(float(likeliest[p.argmax()]) / float(likeliest.sum()))
            measured["error"].append(float((p - y).abs().mean()))
            measured["uniform"].append(alignment(torch.full_like(y, 1 / len(y)), y))
        return {name: float(np.mean(values)) for name, values in measured.items()} | {
            "calibration_error": calibration_error(torch.cat([*predicted]), torch.cat(truth)),
            "num_examples": float(len(shard.asked)),
        }

    def outcomes(self, params: Tree, shard: OpinionShard) -> list[ExampleOutcome]:
        """Return nothing: shares of options are not right or wrong."""
        return []

    def generated(self, params: Tree, shard: OpinionShard) -> Mapping[str, float]:
        """Return nothing: a predictor answers nothing."""
        return {}

    def choices(self, params: Tree, shard: OpinionShard) -> Float[Tensor, " n"]:
        """Return the predicted share of every option."""
        return torch.cat(self.predict(params, shard.context, shard.asked)[0])

    def samples(self, params: Tree, shard: OpinionShard) -> list[dict[str, Any]]:
        """Return nothing: a predictor gives no answers."""
        return []

    def export(self, params: Tree, folder: Path) -> None:
        """Write the predictor's parameters, its sizes and which model embeds its texts."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {"predictor": asdict(self.settings.predictor), "model": asdict(self.settings.model)}
        (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n")
        trees.save(params, folder / FILE)

    def _batch(self, tasks: Sequence[tuple[Sequence[Question], Sequence[Question]]]) -> Batch:
        context, answers, _ = self._points([task[0] for task in tasks])
        targets, shares, sizes = self._points([task[1] for task in tasks])
        number = torch.arange(sum(map(len, sizes)), device=self.device)
        question = number.repeat_interleave(
            torch.tensor([size for of_task in sizes for size in of_task], device=self.device)
        )
        shown, asked = answers >= 0, shares >= 0
        return Batch(context, answers.clamp(min=0), shown, targets, asked, question, shares[asked])

    def _points(
        self, tasks: Sequence[Sequence[Question]]
    ) -> tuple[Float[Tensor, "B P D"], Float[Tensor, "B P"], list[list[int]]]:
        """Return embeddings and shares of all options, padded, and the number of each question's
        options.

        Padding has shares of -1.
        """
        x = [
            torch.cat([self.known[question.digest] for question in questions])
            for questions in tasks
        ]
        y = [
            torch.tensor([share for question in questions for share in question.shares])
            for questions in tasks
        ]
        sizes = [[len(question.shares) for question in questions] for questions in tasks]
        padded = (
            pad_sequence(x, batch_first=True),
            pad_sequence(y, batch_first=True, padding_value=-1.0),
        )
        return padded[0].to(self.device), padded[1].to(self.device), sizes


def _by_group(questions: Sequence[Question]) -> list[list[Question]]:
    by_group: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_group[question.group].append(question)
    return list(by_group.values())


def _questions(group: str, rows: Sequence[Row]) -> tuple[Question, ...]:
    """Return a group's questions: the mean of its opinions on the same one.

    Comparisons of the same two answers to a prompt are one question, with the share that each won.

    Raises:
        UserError: A row is neither, or there are opinions of several groups on one question, of
            which one would give another away.
    """
    opinions: dict[Texts, list[Opinion]] = defaultdict(list)
    wins: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        if isinstance(row, Feedback | Prompt):
            raise UserError(
                f"{row.where}: the row compares no answers; the task 'opinion' needs opinions, "
                "or two answers to compare."
            )
        if isinstance(row, Preference):
            chosen, rejected = row.said
            wins[(key(row.prompt), *sorted((chosen, rejected)))].append(chosen)
        else:
            opinions[asking(row.prompt, row.options)].append(row)
    questions = []
    for texts, same in opinions.items():
        if other := next(
            (row for row in same if row.columns.get("group") != same[0].columns.get("group")), None
        ):
            raise UserError(
                f"{other.where}: client {group!r} has this question's answers of "
                f"{same[0].columns.get('group')!r} and of "
                f"{other.columns.get('group')!r}. A client is one group: set partition.column to "
                "group."
            )
        shares = tuple(
            sum(share) / len(same) for share in zip(*(row.shares for row in same), strict=True)
        )
        questions.append(Question(group, texts, shares))
    for (prompt, *options), winners in wins.items():
        shares = tuple(winners.count(option) / len(winners) for option in options)
        questions.append(Question(group, tuple(prompt + option for option in options), shares))
    return tuple(questions)


def asking(question: str, options: Sequence[str]) -> tuple[str, ...]:
    """Return for each option the question with all its options and the one that is chosen."""
    lettered = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    return tuple("\n".join([question, *lettered, f"Answer: {one}"]) for one in lettered)


def _between(bounds: tuple[int, int], most: int, rng: torch.Generator) -> int:
    """Draw a number between two bounds, or the most that there can be; at least one."""
    low, high = (max(1, min(bound, most)) for bound in bounds)
    return int(torch.randint(low, high + 1, (), generator=rng))
