"""Robust means of a round: weights are found from its first, and kept for those that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedpref.channel.robust import (
    ByNumber,
    ByWeights,
    Mean,
    Median,
    TrimmedMean,
    Trust,
    combined,
    cosines,
    gram_of,
    weights_of,
)
from fedpref.errors import UserError
from fedpref.numerics import trees
from fedpref.numerics.trees import BESIDE, Tree

Learn = Callable[[Sequence[str]], Tree]
"""(names of what clients train) -> the change of it that gold pairs teach."""


class RobustMeans:
    """Means of one line.

    Args:
        rule: What becomes of clients' values.
    """

    def __init__(self, rule: Mean | ByWeights | Trust | ByNumber) -> None:
        self._rule = rule
        self.begin()

    def begin(self) -> None:
        """Forget the weights of the round before."""
        self._weights: dict[int, float] = {}
        self._shares: Mapping[int, float] = {}
        self.agreement: dict[int, float] = {}
        """The cosine of each client's change to that on gold pairs, where there are such."""

    def mean(
        self, values: Mapping[int, Tree], shares: Mapping[int, float], learn: Learn | None = None
    ) -> Tree:
        """Return what the rule makes of values; those that are not finite are left out.

        Args:
            values: By client, in the clients' order.
            shares: Of the clients in a plain mean; they sum to one.
            learn: What gold pairs teach, where there are such; asked once a round.
        """
        known = {i: value for i, value in values.items() if trees.is_finite(value)}
        if 0 < len(known) < len(values):
            whole = sum(shares[i] for i in known)
            values, shares = known, {i: shares[i] / whole for i in known}
        found = None
        if learn is not None and self.agreement.keys() != values.keys():
            found = self._agree(values, shares, learn)
        if isinstance(self._rule, Median | TrimmedMean):
            return combined(self._rule, list(values.values()))
        if self._weights.keys() != values.keys():
            if isinstance(self._rule, Mean):
                found = [shares[client] for client in values]
            elif not isinstance(self._rule, Trust):
                found = weights_of(self._rule, values, shares).tolist()
            if found is None:
                raise ValueError("trust needs gold pairs")
            self._weights = dict(zip(values, found, strict=True))
            self._shares = dict(shares)
        whole = sum(self._weights.values())
        return trees.total(
            self._weighed(values[i], weight, weight / whole if whole else shares[i])
            for i, weight in self._weights.items()
        )

    @staticmethod
    def _weighed(value: Tree, weight: float, part: float) -> Tree:
        """Return a value times its weight; figures beside it are a mean's, of whole clients."""
        main, beside = trees.with_figures(value)
        return {**trees.scale(main, weight), **trees.scale(beside, part)}

    def _agree(
        self, values: Mapping[int, Tree], shares: Mapping[int, float], learn: Learn
    ) -> list[float] | None:
        """See how far clients agree with gold pairs; return the weights that come of it, if any."""
        names = sorted(name for name in next(iter(values.values())) if not name.startswith(BESIDE))
        gold = learn(names)
        if not trees.norm(gold):
            raise UserError("federation.gold: nothing is learned from the gold pairs.")
        gram = gram_of([*(trees.select(value, gold) for value in values.values()), gold])
        self.agreement = dict(zip(values, cosines(gram).tolist(), strict=True))
        if not isinstance(self._rule, Trust):
            return None
        found: list[float] = self._rule.weights(
            gram, np.array([shares[i] for i in values])
        ).tolist()
        return found

    @property
    def figures(self) -> dict[str, float]:
        """How much of clients' weight was kept in the round, and of whom least, where a rule gave
        weights; how far clients agree with gold pairs, on average and who least.
        """
        agreed = list(self.agreement.values())
        told = (
            {"gold/agreement": sum(agreed) / len(agreed), "gold/least": min(agreed)}
            if agreed
            else {}
        )
        if not self._weights or isinstance(self._rule, Mean):
            return told
        kept = [weight / self._shares[i] for i, weight in self._weights.items() if self._shares[i]]
        return {
            "combine/kept": sum(self._weights.values()),
            "combine/least_kept": min(kept),
            **told,
        }
