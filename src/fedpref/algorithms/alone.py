"""A baseline without federation: each client trains alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments, own_copy
from fedpref.federation.local_training import LocalTraining, joining
from fedpref.federation.personal import Personal, begin
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.models.own_parts import NO_PARTS, Parts
from fedpref.numerics.trees import Tree


@dataclass(frozen=True)
class State:
    """Each client's adapter, its parts beside it, and its optimiser moments."""

    theta: PerClient[Tree]
    own: PerClient[Tree]
    moments: PerClient[Tree]


@work(
    "alone.train",
    sends=(),
    keeps={0: "theta", 1: "own", 2: "moments"},
    reads=("theta", "own", "moments"),
)
def train(
    client: Client, theta: Tree, own: Tree, moments: Tree, method: Alone
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the client's adapter, its parts, moments, and metrics; nothing of it may leave."""
    if method.only_parts:
        method = replace(method, phases="joint")  # there is no second one
        _, own, moments, metrics = method.train(client, {}, theta, own, moments)
        return theta, own, moments, metrics
    return method.train(client, theta, {}, own, moments)


@dataclass(frozen=True, kw_only=True)
class Alone(Personal, Algorithm[State]):
    """Every client trains an adapter of its own on its own data; nothing is sent.

    Shared: nothing but the starting point. Private: everything. Averaged: nothing. A method that
    does no better than this gives a client no reason to take part. With `parts` it has what a
    method with such parts has, but for the others.
    """

    name: Literal["alone"] = "alone"
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""
    parts: Parts = NO_PARTS
    """What of the model each client has beside its adapter; nothing by default."""
    phases: Literal["alternate", "joint"] = "joint"
    """Train the client's parts first and then its adapter, or everything in every step."""
    only_parts: bool = False
    """Train the parts alone; the adapter stays as it began."""

    sends_nothing = True
    works = (train, begin, own_copy, no_moments)

    def given(self, join_steps: int) -> tuple[Any, ...]:
        return (self._joining(join_steps), *super().given(join_steps))

    def init(self, fed: Federation, start: Tree) -> State:
        return State(fed.each(own_copy, start), fed.each(begin, self.parts), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        theta, own, moments, metrics = fed.each(train, state.theta, state.own, state.moments, self)
        new = State(state.theta | theta, state.own | own, state.moments | moments)
        return new, fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        theta, own, _, _ = fed.each(
            train, state.theta, state.own, state.moments, self._joining(steps)
        )
        return State(state.theta | theta, state.own | own, state.moments)

    def model(self, state: State) -> tuple[PerClient[Tree], PerClient[Tree]]:
        return (state.theta, state.own)

    def _joining(self, steps: int) -> Alone:
        return replace(self, local=joining(self.local, steps))
