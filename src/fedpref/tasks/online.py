"""Preferences of answers that the policy gives as it learns, by a judge, beside those given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data import ClientData
from fedpref.data.unusable import Unusable
from fedpref.models.generation import Sampling, generate
from fedpref.numerics.trees import Tree
from fedpref.rewards import Reward
from fedpref.rewards.reward import (
    OpenGroups,
    RewardSettings,
    answered,
    as_given,
    called,
    columns_of,
    no_groups,
    refuse_history,
)
from fedpref.tasks.batches import BatchSize
from fedpref.tasks.examples import Batch, Example, OfflineShard
from fedpref.tasks.preference import PairLearner, PairTask
from fedpref.types import Count, Share

PAIRS, TURN = "pairs", "turn"  # what a client keeps from batch to batch


@dataclass(frozen=True, kw_only=True)
class OnlinePreferenceTask(PairTask):
    """Online DPO: the policy answers prompts, a judge says which answer is better.

    A batch is of prompts of the client's own pairs. Part of them are answered by the policy as it
    is, and the answer that the judge likes best is preferred to the one that it likes least; the
    others are a replay of what the client has, its given pairs and those that were judged before.
    The loss is the preference task's. Of the form of Guo et al. 2024 (online DPO); replay, and a
    judge of each client's own, are ours.
    """

    name: Literal["online-preference"] = "online-preference"
    judge: Reward
    """By which two answers are compared: a reward, a function of yours, or groups of a run of
    opinions. Sites may have a judge of their own. Where it likes answers alike, the given pair is
    learned from."""
    sampling: Sampling = Sampling()
    """How answers are drawn."""
    num_generations: Count = 2
    """Answers to a prompt, of which the best and the worst are a pair."""
    replay: Share = 0.5
    """The share of a batch that is replayed; 1 is the preference task."""
    draw_every: Count = 1
    """Answers are drawn in every so many batches; the batches between are all replay."""
    memory: Count = 256
    """Judged pairs that a client keeps; older ones are forgotten."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective_column is not None:
            raise ValueError("task.objective_column: one judge is one objective. Leave it out")
        if self.num_generations < 2:
            raise ValueError("task.num_generations: two answers are the fewest to compare")
        refuse_history("task.judge", [self.judge])

    def reward_settings(self) -> Mapping[str, RewardSettings]:
        return {**super().reward_settings(), "task.judge": self.judge}

    def judged_by(self, judge: Any) -> Self:
        return replace(self, judge=judge)

    def with_models(self, renamed: Callable[[str], str]) -> Self:
        same = super().with_models(renamed)
        judge: Any = self.judge.with_paths(renamed)
        return replace(same, judge=judge)

    def build(self, open_groups: OpenGroups = no_groups) -> OnlinePreferenceLearner:
        return OnlinePreferenceLearner(self, open_groups)


@dataclass(frozen=True)
class OnlineBatch(Batch):
    """A batch, with how many of its pairs were judged for it."""

    judged: int = 0


