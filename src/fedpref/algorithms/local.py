"""Each client alone: the line below which federation is worth nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.algorithms.feddpo import no_moments
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend, joining
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """Each client's adapter and optimiser moments."""

    theta: PerClient[Tree]
    moments: PerClient[Tree]


@work(sends=())
def begin(client: Client, start: Tree) -> Tree:
    return start


@work(sends=())
def train(client: Client, theta: Tree, moments: Tree, local: Descent) -> tuple[Tree, Tree, Mapping[str, float]]:
    return descend(client, theta, local, moments)


@dataclass(frozen=True, kw_only=True)
class Local:
    """Every client trains an adapter of its own on its own data; nothing is sent.

    Shared: nothing but the starting point. Private: everything. Averaged: nothing.
    """

    name: Literal["local"] = "local"
    local: Descent = Descent()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(fed.each(begin, start), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        theta, moments, metrics = fed.each(train, state.theta, state.moments, self.local)
        return State(state.theta | theta, state.moments | moments), fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        theta, _, _ = fed.each(train, state.theta, state.moments, joining(self.local, steps))
        return State(state.theta | theta, state.moments)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.theta,)
