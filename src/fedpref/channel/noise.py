"""Gaussian noise on integers, drawn from a table, so that no bit of a float tells what it hides."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

REACH = 9.6  # standard deviations; what is beyond has a chance of 1e-21
EXACT = 1e-15  # relative error of a cell's probability, by its series


class RoundedGaussian:
    """A normal variable of mean zero, rounded to whole numbers.

    Added to an integer it is the continuous one, added and then rounded, so that whatever is known
    of Gaussian noise holds of it.
    """

    def __init__(self, deviation: int) -> None:
        self.deviation = deviation
        self._bounds, self._half = _table(deviation)

    def draw(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return a number for each 64-bit word [n]."""
        return np.searchsorted(self._bounds, words, side="right").astype(np.int64) - self._half

    @property
    def distance(self) -> float:
        """How far a draw's distribution is from the exact one, at most (total variation)."""
        return EXACT + len(self._bounds) * 2.0**-64 + 1e-20


@lru_cache(maxsize=4)
def _table(deviation: int) -> tuple[NDArray[np.uint64], int]:
    """Return cumulative probabilities, in units of 2^-64, and the number of the first cell."""
    half = math.ceil(REACH * deviation) + 1
    x = np.arange(-half, half + 1) / deviation
    h = 1 / deviation
    # the density's integral over a cell, by its Taylor series around the middle
    inside = 1 + h**2 * (x**2 - 1) / 24 + h**4 * (x**4 - 6 * x**2 + 3) / 1920
    chances = np.exp(-(x**2) / 2) * inside
    units = np.floor(chances / chances.sum() * 2.0**64).astype(np.uint64)
    units[half] += np.uint64((2**64 - int(sum(map(int, units)))) % 2**64)  # what rounding left
    return np.cumsum(units)[:-1], half
