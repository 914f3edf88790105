"""Means that a few clients cannot carry away: weights on clients from how their values lie.

Most rules need the values' inner products alone (a Gram matrix), and are weights that hold for
all means of a round; the median and the trimmed mean look at each number by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedpref.numerics.trees import BESIDE, Tree

Gram = Float[np.ndarray, "n n"]
Shares = Float[np.ndarray, " n"]
TINY = 1e-300  # what nothing is divided by
FAR = 100.0  # times the length that half of the weight is below
TURNS, NEAR = 200, 1e-9  # of the search for a geometric median, and how near it comes


@dataclass(frozen=True)
class Mean:
    """The weighted mean, which one client can carry anywhere."""

    name: Literal["mean"] = "mean"


@dataclass(frozen=True)
class NormBound:
    """The mean of values that are shortened to a quantile of their norms.

    It costs next to nothing without an attack, and bounds what anybody can do in a round; whoever
    pushes the same way in each is not stopped.
    """

    name: Literal["norm-bound"] = "norm-bound"
    quantile: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The quantile of clients' norms that longer values are shortened to."""
    is_of_changes: ClassVar[bool] = True

    def weights(self, gram: Gram, shares: Shares) -> Shares:
        """Return each value's weight; together they are less than one where some are shortened."""
        norms = np.sqrt(np.diag(gram))
        bound = float(np.quantile(norms, self.quantile))
        return shares * np.minimum(1, bound / np.maximum(norms, TINY))


@dataclass(frozen=True)
class GeometricMedian:
    """The point whose weighted distances to all values are least (Pillutla et al. 2022, "RFA").

    It holds while less than half of the weight is hostile. Values of more than a hundred times the
    length that half of the weight does not pass are shortened to that before, so that what a value
    can do is bounded, however long it is.
    """

    name: Literal["geometric-median"] = "geometric-median"
    is_of_changes: ClassVar[bool] = False

    def weights(self, gram: Gram, shares: Shares) -> Shares:
        """Return each value's weight in that point, by Weiszfeld's iteration."""
        found: Shares = shares / shares.sum()
        lengths = np.sqrt(np.diag(gram))
        middle = _median(lengths, found)
        shortened = np.minimum(1, FAR * middle / np.maximum(lengths, TINY))
        gram = shortened[:, None] * gram * shortened
        norms = np.diag(gram)
        least = NEAR * float(np.sqrt(norms.max())) + TINY
        for _ in range(TURNS):
            inner = gram @ found
            squares = norms - 2 * inner + float(found @ inner)
            new: Shares = shares / np.maximum(np.sqrt(np.maximum(squares, 0)), least)
            new /= new.sum()
            moved, found = float(np.abs(new - found).max()), new
            if moved < NEAR:
                break
        weights: Shares = found * shortened
        return weights


def _median(values: Shares, shares: Shares) -> float:
    """Return the least value that, with smaller ones, has half of the weight."""
    order = np.argsort(values, kind="stable")
    half = int(np.searchsorted(np.cumsum(shares[order]), 0.5 - 1e-12))
    return float(values[order][half])


@dataclass(frozen=True)
class MultiKrum:
    """The mean of those whose values lie nearest to one another (Blanchard et al. 2017).

    It is strong against flips and scaling, and silences honest minorities: they lie apart too.
    """

    name: Literal["multi-krum"] = "multi-krum"
    hostile: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """The share of clients that may be hostile, and is left out."""
    is_of_changes: ClassVar[bool] = False

    def weights(self, gram: Gram, shares: Shares) -> Shares:
        """Return each value's weight: its share among those that are kept, or nothing."""
        count, bad = len(gram), int(self.hostile * len(gram) + 1e-9)
        norms = np.diag(gram)
        apart = np.sort(norms[:, None] + norms[None] - 2 * gram, axis=1)
        scores = apart[:, 1 : max(2, count - bad - 1)].sum(1)
        kept = np.zeros(count)
        kept[np.argsort(scores, kind="stable")[: count - bad]] = 1
        found: Shares = shares * kept / (shares @ kept)
        return found


