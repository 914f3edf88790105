"""How a shipped client would like an answer: its taste, over styles that are read off the text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from fedpref.data.words import words
from fedpref.errors import UserError
from fedpref.rewards.reward import OpenGroups, RewardFunction, RewardSettings, no_groups, plain
from fedpref.types import Text

STYLES = ("thorough", "warm", "bold", "formal")
FILE = "builtin/styles.npz"


@dataclass(frozen=True, kw_only=True)
class Taste(RewardSettings):
    """How a client of the shipped set would like an answer, from -1 to 1.

    The client's taste is known: a weight for each of four styles (thorough, warm, bold, formal).
    How far an answer has each is judged by a logistic regression on words, fitted to the labels of
    the shipped training answers; see `scripts/styles.py`.
    """

    name: Literal["taste"] = "taste"

    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        tastes = _tastes()
        judge = Styles()

        def reward(
            prompts: Sequence[Text],
            completions: Sequence[Text],
            client: Sequence[str | None] = (),
            **_: Any,
        ) -> list[float]:
            if not client or (unknown := sorted({str(c) for c in client if c not in tastes})):
                raise UserError(
                    "the reward 'taste' is about the clients of the shipped set, in a column "
                    f"`client`; {unknown[0] if client else 'a row without one'} is none of them."
                )
            return [
                float(judge(plain(completion)) @ tastes[str(who)] / np.abs(tastes[str(who)]).sum())
                for completion, who in zip(completions, client, strict=True)
            ]

        return reward


class Styles:
    """A classifier of the four styles of an answer."""

    def __init__(self) -> None:
        with (files("fedpref.rewards") / FILE).open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            self._vocabulary = {str(gram): k for k, gram in enumerate(arrays["grams"])}
            self._weights = arrays["weights"].astype(float)
            self._intercepts = arrays["intercepts"].astype(float)

    def __call__(self, text: str) -> Any:
        """Return how far a text has each style [4]: twice its probability less one."""
        margins = self._weights @ features(text, self._vocabulary) + self._intercepts
        return np.tanh(margins / 2)


def grams(text: str) -> list[str]:
    """Return a text's words and pairs of words."""
    single = words(text)
    return [*single, *(f"{a} {b}" for a, b in pairwise(single))]


def features(text: str, vocabulary: Mapping[str, int]) -> Any:
    """Return log counts of known words and pairs, and the log of the number of words."""
    counts = Counter(gram for gram in grams(text) if gram in vocabulary)
    row = np.zeros(len(vocabulary) + 1)
    for gram, count in counts.items():
        row[vocabulary[gram]] = math.log1p(count)
    row[-1] = math.log1p(len(text.split()))
    return row


def _tastes() -> dict[str, Any]:
    text = (files("fedpref.data") / "builtin" / "population.json").read_text(encoding="utf-8")
    return {
        name: np.array([one["taste"][style] for style in STYLES])
        for name, one in json.loads(text).items()
    }
