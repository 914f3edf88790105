"""What tasks on given answers share: examples, reference scores, batches of similar length."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data.preferences import ClientData, Row
from fedpref.data.unusable import Unusable
from fedpref.models.generation import OwnSampling, generate
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import ACCURACY
from fedpref.numerics.trees import Tree
from fedpref.tasks.batches import BatchSize, draw_indices
from fedpref.tasks.language import LanguageLearner, LanguageTask, Tokens
from fedpref.types import WholeNumber

SCORING_BATCH = 16  # examples of a batch where each is seen once
READ = 64  # tokens of answers that are drawn to be read

PerExample = Float[Tensor, " B"]


@dataclass(frozen=True, kw_only=True)
class OfflineTask(LanguageTask):
    """Settings of every task on given answers."""

    reference: Literal["base", "round-start"] = "base"
    """DPO's reference: the model with its adapter off, or as the client received it this round."""
    samples: WholeNumber = 0
    """Held-out prompts of each client that are answered before training and after, to be read."""

    def without_samples(self) -> Self:
        return replace(self, samples=0)


@dataclass(frozen=True)
class Example:
    """A prompt's tokens, two answers' tokens, and the answers' reference scores once they are
    known.
    """

    prompt: Tokens
    answers: tuple[Tokens, Tokens]
    reference: tuple[float, float] | None = None
    desirable: bool = True
    """What was said of the first answer, where answers are not compared."""
    objective: int = 0
    """Of the task's, where there are several."""

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and both answers."""
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True)
class OfflineShard:
    """One client's examples."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    truncated: int = 0
    """Rows of which something was cut off."""

    def __len__(self) -> int:
        return len(self.train)

    @cached_property  # asked for in every draw
    def by_objective(self) -> dict[int, tuple[tuple[Example, ...], tuple[int, ...]]]:
        """Training examples of each objective, and the tokens of each."""
        objectives = dict.fromkeys(sorted({example.objective for example in self.train}))
        parts = {m: tuple(e for e in self.train if e.objective == m) for m in objectives}
        return {m: (some, tuple(e.tokens for e in some)) for m, some in parts.items()}


@dataclass(frozen=True)
class Batch:
    """B examples, and their scores under the reference (zeros where the loss needs none)."""

    examples: Sequence[Example]
    reference: Float[Tensor, "B 2"]


