"""A lower bound of epsilon from what came out, to hold beside the accountant's.

Source: Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedpref.numerics.trees import Tree

CONFIDENCE = 0.95
GUESSES = (20, 50, 100, 200, 400)
HIGHEST = 20.0  # epsilon
Release = Callable[[int, Sequence[tuple[int, Tree]]], Tree]
"""(round, clients that came and their changes) -> the sum, or a mean, that is released."""


@dataclass(frozen=True)
class Bound:
    """What an attacker could show.

    Attributes:
        epsilon: The lower bound, at 95 % confidence.
        guesses: How many guesses of who was there it rests on.
        right: How many of them were right.
    """

    epsilon: float
    guesses: int
    right: int


def highest(canaries: int, delta: float) -> float:
    """Return the bound of an attacker who is always right: no audit of so many can show more."""
    was_in = np.arange(canaries) % 2 == 0
    return lower_bound(was_in.astype(float), was_in, delta).epsilon


def lower_bound(scores: NDArray[np.float64], was_in: NDArray[np.bool_], delta: float) -> Bound:
    """Return the bound from canaries' scores, the best of a few numbers of guesses.

    Args:
        scores: Of each canary, high where it seems to have been there [m].
        was_in: Whether it was, by a coin of its own [m].
        delta: Of the guarantee.
    """
    count = len(scores)
    order = np.argsort(-scores)
    numbers = sorted({number for number in (*GUESSES, count) if number <= count})
    found = Bound(0.0, 0, 0)
    for number in numbers:
        half = number // 2
        right = int(was_in[order[:half]].sum() + (~was_in[order[-half:]]).sum())
        # each number of guesses is a look of its own
        chance = (1 - CONFIDENCE) / len(numbers)
        if (epsilon := _shown(count, 2 * half, right, delta, chance)) > found.epsilon:
            found = Bound(epsilon, 2 * half, right)
    return found


def _shown(count: int, guesses: int, right: int, delta: float, chance: float) -> float:
    """Return the largest epsilon under which so many right guesses are unlikely."""
    if _p_value(count, guesses, right, 0.0, delta) > chance:
        return 0.0
    low, high = 0.0, HIGHEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if _p_value(count, guesses, right, middle, delta) <= chance
            else (low, middle)
        )
    return low


def _p_value(count: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return how likely so many right guesses are at most, under a guarantee; their appendix D."""
    share = 1 / (1 + math.exp(-epsilon))
    chances = _binomial(guesses, share)
    more = float(chances[right:].sum())
    worst = running = 0.0
    for k in range(1, right + 1):
        running += float(chances[right - k])
        worst = max(worst, running / k)
    return min(1.0, more + worst * delta * 2 * count)


def _binomial(count: int, share: float) -> NDArray[np.float64]:
    """Return the chances of 0 to `count` successes."""
    logs = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    k = np.arange(count + 1)
    with np.errstate(divide="ignore"):
        odds = k * math.log(share) + (count - k) * math.log1p(-share)
    chances: NDArray[np.float64] = np.exp(logs[count] - logs - logs[::-1] + odds)
    return chances


def evidence(
    inner: NDArray[np.float64], squared: NDArray[np.float64], chance: float, deviation: float
) -> NDArray[np.float64]:
    """Return how much a noisy sum speaks for each canary's being in the run, a log-likelihood
    ratio.

    Args:
        inner: Inner products of canaries with the sum, less what others have added to it [m].
        squared: Their squared lengths [m].
        chance: Of a canary that is in the run to be in the sum.
        deviation: The standard deviation of the noise.
    """
    power = (inner - squared / 2) / deviation**2
    if chance == 1:
        return power
    power = np.minimum(power, 700.0)  # beyond that exp overflows
    told: NDArray[np.float64] = np.log1p(chance * np.expm1(power))
    return told


def audit_sums(
    release: Release,
    *,
    canaries: int,
    dimensions: int,
    rounds: int,
    clip: float,
    delta: float,
    seed: int = 0,
    length: float = 1.0,
    chance: float = 1.0,
    deviation: float = 1.0,
    cohort: Callable[[Sequence[int], int], Sequence[int]] | None = None,
) -> Bound:
    """Audit a way of summing by clients whose changes are random directions.

    A canary is in the whole run with a chance of a half, and then in every round's sum that it is
    drawn for; its score is what all that was released speaks for it.

    Args:
        release: The whole way of a sum: clip, lattice, noise; it returns the sum.
        canaries: How many.
        dimensions: Of a change; well above the number of canaries, so that they hardly meet.
        rounds: How many sums are released.
        clip: The largest norm that a change is allowed.
        delta: Of the guarantee.
        seed: Of canaries, coins and directions.
        length: Of a change before it is clipped, in clips.
        chance: Of a canary to be drawn for a round.
        deviation: The standard deviation of the noise.
        cohort: Draws a round's clients of those that are in the run; by default all.
    """
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(canaries, dimensions)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    was_in = rng.random(canaries) < 0.5
    inside = np.flatnonzero(was_in).tolist()
    scores, squared = np.zeros(canaries), np.full(canaries, clip**2)
    for round in range(rounds):
        drawn = inside if cohort is None else cohort(inside, round)
        present = [(i, {"change": torch.from_numpy(clip * length * directions[i])}) for i in drawn]
        total = release(round, present)["change"].double().numpy()
        inner = clip * (directions @ total)
        scores += evidence(inner, squared, chance, deviation)
    return lower_bound(scores, was_in, delta)
