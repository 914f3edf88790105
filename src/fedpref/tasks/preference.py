"""Preference alignment of a language model: pairs of answers, the DPO family of losses, an adapter to train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedpref import trees
from fedpref.data.preferences import ClientData, Preference
from fedpref.errors import UserError
from fedpref.losses import DPO, Loss, PairScores
from fedpref.models.language import LanguageModel, Model
from fedpref.trees import Tree

DEFAULT_LENGTH = 1024
POOL = 4  # a batch is drawn from this many times its size, so that its rows are of similar length
SCORING_BATCH = 16  # pairs a forward without gradient


@dataclass(frozen=True, kw_only=True)
class PreferenceTask:
    """Preference pairs under one of the DPO family's losses."""

    name: Literal["preference"] = "preference"
    model: Model = Model()
    loss: Annotated[Loss, Field(discriminator="name")] = DPO()
    reference: Literal["base", "round-start"] = "base"  # the model with its adapter off, or as the client received it this round
    max_length: Annotated[int, Field(ge=8)] | None = None  # tokens of prompt and answer; None: the model's context, at most 1024
    truncation_mode: Literal["refuse", "keep_start", "keep_end"] = "refuse"  # which end of a long prompt stays

    def build(self) -> PreferenceLearner:
        return PreferenceLearner(self)


@dataclass(frozen=True)
class Pair:
    """A prompt's tokens, two answers' tokens, and the answers' log-probabilities under the base reference once they are known."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    reference: tuple[float, float] | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and both answers."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class PairShard:
    """One client's pairs."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    truncated: int = 0  # rows of which something was cut off

    def __len__(self) -> int:
        return len(self.train)


@dataclass(frozen=True)
class PairBatch:
    """B pairs, and their scores under the reference (zeros where the loss needs none)."""

    pairs: Sequence[Pair]
    reference: PairScores


