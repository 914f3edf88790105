"""What tasks on given answers share: examples, reference scores, and answers scored once."""

from __future__ import annotations

import struct
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data.preferences import ClientData, Row
from fedpref.data.splits import spelled
from fedpref.data.unusable import Unusable
from fedpref.errors import printable
from fedpref.models.generation import OwnSampling, generate
from fedpref.models.kept import Kept
from fedpref.models.own_parts import NAMES
from fedpref.models.packed import Row as PackedRow
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import ACCURACY
from fedpref.numerics.trees import Tree
from fedpref.privacy import Column, Unit
from fedpref.rewards.reward import OpenGroups, RewardSettings
from fedpref.tasks.batches import (
    BatchSize,
    chance_of,
    draw_indices,
    numbered,
    numbered_by,
)
from fedpref.tasks.examples import Batch, Example, OfflineShard, Piece
from fedpref.tasks.generation_metrics import Generation, Generations
from fedpref.tasks.language import LanguageLearner, LanguageTask, Tokens
from fedpref.tasks.task import Apart, ExampleOutcome
from fedpref.types import Text, WholeNumber

SCORES = "-reference.sqlite"  # ends the names of files of reference scores
SCORING_BATCH = 32  # answers of a batch where each is scored once
MEASURED = 16  # examples of a batch of training data that is seen once
# what is minimised, where that is more than the loss by which methods are compared
MINIMISED = "loss_joint"
READ = 96  # tokens of answers that are drawn to be read

PerExample = Float[Tensor, " B"]


@dataclass(frozen=True, kw_only=True)
class OfflineTask(LanguageTask):
    """Settings of every task on given answers."""

    reference: Literal["base", "round-start"] = "base"
    """DPO's reference: the model with its adapter off, or as the client received it this round."""
    reference_scores: Literal["needed", "ahead"] = "needed"
    """Score answers under the base reference when they are first drawn, or all before the run."""
    samples: WholeNumber = 0
    """Held-out prompts of each client that are answered before training and after, to be read."""
    sample_clients: tuple[str, ...] = ()
    """Which clients' models answer them; none named are all."""
    generation: Generation | None = None
    """What a model's own answers are measured by in the last evaluation, before training and after;
    null measures none."""

    def reward_settings(self) -> Mapping[str, RewardSettings]:
        if self.generation is None:
            return {}
        judge = {"judge": self.generation.judge} if self.generation.judge else {}
        return {**self.generation.rewards, **judge}

    def with_models(self, renamed: Callable[[str], str]) -> Self:
        same = super().with_models(renamed)
        if self.generation is None:
            return same
        made: Any = {
            name: reward.with_paths(renamed) for name, reward in self.generation.rewards.items()
        }
        judge: Any = self.generation.judge and self.generation.judge.with_paths(renamed)
        text = self.generation.neutral and renamed(self.generation.neutral)
        answers = replace(self.generation, rewards=made, judge=judge, neutral=text)
        return replace(same, generation=answers)

    def asks(self, client: str) -> bool:
        return self.samples > 0 and (not self.sample_clients or client in self.sample_clients)

    def check_clients(self, names: Collection[str]) -> None:
        if unknown := sorted(set(self.sample_clients) - set(names)):
            warnings.warn(
                f"task.sample_clients: there is no client {unknown[0]!r}, so that none answers "
                f"for it; there are {', '.join(map(printable, sorted(names)[:12]))}.",
                stacklevel=3,
            )

    def without_samples(self) -> Self:
        return replace(self, samples=0)

    def evaluating(self, examples: int) -> Self:
        # answers are not drawn then, and functions that a config names are not called
        return replace(self, generation=None)


