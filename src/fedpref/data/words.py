"""What words alone say of two answers: counts and lengths, without a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import log, log1p, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data.preferences import Preference, Text

MOST = 4000  # words, the most frequent of the training side
SHORT = 3  # words of answers such as Yes and No, which mean what the prompt's words make of them
WORD = re.compile(r"\w+|[^\w\s]")


class Pair(NamedTuple):
    """Texts of a prompt, of the answer that is preferred, and of the other."""

    prompt: str
    chosen: str
    rejected: str

    @classmethod
    def of(cls, row: Preference) -> Pair:
        """Return the texts of a comparison, without roles."""
        return cls(*(contents(text) for text in (row.prompt, row.chosen, row.rejected)))


def contents(text: Text) -> str:
    """Return what a text says, of a conversation what its messages say, without roles."""
    if isinstance(text, str):
        return text
    return "\n".join(message.get("content") or "" for message in text)


def words(text: str) -> list[str]:
    """Return a text's words and marks, in lower case."""
    return WORD.findall(text.lower())


def longer(pair: Pair) -> float:
    """Return by how many characters the preferred answer is longer."""
    return float(len(pair.chosen) - len(pair.rejected))


def differences(
    train: Mapping[str, Sequence[Pair]], test: Mapping[str, Sequence[Pair]]
) -> dict[str, tuple[Float[Tensor, "n D"], Float[Tensor, "m D"]]]:
    """Return each client's training and held-out pairs as differences of features.

    Features are log(1 + count) of each word of all clients' training answers, the 4,000 most
    frequent that come twice, and the log of the length, in a unit in which its differences are as
    long as those of all words together; where answers have three words at most, also each word of
    the prompt together with the answer.

    Args:
        train: Training pairs, by client.
        test: Held-out pairs of the same clients.
    """
    counts: Counter[str] = Counter()
    for pairs in train.values():
        for pair in pairs:
            for answer in (pair.chosen, pair.rejected):
                counts.update(set(_features(pair.prompt, answer)))
    # a set's order is another one in each process
    frequent = sorted(counts.items(), key=lambda counted: (-counted[1], counted[0]))[:MOST]
    known = {word: k for k, (word, n) in enumerate(frequent) if n > 1}

    def matrix(pairs: Sequence[Pair]) -> Float[Tensor, "n D"]:
        found = torch.zeros(len(pairs), len(known) + 1)
        for row, pair in zip(found, pairs, strict=True):
            for sign, answer in ((1, pair.chosen), (-1, pair.rejected)):
                for word, n in _features(pair.prompt, answer).items():
                    if word in known:
                        row[known[word]] += sign * log1p(n)
                row[-1] += sign * log(1 + len(answer))
        return found

    found = {name: (matrix(train[name]), matrix(test[name])) for name in train}
    # a penalty on the length would else be that on one word of thousands, and longer is better or
    # worse in most sets
    squares = [x.square() for x, _ in found.values()]
    of_words, of_length = (
        sum(float(some) for some in parts)
        for parts in ([x[:, :-1].sum() for x in squares], [x[:, -1].sum() for x in squares])
    )
    if of_length > 0:
        for some in found.values():
            for rows in some:
                rows[:, -1] *= sqrt(of_words / of_length)
    return found


def _features(prompt: str, answer: str) -> Counter[str]:
    found = Counter(said := words(answer))
    if len(said) <= SHORT:
        found.update(f"{word} | {' '.join(said)}" for word in set(words(prompt)))
    return found
