"""How evenly clients fare, with the luck of their few held-out examples taken into account."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpref.numerics.intervals import COVERAGE, Matrix

FEWEST = 3  # clients, below which nothing is said of how they differ
DRAWS = 4000
EVEN = 0.25  # prior odds that clients do not differ at all
GRID = 200  # standard deviations between clients that are tried


@dataclass(frozen=True)
class Fairness:
    """95 % intervals of how clients would fare on ever more examples.

    Attributes:
        worst: The worst client's value.
        worst_decile: The mean of the worst tenth's, one client at least.
        std: The standard deviation over clients.
        harmed: The share of clients whose value is below zero, where values are gains.
    """

    worst: tuple[float, float]
    worst_decile: tuple[float, float]
    std: tuple[float, float]
    harmed: tuple[float, float]


def fairness(
    values: Sequence[float], errors: Sequence[float], *, low_is_good: bool = False
) -> Fairness | None:
    """Return how clients fare, for they are measured on few examples each.

    The smallest of several noisy values is too small, and their spread too large. Values are taken
    as normal around each client's own, and these as normal around a common mean; all that is not
    known is drawn from its posterior under a flat prior on the mean, and on the standard deviation
    between clients one that is flat above zero (Gelman 2006; the model of Rubin 1981) with a part
    of its weight on zero. Clients' errors are taken as independent, though they may share prompts.
    By simulation such intervals hold what they are about as often as they say; see
    `benchmarks/coverage.py`.

    Args:
        values: Each client's, as measured.
        errors: Their standard errors.
        low_is_good: Whether the worst client is the one with the largest value.

    Returns:
        The intervals; None for fewer than three clients, or where a value or an error is not known.
    """
    y, squares = np.array(values, float), np.array(errors, float) ** 2
    is_known = np.all(squares > 0) and np.all(np.isfinite(squares)) and np.all(np.isfinite(y))
    if len(y) < FEWEST or not is_known:
        return None
    rng = np.random.default_rng(0)
    widest = 4 * max(float(y.std(ddof=1)), math.sqrt(float(squares.mean())))
    between = np.append(0.0, np.linspace(widest / GRID / 2, widest, GRID - 1))
    inverse = 1 / (squares + between[:, None] ** 2)  # [grid, clients]
    about = inverse.sum(1)
    means = (inverse * y).sum(1) / about
    fit = np.log(inverse).sum(1) - (inverse * (y - means[:, None]) ** 2).sum(1) - np.log(about)
    chances = np.exp((fit - fit.max()) / 2)
    chances[0] *= EVEN * (GRID - 1)
    drawn = rng.choice(GRID, size=DRAWS, p=chances / chances.sum())
    mean = means[drawn] + rng.normal(size=DRAWS) / np.sqrt(about[drawn])
    tau = between[drawn, None] ** 2
    share = tau / (tau + squares)  # of what is seen of a client that is its own
    own = mean[:, None] + share * (y - mean[:, None])
    own = own + rng.normal(size=own.shape) * np.sqrt(share * squares)
    ranked = np.sort(own if not low_is_good else -own, axis=1)
    sign = -1.0 if low_is_good else 1.0
    tenth = math.ceil(len(y) / 10)
    return Fairness(
        _bounds(sign * ranked[:, 0]),
        _bounds(sign * ranked[:, :tenth].mean(1)),
        _bounds(own.std(axis=1, ddof=1)),
        _bounds((ranked < 0).mean(1)),
    )


def _bounds(draws: Matrix) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
