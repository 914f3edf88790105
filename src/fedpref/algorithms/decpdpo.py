"""Personalised decentralised DPO: each client's own parts, as FedPDPO has them, beside an adapter that neighbours mix. Ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref.aggregation import Aggregate, Factors
from fedpref.algorithms import decdpo
from fedpref.algorithms.decdpo import measured
from fedpref.algorithms.feddpo import no_moments
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.personalisation import Personal, begin
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """What nobody trains, each client's adapter, its own parts, and its optimiser moments."""

    fixed: Tree
    theta: PerClient[Tree]
    own: PerClient[Tree]
    moments: PerClient[Tree]


@work()
def train(
    client: Client, fixed: Tree, theta: Tree, own: Tree, moments: Tree, method: DecPDPO
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    return method.train(client, theta, fixed, own, moments)


@dataclass(frozen=True, kw_only=True)
class DecPDPO(Personal):
    """Every client trains an adapter and parts of its own, and takes the weighted mean of its neighbours' adapters and its own.

    Shared with neighbours: the adapter. Private: pairs, the vocabulary head, the reward head, the bottleneck, a second adapter,
    optimiser moments. Averaged: the shared adapter, as `aggregate` says, over the experiment's `network`. Own parts are trained as in
    FedPDPO, with which it agrees on the complete graph with uniform weights; without own parts it is DecDPO.
    """

    name: Literal["decpdpo"] = "decpdpo"
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    pooled: ClassVar[bool] = False
    gossips: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        own = fed.each(begin, self.parts)
        return State(self.aggregate.split(start)[1], fed.each(decdpo.begin, start, self.aggregate), own, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        before, own, moments, metrics = fed.each(train, state.fixed, state.theta, state.own, state.moments, self)
        theta = self.aggregate.mix(fed, before)
        new = State(state.fixed, state.theta | theta, state.own | own, state.moments | moments)
        return new, {**fed.report(metrics), **measured(fed, before, theta, self.aggregate)}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # a client that comes later has no neighbour to take an adapter from

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.fixed, state.theta, state.own)
