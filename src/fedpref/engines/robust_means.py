"""Robust means of a round: weights are found from its first, and kept for those that follow."""

from __future__ import annotations

from collections.abc import Mapping

from fedpref.channel.robust import ByNumber, ByWeights, Median, TrimmedMean, combined, weights_of
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree


class RobustMeans:
    """Means of one line.

    Args:
        rule: What becomes of clients' values.
    """

    def __init__(self, rule: ByWeights | ByNumber) -> None:
        self._rule = rule
        self.begin()

    def begin(self) -> None:
        """Forget the weights of the round before."""
        self._weights: dict[int, float] = {}
        self._shares: Mapping[int, float] = {}

    def mean(self, values: Mapping[int, Tree], shares: Mapping[int, float]) -> Tree:
        """Return what the rule makes of values.

        Args:
            values: By client, in the clients' order.
            shares: Of the clients in a plain mean; they sum to one.
        """
        if isinstance(self._rule, Median | TrimmedMean):
            return combined(self._rule, list(values.values()))
        if self._weights.keys() != values.keys():
            found = weights_of(self._rule, values, shares).tolist()
            self._weights = dict(zip(values, found, strict=True))
            self._shares = dict(shares)
        return trees.total(trees.scale(values[i], weight) for i, weight in self._weights.items())

    @property
    def figures(self) -> dict[str, float]:
        """How much of clients' weight was kept in the round, and of whom least; nothing where
        clients have no weights.
        """
        if not self._weights:
            return {}
        kept = [weight / self._shares[i] for i, weight in self._weights.items() if self._shares[i]]
        return {"combine/kept": sum(self._weights.values()), "combine/least_kept": min(kept)}