class OfflineLearner(LanguageLearner):
    """A task on given answers with its model loaded."""

    settings: OfflineTask

    def __init__(self, settings: OfflineTask, *, needs_reference: bool) -> None:
        super().__init__(settings)
        self.needs_reference = needs_reference

    @property
    def prepares(self) -> str:
        return "reference log-probabilities"

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
        """Return metrics of each example; `loss` is differentiable.

        Args:
            policy: Log-probabilities of both answers [B, 2].
            explicit: Their explicit rewards, if there is a reward head [B, 2].
            batch: The examples.
        """

    # ---- data

    def encode(self, data: ClientData, unusable: list[Unusable] | None = None) -> OfflineShard:
        """Return a client's rows as tokens; see `Task.encode`."""
        (train, cut), (test, cut_too) = (
            self.examples(rows, unusable) for rows in (data.train, data.test)
        )
        return OfflineShard(data.name, tuple(train), tuple(test), truncated=cut + cut_too)

    def prepare(self, shard: OfflineShard, cache: Path) -> OfflineShard:
        """Score a client's examples under the base reference, once.

        The scores are kept in a file of `cache` that is named after model and data.
        """
        examples = shard.train + shard.test
        if not examples or not self.needs_reference:
            return shard
        digest = blake2b(self.language.fingerprint.encode(), digest_size=16)
        for example in examples:
            digest.update(f"{example.prompt} {example.answers}".encode())
        file = cache / f"reference-{digest.hexdigest()}.safetensors"
        if file.exists():
            scores = trees.load(file)["scores"]
        else:
            scores = torch.empty(len(examples), 2, dtype=torch.float64)
            with torch.no_grad():
                for indices in _by_length(examples, SCORING_BATCH):
                    scores[indices] = (
                        self._score(None, [examples[i] for i in indices])[0].double().cpu()
                    )
            cache.mkdir(parents=True, exist_ok=True)
            trees.save({"scores": scores}, file)
        scored = tuple(
            replace(example, reference=(a, b))
            for example, (a, b) in zip(examples, scores.tolist(), strict=True)
        )
        return replace(shard, train=scored[: len(shard.train)], test=scored[len(shard.train) :])

    # ---- learning

    def draw(
        self, params: Tree, start: Tree, shard: OfflineShard, size: BatchSize, rng: torch.Generator
    ) -> Batch:
        """Draw a batch of examples of similar length.

        Each example has the same expected weight in the batch's mean, or in that of its objective;
        objectives have equal parts of the batch, and epochs of their own.
        """
        examples: list[Example] = []
        count = len(self.objectives)
        part = BatchSize(
            max(1, size.examples // count),
            size.max_tokens and max(1, size.max_tokens // count),
            size.epochs,
        )
        for m in range(count):
            of_objective, lengths = shard.by_objective[m]
            examples += [of_objective[i] for i in draw_indices(lengths, part, rng, m)]
        if self.settings.reference == "base" or not self.needs_reference:
            return self._with_base(examples)
        with torch.no_grad():
            return Batch(examples, self._score(start, examples)[0])

    def losses(self, params: Tree, batch: Batch) -> tuple[Float[Tensor, " M"], Mapping[str, float]]:
        """Return each objective's mean loss over a batch [M], and metrics."""
        measured = self.measure(*self._score(params, batch.examples, training=True), batch)
        metrics = {name: float(values.detach().mean()) for name, values in measured.items()}
        counts = {
            "num_pairs": float(len(batch.examples)),
            "num_tokens": float(sum(example.tokens for example in batch.examples)),
        }
        if len(self.objectives) == 1:
            return measured["loss"].mean()[None], metrics | counts
        whose = torch.tensor(
            [example.objective for example in batch.examples], device=measured["loss"].device
        )
        losses = torch.stack(
            [measured["loss"][whose == m].mean() for m in range(len(self.objectives))]
        )
        apart = {
            f"loss/{name}": loss
            for name, loss in zip(self.objectives, losses.tolist(), strict=True)
        }
        return losses, metrics | apart | counts

    def batches(self, shard: OfflineShard) -> Iterator[tuple[Batch, float]]:
        """Yield all training examples once, against the base reference, with each batch's share."""
        for indices in _by_length(shard.train, SCORING_BATCH):
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

    def samples(self, params: Tree, shard: OfflineShard) -> list[dict[str, Any]]:
        """Return held-out prompts with answers of the backbone and of the client's model."""
        prompts = list(dict.fromkeys(example.prompt for example in shard.test))[
            : self.settings.samples
        ]
        texts = self.language.tokenizer.batch_decode(
            [list(prompt) for prompt in prompts], skip_special_tokens=True
        )
        rows: list[dict[str, Any]] = [{"prompt": text} for text in texts]
        for name, policy in (("before", None), ("after", params)):
            rng = seeds.generator(0, f"samples/{shard.name}")
            own = OwnSampling(READ, self.language.model.generation_config)
            answers = generate(self.language, policy, prompts, 1, own, rng) if prompts else []
            said = self.language.tokenizer.batch_decode(
                [list(answer) for answer in answers], skip_special_tokens=True
            )
            for row, text in zip(rows, said, strict=True):
                row[name] = {"completion": text, "rewards": {}}
        return rows

    def choices(self, params: Tree, shard: OfflineShard) -> Float[Tensor, " n"]:
        """Return whether the preferred answer is chosen, of each held-out example [n]."""
        return torch.cat([metrics[ACCURACY].cpu() for _, metrics in self._held_out(params, shard)])

    @torch.no_grad()
    def _held_out(
        self, params: Tree, shard: OfflineShard
    ) -> Iterator[tuple[Sequence[Example], Mapping[str, PerExample]]]:
        for indices in _by_length(shard.test, SCORING_BATCH):
            examples = [shard.test[i] for i in indices]
            yield examples, self.measure(*self._score(params, examples), self._with_base(examples))

    def _with_base(self, examples: Sequence[Example]) -> Batch:
        if self.needs_reference and any(example.reference is None for example in examples):
            raise RuntimeError("the shard was not prepared: its examples have no reference scores")
        known = [example.reference or (0.0, 0.0) for example in examples]
        return Batch(examples, torch.tensor(known, device=self.language.device))

    def _score(
        self, params: Tree | None, examples: Sequence[Example], *, training: bool = False
    ) -> tuple[Float[Tensor, "B 2"], Float[Tensor, "B 2"] | None]:
        sums, rewards = self.language.score(
            params, [(example.prompt, example.answers) for example in examples], training=training
        )
        return sums.view(-1, 2), None if rewards is None else rewards.view(-1, 2)


def _by_length(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Yield indices of batches of similar length, each example once."""
    ranked = sorted(range(len(examples)), key=lambda i: (examples[i].tokens, i))
    for start in range(0, len(ranked), size):
        yield ranked[start : start + size]