@dataclass(frozen=True)
class Trust:
    """The mean of changes as long as that on gold pairs, weighed by how far they agree with it.

    What points away from it counts for nothing (Cao et al. 2021, "FLTrust"). It is as good as the
    gold pairs: of what they do not ask, whoever differs is as welcome as whoever lies.
    """

    name: Literal["trust"] = "trust"
    is_of_changes: ClassVar[bool] = True

    def weights(self, gram: Gram, shares: Shares) -> Shares:
        """Return each value's weight, all zero where nobody agrees.

        Args:
            gram: Inner products of values; in the last place is the change on gold pairs.
            shares: Of the clients in a plain mean.
        """
        trusted: Shares = shares * np.maximum(cosines(gram), 0)
        norms = np.sqrt(np.diag(gram))
        together = trusted.sum()
        if together == 0:
            return np.zeros_like(trusted)
        found: Shares = trusted / together * norms[-1] / np.maximum(norms[:-1], TINY)
        return found


def cosines(gram: Gram) -> Shares:
    """Return the cosine of each value to the last one; of nothing it is 0."""
    norms = np.sqrt(np.diag(gram))
    found: Shares = gram[:-1, -1] / np.maximum(norms[:-1] * norms[-1], TINY)
    return found


@dataclass(frozen=True)
class Median:
    """The median of each number by itself (Yin et al. 2018); clients weigh alike."""

    name: Literal["median"] = "median"

    def combined(self, values: Tensor) -> Tensor:
        """Return the median of each number over the first dimension."""
        # between the middle two of an even number
        found: Tensor = values.double().quantile(0.5, dim=0).to(values.dtype)
        return found


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of each number without the largest and the smallest (Yin et al. 2018)."""

    name: Literal["trimmed"] = "trimmed"
    hostile: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """The share of clients that is left out at either end."""

    def combined(self, values: Tensor) -> Tensor:
        """Return the trimmed mean of each number over the first dimension."""
        cut = int(self.hostile * len(values) + 1e-9)
        return values.sort(0).values[cut : len(values) - cut].mean(0)


Combine = Annotated[
    Mean | NormBound | GeometricMedian | Median | TrimmedMean | MultiKrum | Trust,
    Field(discriminator="name"),
]
ByWeights = NormBound | GeometricMedian | MultiKrum
ByNumber = Median | TrimmedMean


def gram_of(values: Sequence[Tree]) -> Gram:
    """Return the inner products of values, all names together.

    Figures that travel beside a value weigh nothing.
    """
    gram = np.zeros((len(values), len(values)))
    for name in sorted(values[0]):
        if not name.startswith(BESIDE):
            rows = torch.stack([value[name].flatten() for value in values]).double()
            gram += (rows @ rows.T).numpy()
    return gram


def combined(rule: ByNumber, values: Sequence[Tree]) -> Tree:
    """Return what a rule of single numbers makes of values, name by name."""
    names = values[0]
    return {name: rule.combined(torch.stack([value[name] for value in values])) for name in names}


def weights_of(rule: ByWeights, values: Mapping[int, Tree], shares: Mapping[int, float]) -> Shares:
    """Return the weights that a rule gives to clients' values, in their order.

    Args:
        rule: The rule.
        values: By client.
        shares: Of the clients in a plain mean; they sum to one.
    """
    gram = gram_of(list(values.values()))
    return rule.weights(gram, np.array([shares[client] for client in values]))


def clipped_gossip(value: Tree, heard: Sequence[tuple[Tree, float]], hostile: float) -> Tree:
    """Return a client's value mixed with what it hears, none of which pulls farther than most.

    Each message's distance is shortened to the smallest radius beyond which messages have so much
    of the weight at most as may be hostile. Source: He, Karimireddy and Jaggi
    2022, "Byzantine-Robust Decentralized Learning via ClippedGossip"; the radius by weight alone is
    ours.

    Args:
        value: The client's own.
        heard: What it hears, with weights; its own message may be among them.
        hostile: The weight that may be hostile.
    """
    apart = [{name: tree[name] - tensor for name, tensor in value.items()} for tree, _ in heard]
    lengths = [
        float(torch.stack([one.double().square().sum() for one in tree.values()]).sum().sqrt())
        for tree in apart
    ]
    lengths = [length if math.isfinite(length) else math.inf for length in lengths]
    outside, radius, most = 0.0, 0.0, hostile + 1e-12
    for length, weight in sorted(
        ((length, weight) for length, (_, weight) in zip(lengths, heard, strict=True)),
        reverse=True,
    ):
        radius, outside = length, outside + weight
        if outside > most:  # it and all that are nearer stay as they are
            break
    mixed = dict(value)
    for tree, length, (_, weight) in zip(apart, lengths, heard, strict=True):
        if not math.isfinite(length):  # shortened to nothing
            continue
        factor = weight * min(1.0, radius / length if length else 1.0)
        for name, tensor in tree.items():
            mixed[name] = mixed[name] + factor * tensor
    return mixed
