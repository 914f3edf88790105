"""The network of a decentralised run: its graph in each round, with the links that fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedpref.channel import Chain, Compression
from fedpref.errors import UserError
from fedpref.numerics import seeds
from fedpref.numerics.topology import (
    AnyTopology,
    ErdosRenyi,
    Matrix,
    Names,
    OnePeerExponential,
    Shape,
    Weights,
    links,
    mixing,
    refuse_disconnected,
    without,
)
from fedpref.types import Fraction, OpenFraction


@dataclass(frozen=True)
class Network:
    """Who hears whom, how much each takes of what it hears, and how often a link fails."""

    topology: AnyTopology = Shape()
    """The graph of who hears whom."""
    weights: Weights = "metropolis"
    """How much a client takes of what it hears."""
    compression: Compression | None = None
    """How what neighbours tell one another is compressed; null sends it whole."""
    link_failure: Fraction = 0.0
    """The chance of each link to fail in each round."""
    distrust: OpenFraction | None = None
    """The share of its neighbours' weight that a client takes for hostile: what those say who are
    farthest off is shortened (ClippedGossip). Null hears all as they are."""

    def check(
        self, names: Names, taking_part: Sequence[int] | None = None, everybody: bool = True
    ) -> None:
        """Check the topology against the clients.

        Args:
            names: The clients'.
            taking_part: Those who ever take part; None for all.
            everybody: Whether all of them are in each round.

        Raises:
            UserError: It does not fit the clients, or does not connect those who ever take part.
        """
        apart = set(range(len(names))) - set(
            range(len(names)) if taking_part is None else taking_part
        )
        turn = range(len(names)) if isinstance(self.topology, OnePeerExponential) else range(1)
        graphs = [self.topology.graph(names, round) for round in turn]
        if self._redraws and self.weights == "uniform":
            raise UserError(
                "network.weights: uniform needs as many neighbours for everybody, which a graph "
                "that is drawn anew has by chance. Take metropolis."
            )
        mixed = mixing(graphs[0], self.weights, names)
        if self.link_failure or apart or not everybody:
            without(mixed, [])
        # a graph that is drawn anew connects everybody sooner or later
        if not self._redraws:
            refuse_disconnected(graphs, names, apart)

    @property
    def is_fixed(self) -> bool:
        """Whether the mixing matrix is the same in every round, if everybody takes part."""
        return (
            not self.link_failure
            and not isinstance(self.topology, OnePeerExponential)
            and not self._redraws
        )

    @property
    def _redraws(self) -> bool:
        return isinstance(self.topology, ErdosRenyi) and self.topology.redraw

    @property
    def links(self) -> Chain:
        """The stages on a message's way to a neighbour."""
        return Chain((self.compression.stage(),) if self.compression else ())

    def matrix(self, names: Names, seed: int, round: int, active: Sequence[int]) -> Matrix:
        """Return the mixing matrix of a round [N, N].

        Nobody hears or is heard by clients that take no part, nor over links that fail.
        """
        whole = mixing(self.topology.graph(names, round), self.weights, names)
        absent = set(range(len(names))) - set(active)
        there = list(links(whole))
        fates = torch.rand(
            len(there), generator=seeds.generator(seed, "links", round=round)
        ).tolist()
        broken = [
            link
            for link, fate in zip(there, fates, strict=True)
            if fate < self.link_failure or absent.intersection(link)
        ]
        return without(whole, broken) if broken else whole
