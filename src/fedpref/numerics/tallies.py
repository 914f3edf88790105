"""What figures of many clients come to, from sums alone, in which nobody's own can be read.

A figure's sums are whole numbers, so that they may go under masks and have noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedpref.numerics.metrics import ACCURACY, ALIGNMENT, COMBINED
from fedpref.numerics.trees import Tree

POINT = 20  # bits behind the binary point
WORDS, BITS = 4, 16  # a number's parts, least first; sums of sixteen bits stay within 32
LARGEST = 2.0**44  # of one number
BINS = 10
SHARES = frozenset({ACCURACY, ALIGNMENT, COMBINED})  # figures from 0 to 1, of which bins are told
SUMS = 5  # count, sum, squares, weights, weighted sum


@dataclass(frozen=True)
class Figure:
    """One figure over clients.

    Attributes:
        count: How many clients have it.
        total: Its sum.
        squares: The sum of its squares.
        weight: The sum of clients' weights.
        weighted: Its sum, each times the client's weight.
        bins: How many clients have 0 to 0.1 of it, and so on; zeros for figures that are no shares.
    """

    count: float
    total: float
    squares: float
    weight: float
    weighted: float
    bins: tuple[float, ...]
    noise: float = 0.0
    """The standard deviation of the noise in its mean."""

    def summary(self) -> dict[str, float]:
        """Return `mean`, `weighted_mean` and `std` as `over_clients` has them, or `noise`."""
        mean = self.total / self.count
        if self.noise:
            return {"mean": mean, "noise": self.noise}
        spread = max(0.0, self.squares - self.total * mean) / max(1.0, self.count - 1)
        weighted = self.weighted / self.weight if self.weight else mean
        return {"mean": mean, "weighted_mean": weighted, "std": math.sqrt(spread)}


def tally(rows: Sequence[Mapping[str, float]], weights: Sequence[float]) -> Tree:
    """Return the sums of clients' figures, by name, as integers [sums and bins, words].

    A figure that is not finite, or beyond what can be summed, counts as none: who stopped for it
    would tell whose it is.

    Args:
        rows: Of each client, by name.
        weights: Of each client.
    """
    sums: dict[str, list[int]] = {}
    for row, weight in zip(rows, weights, strict=True):
        for name, value in row.items():
            # of counts the sum alone is read
            more = [] if name.startswith("num_") else [value**2, weight, weight * value]
            numbers = [1.0, value, *more]
            found = sums.setdefault(name, [0] * (SUMS + BINS))
            if not all(abs(number) < LARGEST for number in numbers):
                continue
            for k, number in enumerate(numbers):
                found[k] += round(number * 2**POINT)
            if name in SHARES:
                found[SUMS + bin_of(value)] += 1 << POINT
    return {name: torch.tensor([_words(number) for number in some]) for name, some in sums.items()}


def bin_of(value: float) -> int:
    """Return which of ten bins from 0 to 1 a share is in."""
    return min(max(int(value * BINS), 0), BINS - 1)


def read(total: Tree) -> dict[str, Figure]:
    """Return what sums of tallies say, by name; what is of no client is left out."""
    found = {}
    for name, words in total.items():
        weights = [1 << (BITS * k) for k in range(WORDS)]
        rows = [sum(w * x for w, x in zip(weights, row, strict=True)) for row in words.tolist()]
        numbers = [number / 2**POINT for number in rows]
        if numbers[0] > 0:
            count, summed, squares, weight, weighted, *bins = numbers
            found[name] = Figure(count, summed, squares, weight, weighted, tuple(bins))
    return found


def _words(number: int) -> list[int]:
    """Return a number's parts of sixteen bits, of which the last has the sign."""
    low = [number >> (BITS * k) & (1 << BITS) - 1 for k in range(WORDS - 1)]
    return [*low, number >> (BITS * (WORDS - 1))]