class OnlinePreferenceLearner(PairLearner):
    """The task with its model and its judge loaded."""

    settings: OnlinePreferenceTask

    def __init__(self, settings: OnlinePreferenceTask, open_groups: OpenGroups = no_groups) -> None:
        super().__init__(settings, open_groups)
        self.judge = settings.judge.build(open_groups)

    def encode(self, data: ClientData, unusable: list[Unusable] | None = None) -> OfflineShard:
        shard = super().encode(data, unusable)
        # whose judge is asked stays known where all clients' pairs are in one place
        named = [replace(one, columns={**one.columns, "client": data.name}) for one in shard.train]
        return replace(shard, train=tuple(named))

    def draw(
        self, params: Tree, start: Tree, shard: OfflineShard, size: BatchSize, rng: torch.Generator
    ) -> OnlineBatch:
        """Draw a batch of given pairs, and put what is new or was judged before into its place.

        What a client keeps of judged pairs stands in `size.kept`.
        """
        given, weights = self.drawn(shard, size, rng)
        turn = int(size.kept.get(TURN, torch.tensor(0)))
        memory = deque(restored(size.kept.get(PAIRS)), maxlen=self.settings.memory)
        known = len(memory)
        new = 0
        if self.settings.replay < 1 and turn % self.settings.draw_every == 0:
            new = max(1, round((1 - self.settings.replay) * len(given)))
            # a batch comes by length, and whoever is answered must not hang on it
            given = [given[k] for k in torch.randperm(len(given), generator=rng).tolist()]
        judged = self._judged(params, given[:new], rng) if new else []
        found = [one for one in judged if one is not None]
        examples = found + [old for one, old in zip(judged, given, strict=False) if one is None]
        for old in given[new:]:
            # of all that there is, each pair as often as any other
            place = known + len(shard.train)
            if known and (k := int(torch.randint(place, (), generator=rng))) < known:
                old = memory[k]
            examples.append(old)
        memory.extend(found)
        size.kept.update({PAIRS: kept(memory), TURN: torch.tensor(turn + 1)})
        batch = self.referenced(start, examples, weights)
        return OnlineBatch(batch.examples, batch.reference, batch.weights, len(found))

    def losses(self, params: Tree, batch: Batch) -> tuple[Float[Tensor, " M"], Mapping[str, float]]:
        losses, metrics = super().losses(params, batch)
        # a batch of given pairs, as diagnostics see them, has none
        judged = batch.judged if isinstance(batch, OnlineBatch) else 0
        return losses, {**metrics, "num_judged": float(judged)}

    def _judged(
        self, params: Tree, given: Sequence[Example], rng: torch.Generator
    ) -> list[Example | None]:
        """Return a judged pair for each prompt; None where the judge likes all answers alike."""
        drawn = self.answers(params, given, rng)
        decode = self.language.tokenizer.batch_decode
        asked, texts, beside = [], [], []
        for example, answers in zip(given, drawn, strict=True):
            prompt = self.prompt_of(example)
            said = decode([list(answer) for answer in answers], skip_special_tokens=True)
            asked += [as_given(prompt)] * len(answers)
            texts += [answered(prompt, text) for text in said]
            beside += [example.columns] * len(answers)
        if not texts:
            return [None] * len(given)
        liked = called(
            self.judge,
            "task.judge",
            asked,
            texts,
            columns_of(beside),
            [answer for answers in drawn for answer in answers],
        )
        pairs: list[Example | None] = []
        for example, answers in zip(given, drawn, strict=True):
            if not answers:
                pairs.append(None)
                continue
            ranks, liked = liked[: len(answers)], liked[len(answers) :]
            best, worst = (ranks.index(most(ranks)) for most in (max, min))
            differ = ranks[best] > ranks[worst] and answers[best] != answers[worst]
            pair = (answers[best], answers[worst])
            pairs.append(Example(example.prompt, pair) if differ else None)
        return pairs

    def answers(
        self, params: Tree, given: Sequence[Example], rng: torch.Generator
    ) -> list[list[tuple[int, ...]]]:
        """Return the policy's answers to each example's prompt, no longer than what is trained.

        Where the model has no room for them behind a prompt there are none.
        """
        count, sampling = self.settings.num_generations, self.settings.sampling
        context = self.language.context or self.max_length + sampling.max_completion_length
        most = min(self.max_length - 1, context - sampling.max_completion_length)
        fits = [k for k, example in enumerate(given) if len(example.prompt) <= most]
        answers: list[list[tuple[int, ...]]] = [[] for _ in given]
        prompts = [given[k].prompt for k in fits]
        drawn = generate(self.language, params, prompts, count, sampling, rng) if fits else []
        for place, k in enumerate(fits):
            room = self.max_length - len(given[k].prompt)
            answers[k] = [answer[:room] for answer in drawn[place * count : (place + 1) * count]]
        return answers


def kept(pairs: Sequence[Example] | deque[Example]) -> Tensor:
    """Return pairs as whole numbers: of each its prompt's and answers' lengths, and the tokens."""
    numbers: list[int] = []
    for pair in pairs:
        parts = (pair.prompt, *pair.answers)
        numbers += [*map(len, parts), *(token for part in parts for token in part)]
    return torch.tensor(numbers, dtype=torch.int64)


def restored(numbers: Tensor | None) -> list[Example]:
    """Return the pairs that `kept` has written."""
    left, pairs = [] if numbers is None else numbers.tolist(), []
    place = 0
    while place < len(left):
        sizes, place = left[place : place + 3], place + 3
        parts = []
        for size in sizes:
            parts.append(tuple(left[place : place + size]))
            place += size
        pairs.append(Example(parts[0], (parts[1], parts[2])))
    return pairs
