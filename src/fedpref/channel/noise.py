"""Gaussian noise on integers, drawn from a table, so that no bit of a float tells what it hides."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

REACH = 9.6  # standard deviations; what is beyond has a chance of 1e-21
BITS = 320  # of the arithmetic of a table
WORDS = 2  # 64-bit words of a draw
FIRST = 16  # bits of a word that mostly say its block
DISTANCE = 3e-16
"""How far a draw's distribution is from the exact one, at most (total variation), for standard
deviations from 2^12 to 2^18: bounds are rounded to 2^-64, of a draw's block and within it."""


class RoundedGaussian:
    """A normal variable of mean zero, rounded to whole numbers.

    Added to an integer it is the continuous one, added and then rounded, so that whatever is known
    of Gaussian noise holds of it.
    """

    is_rounded: ClassVar[bool] = True

    def __init__(self, deviation: int) -> None:
        self.deviation = deviation
        self._blocks, self._within, self._half = _table(deviation, self.is_rounded)
        # the first and the last block that words of each beginning may be in
        begins = np.arange(2**FIRST, dtype=np.uint64) << np.uint64(64 - FIRST)
        ends = begins + np.uint64(2 ** (64 - FIRST) - 1)
        self._low, self._high = (
            np.searchsorted(self._blocks, words, side="right") for words in (begins, ends)
        )

    def draw(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return a number for every two 64-bit words [2 n]: one finds a block, one a cell of it."""
        first, second = words[::WORDS], words[1::WORDS]
        # of 16 bits, which are sorted in two passes; there are a few thousand blocks
        blocks = self._block_of(first).astype(np.uint16)
        width = self._within.shape[1] + 1
        cells = np.empty(len(first), np.int64)
        order = np.argsort(blocks, kind="stable")
        ends = np.searchsorted(blocks[order], np.arange(len(self._within) + 1))
        for block in range(len(self._within)):
            here = order[ends[block] : ends[block + 1]]
            inside = np.searchsorted(self._within[block], second[here], side="right")
            cells[here] = block * width + inside
        return cells - self._half

    def _block_of(self, words: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the block of each word; few need more than a look at how it begins."""
        begun = words >> np.uint64(64 - FIRST)
        blocks: NDArray[np.int64] = self._low[begun]
        (open_ones,) = np.nonzero(blocks != self._high[begun])
        blocks[open_ones] = np.searchsorted(self._blocks, words[open_ones], side="right")
        return blocks

    @property
    def distance(self) -> float:
        """How far a draw's distribution is from the exact one, at most (total variation)."""
        bounds = len(self._within) + self._within.shape[1] + 1
        # what is beyond the table, and beyond the series' last term
        return float(bounds * 2.0**-64 + 1e-20 + 3e-5 / self.deviation**6)


class DiscreteGaussian(RoundedGaussian):
    """Whole numbers k with chances proportional to exp(-k^2 / (2 s^2)).

    Sums of them over senders, of whom nobody knows another's, are as good as a Gaussian's.
    Source: Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy".
    """

    is_rounded = False


@lru_cache(maxsize=8)
def _table(deviation: int, is_rounded: bool) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """Return bounds of blocks of cells, and of cells within each block, in units of 2^-64.

    Whole numbers alone, so that it is the same on every machine.

    Args:
        deviation: The standard deviation.
        is_rounded: Of a rounded normal variable, or of the discrete one.

    Returns:
        Bounds between blocks; bounds between cells of each block, a row a block; the number of the
        cell of zero.
    """
    half = math.ceil(REACH * deviation)
    width = math.isqrt(2 * half) + 1
    one = 1 << BITS
    # exp(-k^2 / (2 s^2)) by ratios: each is the one before times the same number
    step = _exp(1, deviation**2)
    ratio = _exp(1, 2 * deviation**2)
    density, chances = one, []
    for k in range(half + width + 1):
        # the density's integral over a cell, by its Taylor series around the middle: with
        # x = k / s and h = 1 / s, 1 + h^2 (x^2 - 1) / 24 + h^4 (x^4 - 6 x^2 + 3) / 1920
        s2 = deviation**2
        second = (k * k - s2) * one // (24 * s2 * s2)
        fourth = (k**4 - 6 * k * k * s2 + 3 * s2 * s2) * one // (1920 * s2**4)
        chances.append(density * (one + second + fourth) >> BITS if is_rounded else density)
        density = density * ratio >> BITS
        ratio = ratio * step >> BITS
    cells = [chances[abs(k)] for k in range(-half, half + 1)]
    cells += [0] * (-len(cells) % width)
    blocks = [cells[i : i + width] for i in range(0, len(cells), width)]
    within = np.array([_bounds(block) for block in blocks], np.uint64)
    return np.array(_bounds(list(map(sum, blocks))), np.uint64), within, half


def _exp(numerator: int, denominator: int) -> int:
    """Return exp(-numerator / denominator) in units of 2^-320, for small fractions."""
    term = total = 1 << BITS
    k = 0
    while term:
        k += 1
        term = term * numerator // (denominator * k)
        total += -term if k % 2 else term
    return total


def _bounds(chances: list[int]) -> list[int]:
    """Return cumulative chances in units of 2^-64, but for the last, which is all."""
    total, sums, bounds = sum(chances), 0, []
    for chance in chances[:-1]:
        sums += chance
        bounds.append(min((sums << 64) // total, 2**64 - 1) if total else 0)
    return bounds