class PreferenceLearner:
    """The task at work: a language model, loaded once, whatever the number of clients."""

    def __init__(self, settings: PreferenceTask) -> None:
        self.settings = settings
        self.language = LanguageModel(settings.model)
        context = self.language.context
        self.max_length = settings.max_length or min(context or DEFAULT_LENGTH, DEFAULT_LENGTH)
        if context and self.max_length > context:
            raise UserError(
                f"task.max_length: {self.max_length} tokens were asked for, but the model's context holds {context}. "
                f"Set task.max_length to {context} or less."
            )

    # ---- data

    def encode(self, data: ClientData) -> PairShard:
        """Turn a client's rows into tokens; raises UserError for a row that cannot be used."""
        cut = 0
        pairs = []
        for row in data.train + data.test:
            pair = self._encode(row)
            fitted = self._fit(pair, row)
            if fitted.chosen == fitted.rejected:
                raise UserError(f"{row.where}: the two answers are the same tokens to the model, after truncation if any. Remove the row.")
            cut += fitted is not pair
            pairs.append(fitted)
        return PairShard(data.name, tuple(pairs[: len(data.train)]), tuple(pairs[len(data.train) :]), truncated=cut)

    def _encode(self, row: Preference) -> Pair:
        if isinstance(row.prompt, str) and isinstance(row.chosen, str) and isinstance(row.rejected, str):
            (prompt, chosen), (_, rejected) = (self.language.encode(row.prompt, answer) for answer in (row.chosen, row.rejected))
            return Pair(tuple(prompt), tuple(chosen), tuple(rejected))
        if not self.language.chats:
            raise UserError(
                f"{row.where}: the row is a conversation, but the tokenizer of {self.settings.model.path!r} has no chat "
                "template. Give the prompt and answers as plain text, or use a model with a chat template."
            )
        try:
            prompt, (chosen, rejected) = self.language.encode_chat(row.prompt, (row.chosen, row.rejected))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(
                f"{row.where}: the chat template of {self.settings.model.path!r} refuses the conversation: {error}. "
                "Change the row's roles, or give it as plain text."
            ) from error
        return Pair(tuple(prompt), tuple(chosen), tuple(rejected))

    def _fit(self, pair: Pair, row: Preference) -> Pair:
        if pair.length <= self.max_length:
            return pair
        if self.settings.truncation_mode == "refuse":
            raise UserError(
                f"{row.where}: prompt and longer answer are {pair.length} tokens, task.max_length is {self.max_length}. "
                "Raise task.max_length if the model's context allows it, or set task.truncation_mode to keep_end or keep_start."
            )
        room = self.max_length - min(len(pair.prompt), self.max_length // 2)
        chosen, rejected = pair.chosen[:room], pair.rejected[:room]
        space = self.max_length - max(len(chosen), len(rejected))
        prompt = pair.prompt[:space]
        if self.settings.truncation_mode == "keep_end" and space < len(pair.prompt):
            opening = pair.prompt[: self.language.opens(pair.prompt)]
            prompt = opening + pair.prompt[len(pair.prompt) - space + len(opening) :]
        return Pair(prompt, chosen, rejected)

    def prepare(self, shard: PairShard, cache: Path) -> PairShard:
        """Score a client's pairs under the base reference, once; the scores are kept in a file named after model and data."""
        if not self.settings.loss.needs_reference:
            return shard
        pairs = shard.train + shard.test
        if not pairs:
            return shard
        digest = blake2b(self.language.fingerprint.encode(), digest_size=16)
        for pair in pairs:
            digest.update(f"{pair.prompt} {pair.chosen} {pair.rejected}".encode())
        file = cache / f"reference-{digest.hexdigest()}.safetensors"
        if file.exists():
            scores = trees.load(file)["scores"]
        else:
            scores = torch.empty(len(pairs), 2, dtype=torch.float64)
            with torch.no_grad():
                for indices in _by_length(pairs, SCORING_BATCH):
                    scores[indices] = self._score(None, [pairs[i] for i in indices]).double().cpu()
            cache.mkdir(parents=True, exist_ok=True)
            trees.save({"scores": scores}, file)
        scored = tuple(replace(pair, reference=(c, r)) for pair, (c, r) in zip(pairs, scores.tolist(), strict=True))
        return replace(shard, train=scored[: len(shard.train)], test=scored[len(shard.train) :])

    # ---- learning

    def init(self, rng: torch.Generator) -> Tree:
        return self.language.init(rng)

    def draw(self, params: Tree, start: Tree, shard: PairShard, size: int, rng: torch.Generator) -> PairBatch:
        """A batch of pairs of similar length in which every pair of the shard is equally likely."""
        size = min(size, len(shard.train))
        blocks = min(POOL, len(shard.train) // size)
        pool = torch.randperm(len(shard.train), generator=rng)[: size * blocks].tolist()
        block = int(torch.randint(blocks, (), generator=rng))
        ranked = sorted(pool, key=lambda i: (shard.train[i].tokens, i))
        pairs = [shard.train[i] for i in ranked[block * size : (block + 1) * size]]
        if self.settings.reference == "base" or not self.settings.loss.needs_reference:
            return PairBatch(pairs, self._base(pairs))
        with torch.no_grad():
            return PairBatch(pairs, _scores(self._score(start, pairs), pairs))

    def losses(self, params: Tree, batch: PairBatch) -> tuple[Float[Tensor, 1], Mapping[str, float]]:
        policy = _scores(self._score(params, batch.pairs, training=True), batch.pairs)
        loss = self.settings.loss(policy, batch.reference).mean()
        metrics = {name: float(values.mean()) for name, values in self._measure(policy, batch.reference).items()}
        counts = {"num_pairs": float(len(batch.pairs)), "num_tokens": float(sum(pair.tokens for pair in batch.pairs))}
        return loss[None], metrics | counts

    @torch.no_grad()
    def evaluate(self, params: Tree, shard: PairShard) -> Mapping[str, float]:
        """Means over the shard's held-out pairs; rewards are over the base reference."""
        sums: dict[str, float] = {}
        for indices in _by_length(shard.test, SCORING_BATCH):
            pairs = [shard.test[i] for i in indices]
            policy = _scores(self._score(params, pairs), pairs)
            for name, values in self._measure(policy, self._base(pairs)).items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
        return {name: value / len(shard.test) for name, value in sums.items()} | {"num_examples": float(len(shard.test))}

    def export(self, params: Tree, folder: Path) -> None:
        self.language.export(params, folder)

    def _measure(self, policy: PairScores, reference: PairScores) -> Mapping[str, Float[Tensor, " B"]]:
        """TRL's names. A tie counts as half an accurate pair: nothing is learnt from it, and nothing is lost."""
        chosen, rejected = (reward.detach() for reward in self.settings.loss.rewards(policy, reference))
        return {
            "loss": self.settings.loss(policy, reference).detach(),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float() + 0.5 * (chosen == rejected).float(),
        }

    def _base(self, pairs: Sequence[Pair]) -> PairScores:
        if self.settings.loss.needs_reference and any(pair.reference is None for pair in pairs):
            raise RuntimeError("the shard was not prepared: its pairs have no reference scores")
        known = torch.tensor([pair.reference or (0.0, 0.0) for pair in pairs], device=self.language.device)
        return _scores(known, pairs)

    def _score(self, adapter: Tree | None, pairs: Sequence[Pair], *, training: bool = False) -> Float[Tensor, "B 2"]:
        rows = [(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
        return self.language.log_probabilities(adapter, rows, training=training).view(-1, 2)


def _scores(log_probabilities: Float[Tensor, "B 2"], pairs: Sequence[Pair]) -> PairScores:
    tokens = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in pairs]).to(log_probabilities)
    return PairScores(*log_probabilities.unbind(1), *tokens.unbind(1))


def _by_length(pairs: Sequence[Pair], size: int) -> Iterator[list[int]]:
    ranked = sorted(range(len(pairs)), key=lambda i: (pairs[i].tokens, i))
    for start in range(0, len(ranked), size):
        yield ranked[start : start + size]
