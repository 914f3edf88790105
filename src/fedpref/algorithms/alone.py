"""A baseline without federation: each client trains alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments, own_copy
from fedpref.federation.local_training import LocalTraining, joining, train_locally
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics.trees import Tree


@dataclass(frozen=True)
class State:
    """Each client's adapter and optimiser moments."""

    theta: PerClient[Tree]
    moments: PerClient[Tree]


@work(
    "alone.train",
    sends=(),
    keeps={0: "theta", 1: "moments"},
    reads=("theta", "moments"),
)
def train(
    client: Client, theta: Tree, moments: Tree, local: LocalTraining
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Return the client's adapter, its optimiser moments, and metrics; nothing of it may leave."""
    return train_locally(client, theta, local, moments)


@dataclass(frozen=True, kw_only=True)
class Alone(Algorithm[State]):
    """Every client trains an adapter of its own on its own data; nothing is sent.

    Shared: nothing but the starting point. Private: everything. Averaged: nothing. A method that
    does no better than this gives a client no reason to take part.
    """

    name: Literal["alone"] = "alone"
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train, own_copy, no_moments)

    def init(self, fed: Federation, start: Tree) -> State:
        return State(fed.each(own_copy, start), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        theta, moments, metrics = fed.each(train, state.theta, state.moments, self.local)
        return State(state.theta | theta, state.moments | moments), fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        theta, _, _ = fed.each(train, state.theta, state.moments, joining(self.local, steps))
        return State(state.theta | theta, state.moments)

    def model(self, state: State) -> tuple[PerClient[Tree]]:
        return (state.theta,)
