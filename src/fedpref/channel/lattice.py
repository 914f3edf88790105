"""Sums of integers: what each sender may add is bounded, and the order of adding is nothing.

Source: Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation", for rounding with a bounded norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedpref.numerics.trees import Tree

TRIES = 16
FINE = 0.01  # how much longer rounding may make a vector
COARSE = 0.25  # how much longer rounding may make a sum, if there is no finer lattice
DEVIATIONS = tuple(2**power for power in (12, 14, 16, 18))  # of noise, in units of the lattice


POINT = 24  # bits behind the binary point of numbers that are summed as integers
LARGEST = 64.0  # of such a number, in size: sums of shares of them stay within 32 bits


def fixed(tree: Tree) -> Tree:
    """Return numbers as integers with 24 bits behind the binary point, each the nearest.

    Raises:
        ValueError: One is too large, or none.
    """
    for name, tensor in tree.items():
        if tensor.numel() and not float(tensor.abs().max()) <= LARGEST:
            raise ValueError(f"{name!r} holds a number beyond {LARGEST:g}, or none")
    return {name: (one.double() * 2**POINT).round().int() for name, one in tree.items()}


def unfixed(total: Tree, divisor: float = 1.0) -> Tree:
    """Return the numbers that a sum of such integers stands for, divided."""
    return {name: (one.double() / (2**POINT * divisor)).float() for name, one in total.items()}


@dataclass(frozen=True)
class Lattice:
    """Multiples of a unit, and the norm that a rounded vector keeps to.

    Attributes:
        clip: The largest norm of a vector before it is rounded.
        unit: The distance of neighbours.
        most: The largest norm of a rounded vector, in units.
        deviation: The standard deviation of the noise, in units.
    """

    clip: float
    unit: float
    most: float
    deviation: int

    @staticmethod
    def of(clip: float, noise_multiplier: float, dimensions: int) -> Lattice:
        """Return the coarsest lattice that is fine enough.

        Args:
            clip: The largest norm of a vector.
            noise_multiplier: The noise's standard deviation, in the rounded vector's largest norms.
            dimensions: Of a vector.

        Raises:
            ValueError: There is none.
        """
        for deviation in DEVIATIONS:
            most = deviation / noise_multiplier
            # most^2 = c^2 + d / 4 + c + sqrt(d) / 2, c the clip in units (their Proposition 22 with
            # a chance of exp(-1/2))
            room = most**2 - dimensions / 4 - math.sqrt(dimensions) / 2
            if room > 1 and (fit := (math.sqrt(1 + 4 * room) - 1) / 2) > most / (1 + FINE):
                return Lattice(clip, clip / fit, most, deviation)
        raise ValueError(_too_coarse(dimensions, noise_multiplier))

    @staticmethod
    def of_sums(clip: float, noise_multiplier: float, dimensions: int) -> Lattice:
        """Return a lattice for a sum of clipped vectors that is rounded once.

        Of two sums that differ by a vector, the rounded ones differ by its length and the rounding
        of both.

        Args:
            clip: The largest norm of a vector.
            noise_multiplier: The noise's standard deviation, in what a vector can change at most.
            dimensions: Of the sum.

        Raises:
            ValueError: There is none.
        """
        # half a unit a number, twice; and what floating point makes of a clipped norm
        apart = math.sqrt(dimensions) + 2
        fits = ((deviation, deviation / noise_multiplier) for deviation in DEVIATIONS)
        best = [(deviation, most) for deviation, most in fits if apart <= COARSE * most]
        if not best:
            raise ValueError(_too_coarse(dimensions, noise_multiplier))
        fine = [one for one in best if apart <= FINE * one[1]]
        deviation, most = fine[0] if fine else best[-1]
        return Lattice(clip, clip / (most - apart), most, deviation)

    def round(self, total: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return a sum as integers, each the nearest."""
        return (total.double() / self.unit).round().long()

    def encode(self, tree: Tree, rng: torch.Generator) -> Tree:
        """Return a tree clipped and rounded at random, as integers.

        A vector that comes out too long is rounded anew; after 16 tries towards zero. One that is
        not finite is nothing: whoever stopped for it would tell that somebody sent it.
        """
        names = sorted(tree)
        flat = torch.cat([tree[name].detach().flatten().double() for name in names])
        length = float(flat.norm())
        if not math.isfinite(length):
            flat, length = torch.zeros_like(flat), 0.0
        scaled = flat * (min(1.0, self.clip / length) if length else 0.0) / self.unit
        rounded = self._rounded(scaled, rng)
        parts = rounded.int().split([tree[name].numel() for name in names])
        return {name: part.view(tree[name].shape) for name, part in zip(names, parts, strict=True)}

    def _rounded(self, scaled: Float[Tensor, " n"], rng: torch.Generator) -> Int[Tensor, " n"]:
        for _ in range(TRIES):
            chance = torch.rand(len(scaled), generator=rng, dtype=torch.float64)
            rounded = (scaled + chance).floor()
            if float(rounded.norm()) <= self.most:
                return rounded.long()
        return scaled.trunc().long()

    def decode(self, total: Tree, noise: Int[Tensor, " n"], expected: float) -> Tree:
        """Return the mean that a sum of integers stands for, with noise.

        Args:
            total: The sum, of trees that `encode` made.
            noise: On each number, in the order of sorted names [n].
            expected: What the sum is divided by, whoever came.
        """
        names = sorted(total)
        flat = torch.cat([total[name].flatten().long() for name in names]) + noise
        mean = (flat.double() * (self.unit / expected)).float()
        parts = mean.split([total[name].numel() for name in names])
        return {name: part.view(total[name].shape) for name, part in zip(names, parts, strict=True)}


def _too_coarse(dimensions: int, noise_multiplier: float) -> str:
    return (
        f"no lattice is fine enough for {dimensions:,} numbers under noise of "
        f"{noise_multiplier:g} clips"
    )