class OfflineLearner(LanguageLearner):
    """A task on given answers with its model loaded."""

    settings: OfflineTask

    def __init__(
        self, settings: OfflineTask, open_groups: OpenGroups, *, needs_reference: bool
    ) -> None:
        super().__init__(settings)
        self._generations = settings.generation and Generations(
            settings.generation, self.language, self.max_length, open_groups
        )
        self.needs_reference = needs_reference
        self._worker = 0
        self._references = Kept()
        self._base_scores: dict[bytes, float] = {}
        # of the parameters that were evaluated last: clients that share them share answers too
        self._evaluated: tuple[bytes, dict[bytes, tuple[float, float | None]]] = (b"", {})

    def move_to(self, worker: int) -> None:
        super().move_to(worker)
        self._worker = worker

    @property
    def prepares(self) -> str:
        is_ahead = self.needs_reference and self.settings.reference_scores == "ahead"
        return "reference log-probabilities" * is_ahead

    @abstractmethod
    def examples(
        self, rows: Sequence[Row], unusable: list[Unusable] | None = None
    ) -> tuple[list[Example], int]:
        """Return a client's rows of one side as examples, and how many of them were cut.

        Args:
            rows: The rows.
            unusable: Takes those that cannot be used; without it the first of them is raised.

        Raises:
            UserError: A row is none of this task's, or cannot be used.
        """

    @abstractmethod
    def measure(
        self, policy: Float[Tensor, "B 2"], explicit: Float[Tensor, "B 2"] | None, batch: Batch
    ) -> Mapping[str, PerExample]:
        """Return metrics of each example; `loss`, or what is minimised, is differentiable.

        Args:
            policy: Log-probabilities of both answers [B, 2].
            explicit: Their explicit rewards, if there is a reward head [B, 2].
            batch: The examples.
        """

    # ---- data

    def encode(self, data: ClientData, unusable: list[Unusable] | None = None) -> OfflineShard:
        """Return a client's rows as tokens; see `Task.encode`."""
        (train, *_), (test, *_), (validation, *_) = sides = [
            self.examples(rows, unusable) for rows in (data.train, data.test, data.validation)
        ]
        return OfflineShard(
            data.name,
            tuple(train),
            tuple(test),
            sum(cut for _, cut in sides),
            tuple(validation),
        )

    def prepare(self, shard: OfflineShard, cache: Path) -> OfflineShard:
        """Let scores under the base reference be kept in a file of `cache`.

        The file is named after the model. With `reference_scores: ahead` a client's are computed.
        """
        self.language.keep_in(cache)
        if self.needs_reference:
            self._references.keep_in(cache / f"{self.language.fingerprint}{SCORES}")
            if self.settings.reference_scores == "ahead":
                self._base(shard.train + shard.test + shard.validation)
        return shard

    # ---- learning

    def draw(
        self, params: Tree, start: Tree, shard: OfflineShard, size: BatchSize, rng: torch.Generator
    ) -> Batch:
        """Draw a batch of examples of similar length.

        Each example has the same expected weight in the batch's mean, or in that of its objective;
        objectives have equal parts of the batch, and epochs of their own.
        """
        return self.referenced(start, *self.drawn(shard, size, rng))

    def drawn(
        self, shard: OfflineShard, size: BatchSize, rng: torch.Generator
    ) -> tuple[list[Example], tuple[float, ...]]:
        """Return a batch's examples, and the weight of each objective's mean."""
        examples: list[Example] = []
        count = len(self.objectives)
        part = BatchSize(
            max(1, size.examples // count),
            size.max_tokens and max(1, size.max_tokens // count),
            size.epochs,
            size.is_by_prompt,
            size.seen,
            size.kept,
        )
        weights = []
        for m in range(count):
            of_objective, known = shard.by_objective[m]
            indices, weight = draw_indices(known, part, rng, m)
            examples += [of_objective[i] for i in indices]
            weights.append(weight)
        return examples, tuple(weights)

    def referenced(
        self, start: Tree, examples: Sequence[Example], weights: tuple[float, ...]
    ) -> Batch:
        """Return a batch with its scores under the reference, which the round's start may be."""
        if self.settings.reference == "base" or not self.needs_reference:
            return replace(self._with_base(examples), weights=weights)
        with torch.no_grad():
            return Batch(examples, self._score(start, examples)[0], weights)

    def losses(self, params: Tree, batch: Batch) -> tuple[Float[Tensor, " M"], Mapping[str, float]]:
        """Return each objective's mean loss over a batch [M], and metrics."""
        measured = self.measure(*self._score(params, batch.examples, training=True), batch)
        # all at once: each number by itself would be waited for
        means = torch.stack([values.detach().mean() for values in measured.values()]).tolist()
        metrics = dict(zip(measured, means, strict=True))
        counts = {
            "num_pairs": float(len(batch.examples)),
            "num_tokens": float(sum(example.tokens for example in batch.examples)),
        }
        weights = batch.weights or (1.0,) * len(self.objectives)
        loss = measured.get(MINIMISED, measured["loss"])
        if len(self.objectives) == 1:
            return weights[0] * loss.mean()[None], metrics | counts
        whose = torch.tensor([example.objective for example in batch.examples], device=loss.device)
        losses = torch.stack([w * loss[whose == m].mean() for m, w in enumerate(weights)])
        apart = {
            f"loss/{name}": loss
            for name, loss in zip(self.objectives, losses.tolist(), strict=True)
        }
        return losses, metrics | apart | counts

    def units(self, shard: OfflineShard, unit: Unit) -> list[int]:
        """Return which unit each training example belongs to; see `Task.units`."""
        if isinstance(unit, Column):
            return numbered_by(unit, [one.columns for one in shard.train], shard.name)
        if unit == "prompt":
            # in whatever spelling: one prompt with another blank is not another unit
            question = self.language.texts.question
            said = {one: spelled(question(one)) for one in {e.prompt for e in shard.train}}
            return numbered([said[one.prompt] for one in shard.train])
        return list(range(len(shard.train)))

    def private_batch(self, shard: OfflineShard, batch: int) -> tuple[float, list[float]]:
        chance = chance_of(len(shard), batch)
        counts = Counter(example.objective for example in shard.train)
        return chance, [chance * max(1, counts[m]) for m in range(len(self.objectives))]

    def gradients_apart(
        self,
        params: Tree,
        start: Tree,
        shard: OfflineShard,
        units: Sequence[Sequence[int]],
        batch: int,
        wanted: Collection[str],
        draws: seeds.Draws,
    ) -> Iterator[Apart]:
        """Yield units' gradients, of about 16 examples at a time; see `Task.gradients_apart`."""
        together: list[Piece] = []
        size = 0
        for place, indices in enumerate(units):
            pieces: dict[int, list[Example]] = {}
            for i in indices:
                pieces.setdefault(shard.train[i].objective, []).append(shard.train[i])
            if together and size + len(indices) > MEASURED:
                yield self._pieces(params, start, together, wanted, draws)
                together, size = [], 0
            together += [
                Piece(place, m, some, f"unit/{indices[0]}/{m}")
                for m, some in sorted(pieces.items())
            ]
            size += len(indices)
        if together:
            yield self._pieces(params, start, together, wanted, draws)

    def _pieces(
        self,
        params: Tree,
        start: Tree,
        together: Sequence[Piece],
        wanted: Collection[str],
        draws: seeds.Draws,
    ) -> Apart:
        """Return the gradients of pieces of units: in one pass, or one by one."""
        is_small = sum(len(piece.examples) for piece in together) <= MEASURED
        is_adapter = not set(wanted) & NAMES
        rows: list[PackedRow] = [
            (prompt, list(answers.values()))
            for piece in together
            for prompt, answers in _rows(piece.examples).items()
        ]
        if is_small and is_adapter and self.language.takes_apart(rows):
            pieces = [piece.examples for piece in together]
            gradients = self._in_one_pass(params, start, pieces, wanted)
        else:
            alone = []
            for piece in together:
                self.begin_dropout(draws(piece.address))
                alone.append(self._alone(params, start, piece.examples, wanted))
            gradients = {name: torch.stack([one[name] for one in alone]) for name in wanted}
        return Apart(gradients, [one.unit for one in together], [one.objective for one in together])

    def _in_one_pass(
        self,
        params: Tree,
        start: Tree,
        pieces: Sequence[Sequence[Example]],
        wanted: Collection[str],
    ) -> Tree:
        copies = self.language.copies(trees.select(params, wanted), len(pieces))
        examples = [example for some in pieces for example in some]
        losses = self._losses({**params, **copies}, start, examples, pieces)
        found = torch.autograd.grad(losses.sum(), list(copies.values()))
        return dict(zip(copies, found, strict=True))

    def _alone(
        self, params: Tree, start: Tree, examples: Sequence[Example], wanted: Collection[str]
    ) -> Tree:
        """Return the gradient of examples' summed losses, of a few at a time."""
        leaves = {n: t.detach().requires_grad_() for n, t in trees.select(params, wanted).items()}
        total = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
        for first in range(0, len(examples), MEASURED):
            some = examples[first : first + MEASURED]
            losses = self._losses({**params, **leaves}, start, some)
            found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
        return total

    def _losses(
        self,
        params: Tree,
        start: Tree,
        examples: Sequence[Example],
        pieces: Sequence[Sequence[Example]] = (),
    ) -> PerExample:
        """Return what is minimised of each example; copies of parameters are the pieces'."""
        batch = self.referenced(start, examples, ())
        scored = self._score(params, examples, training=True, pieces=pieces)
        measured = self.measure(*scored, batch)
        return measured.get(MINIMISED, measured["loss"])

    def batches(self, shard: OfflineShard) -> Iterator[tuple[Batch, float]]:
        """Yield all training examples once, against the base reference, with each batch's share."""
        for indices in _by_length(shard.train, MEASURED):
            yield (
                self._with_base([shard.train[i] for i in indices]),
                len(indices) / len(shard.train),
            )

    def evaluate(self, params: Tree, shard: OfflineShard) -> Mapping[str, float]:
        """Return means over the shard's held-out examples, rewards over the base reference.

        Accuracies are also given for each of several objectives.
        """
        sums: dict[str, float] = {}
        counts = Counter(self.objectives[example.objective] for example in shard.test)
        accurate = dict.fromkeys(self.objectives, 0.0)  # in their order, whatever comes first
        for examples, metrics in self._held_out(params, shard):
            for name, values in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
            for example, value in zip(examples, metrics[ACCURACY].tolist(), strict=True):
                accurate[self.objectives[example.objective]] += value
        means = {name: value / len(shard.test) for name, value in sums.items()}
        if len(counts) > 1:
            apart = ((name, value) for name, value in accurate.items() if name in counts)
            means |= {f"{ACCURACY}/{name}": value / counts[name] for name, value in apart}
        return means | {"num_examples": float(len(shard.test))}

    def outcomes(self, params: Tree, shard: OfflineShard) -> list[ExampleOutcome]:
        return self.told(shard, self.choices(params, shard).tolist())

    @staticmethod
    def told(
        shard: OfflineShard, right: Sequence[float], stated: Sequence[float] = ()
    ) -> list[ExampleOutcome]:
        """Return what came of each held-out example, with a digest of its prompt.

        Args:
            shard: Whose examples.
            right: Whether the model was right, of each.
            stated: The probability that it gave to what is preferred, if it states any.
        """
        digests = [_digest(example.prompt) for example in shard.test]
        if stated:
            return list(zip(digests, right, stated, strict=True))
        return list(zip(digests, right, strict=True))

    def texts(self, example: Example) -> tuple[str, str, str]:
        """Return the texts of an example's prompt and two answers."""
        question, decode = self.language.texts.question, self.language.tokenizer.decode
        first, second = (decode(list(a), skip_special_tokens=True) for a in example.answers)
        return question(example.prompt), first, second

    @torch.no_grad()
    def states(self, examples: Sequence[Example]) -> dict[bytes, Float[Tensor, " D"]]:
        """Return the backbone's mean hidden state over each answer's tokens, by the answer's key.

        The states are those that the model's head reads.
        """
        found: dict[bytes, Float[Tensor, " D"]] = {}
        for some in self._answers(examples, ()):
            means = self.language.mean_states([row for row, _ in some]).float().cpu()
            found.update(zip((key for _, keys in some for key in keys), means, strict=True))
        return found

    def samples(self, params: Tree, shard: OfflineShard) -> list[dict[str, Any]]:
        """Return held-out prompts with answers of the backbone and of the client's model.

        There are none of a client that is not asked.
        """
        if not self.settings.asks(shard.name):
            return []
        prompts = [one.prompt for one in self._asked(shard, self.settings.samples)]
        asked = map(self.language.texts.question, prompts)
        rows: list[dict[str, Any]] = [{"prompt": text} for text in asked]
        for name, policy in (("before", None), ("after", params)):
            rng = seeds.generator(0, "samples")  # of chance as of prompts, alike for all
            own = OwnSampling(READ, self.language.model.generation_config)
            answers = generate(self.language, policy, prompts, 1, own, rng) if prompts else []
            said = self.language.tokenizer.batch_decode(
                [list(answer) for answer in answers], skip_special_tokens=True
            )
            for row, text in zip(rows, said, strict=True):
                row[name] = {"completion": text, "rewards": {}}
        return rows

    def generated(self, params: Tree, shard: OfflineShard) -> Mapping[str, float]:
        """Return metrics of answers to held-out prompts; see `Generations.measure`."""
        if not self._generations:
            return {}
        asked = self._asked(shard, self._generations.settings.prompts)
        prompts, texts = [one.prompt for one in asked], [self.prompt_of(one) for one in asked]
        return self._generations.measure(params, shard.name, prompts, texts)

    @staticmethod
    def _asked(shard: OfflineShard, count: int) -> list[Example]:
        """Return an example of each of the first held-out prompts, in an order that clients who
        share them have in common.
        """
        known = {example.prompt: example for example in shard.test}
        return [known[prompt] for prompt in sorted(known, key=_digest)[:count]]

    def messages(self, prompt: Text) -> Text:
        """Return what an example keeps of a row's prompt, which may be one of very many rows."""
        is_judged = bool(self.settings.reward_settings())
        return prompt if is_judged and not isinstance(prompt, str) else ""

    def prompt_of(self, example: Example) -> Text:
        """Return an example's prompt as rewards are given it."""
        return example.text or self.language.texts.question(example.prompt)

    def choices(self, params: Tree, shard: OfflineShard) -> Float[Tensor, " n"]:
        """Return whether the preferred answer is chosen, of each held-out example [n]."""
        return torch.cat([metrics[ACCURACY].cpu() for _, metrics in self._held_out(params, shard)])

    @torch.no_grad()
    def _held_out(
        self, params: Tree, shard: OfflineShard
    ) -> Iterator[tuple[Sequence[Example], Mapping[str, PerExample]]]:
        """Yield held-out examples with their metrics; of parameters seen before, from memory."""
        if not shard.test:
            return
        digest = trees.digest(params)
        if digest != self._evaluated[0]:
            self._evaluated = digest, {}
        known = self._evaluated[1]
        for some in self._answers(shard.test, known.keys()):
            sums, rewards = self.language.score(params, [row for row, _ in some])
            explicit = [None] * len(sums) if rewards is None else rewards.tolist()
            keys = [key for _, keys in some for key in keys]
            known.update(zip(keys, zip(sums.tolist(), explicit, strict=True), strict=True))
        found = [[known[key] for key in example.keys] for example in shard.test]
        policy, reward = (
            torch.tensor([[one[k] or 0.0 for one in pair] for pair in found], device=self.device)
            for k in (0, 1)
        )
        has_reward = found[0][0][1] is not None
        batch = self._with_base(shard.test)
        yield shard.test, self.measure(policy, reward if has_reward else None, batch)

    def _with_base(self, examples: Sequence[Example]) -> Batch:
        if not self.needs_reference:
            return Batch(examples, torch.zeros(len(examples), 2, device=self.device))
        return Batch(examples, torch.tensor(self._base(examples), device=self.device))

    @torch.no_grad()
    def _base(self, examples: Sequence[Example]) -> list[list[float]]:
        """Return examples' scores under the base reference, of which the unknown are computed."""
        known = self._base_scores
        wanted = {key for example in examples for key in example.keys}
        known.update(self._kept(wanted - known.keys()))
        for some in self._answers(examples, known.keys()):
            keys = [key for _, keys in some for key in keys]
            scores = self._kept(keys)  # another process may have come to them meanwhile
            if len(scores) < len(keys):
                sums, _ = self.language.score(None, [row for row, _ in some])
                scores = dict(zip(keys, sums.tolist(), strict=True))
                self._references.add({key: struct.pack("<d", s) for key, s in scores.items()})
            known.update(scores)
        return [[known[key] for key in example.keys] for example in examples]

    def _kept(self, keys: Iterable[bytes]) -> dict[bytes, float]:
        """Return the reference scores that are kept."""
        found = self._references.find(keys)
        return {key: struct.unpack("<d", score)[0] for key, score in found.items()}

    def _answers(
        self, examples: Sequence[Example], known: Collection[bytes]
    ) -> Iterator[list[tuple[PackedRow, list[bytes]]]]:
        """Yield prompts with the answers that are not known, each once, in batches, and their keys.

        Batches are of similar length, the shortest first, but every second worker begins with
        the longest: clients who share answers are often at work together, and so do not compute
        all of them twice.
        """
        wanted: dict[Tokens, dict[bytes, Tokens]] = {}
        for example in examples:
            for key, answer in zip(example.keys, example.answers, strict=True):
                if key not in known:
                    wanted.setdefault(example.prompt, {})[key] = answer
        rows: list[tuple[PackedRow, list[bytes]]] = []
        for prompt, answers in wanted.items():
            keys = list(answers)
            for first in range(0, len(keys), SCORING_BATCH):
                some = keys[first : first + SCORING_BATCH]
                rows.append(((prompt, [answers[key] for key in some]), some))
        rows.sort(
            key=lambda row: len(row[0][0]) + max(map(len, row[0][1])), reverse=self._worker % 2 == 1
        )
        batch: list[tuple[PackedRow, list[bytes]]] = []
        for row in rows:
            if batch and sum(len(keys) for _, keys in batch) + len(row[1]) > SCORING_BATCH:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _score(
        self,
        params: Tree,
        examples: Sequence[Example],
        *,
        training: bool = False,
        pieces: Sequence[Sequence[Example]] = (),
    ) -> tuple[Float[Tensor, "B 2"], Float[Tensor, "B 2"] | None]:
        """Score a batch, in which each prompt and each answer to it is computed once.

        Of several pieces, whose gradients come apart, each has what it needs for itself.
        """
        rows: list[PackedRow] = []
        index: list[list[int]] = []
        units: list[int] = []
        for some in pieces or [examples]:
            own = _rows(some)
            begun = sum(len(answers) for _, answers in rows)
            order = [key for keys in own.values() for key in keys]
            places = {key: begun + place for place, key in enumerate(order)}
            index += [[places[key] for key in example.keys] for example in some]
            rows += [(prompt, list(answers.values())) for prompt, answers in own.items()]
            units.append(len(own))
        sums, rewards = self.language.score(
            params, rows, training=training, units=units if pieces else ()
        )
        at = torch.tensor(index, device=self.device)
        return sums[at], None if rewards is None else rewards[at]


def _rows(examples: Iterable[Example]) -> dict[Tokens, dict[bytes, Tokens]]:
    """Return examples' answers by their prompts, each once."""
    rows: dict[Tokens, dict[bytes, Tokens]] = {}
    for example in examples:
        rows.setdefault(example.prompt, {}).update(zip(example.keys, example.answers, strict=True))
    return rows


def _digest(prompt: Tokens) -> str:
    return blake2b(f"{prompt}".encode(), digest_size=8).hexdigest()


def _by_length(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Yield indices of batches of similar length, each example once."""
    ranked = sorted(range(len(examples)), key=lambda i: (examples[i].tokens, i))
    for start in range(0, len(ranked), size):
        yield ranked[start : start + size]
