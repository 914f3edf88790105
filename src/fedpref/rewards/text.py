"""Rewards that are read off the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedpref.errors import UserError
from fedpref.rewards.reward import OpenGroups, RewardFunction, RewardSettings, no_groups, plain
from fedpref.types import Count, Text


@dataclass(frozen=True, kw_only=True)
class Length(RewardSettings):
    """How near the number of words is to a target: 1 there, 0 for none or twice as many, down to
    -1.
    """

    name: Literal["length"] = "length"
    target: Count = 20
    """The number of words that gets the full reward."""

    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        return self

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any
    ) -> list[float]:
        counts = [len(plain(completion).split()) for completion in completions]
        return [max(-1.0, 1 - abs(count - self.target) / self.target) for count in counts]


@dataclass(frozen=True, kw_only=True)
class Distinct(RewardSettings):
    """The share of an answer's n-grams that are its first of their kind: 1 without repetition.

    An answer too short for any has 0.
    """

    name: Literal["distinct"] = "distinct"
    n: Count = 2
    """Words in an n-gram."""

    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        return self

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any
    ) -> list[float]:
        return [distinct(plain(completion), self.n) for completion in completions]


@dataclass(frozen=True, kw_only=True)
class Pattern(RewardSettings):
    """How often a regular expression is found in the answer, as a share of `most` places, 1 at
    most.
    """

    pattern: str
    """The regular expression."""
    name: Literal["pattern"] = "pattern"
    most: Count = 1
    """Places at which the reward is full."""
    negate: bool = False
    """Take one less the share."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"pattern {self.pattern!r} is no regular expression: {error}."
            ) from error

    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        return self

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any
    ) -> list[float]:
        shares = [
            min(len(re.findall(self.pattern, plain(completion))), self.most) / self.most
            for completion in completions
        ]
        return [1 - share if self.negate else share for share in shares]


def distinct(text: str, n: int) -> float:
    """Return the number of different n-grams of words as a share of all."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
