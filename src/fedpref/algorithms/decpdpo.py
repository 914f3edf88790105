"""Personalised decentralised DPO: FedPDPO's own parts beside an adapter that is mixed. Ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.algorithms.decdpo import begin as begin_adapter
from fedpref.federation import aggregation
from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments
from fedpref.federation.consensus import consensus_metrics, projected
from fedpref.federation.personal import Personal, begin
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics.trees import Tree


@dataclass(frozen=True)
class State:
    """What nobody trains, each client's adapter, its own parts, and its optimiser moments."""

    fixed: Tree
    theta: PerClient[Tree]
    own: PerClient[Tree]
    moments: PerClient[Tree]


@work(
    "decpdpo.train",
    sends=(),
    tells=(0,),
    keeps={0: "theta", 1: "own", 2: "moments"},
    reads=("theta", "own", "moments"),
)
def train(
    client: Client, fixed: Tree, theta: Tree, own: Tree, moments: Tree, method: DecPDPO
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the client's adapter, its own parts, its optimiser moments, and metrics."""
    return method.train(client, theta, fixed, own, moments)


@dataclass(frozen=True, kw_only=True)
class DecPDPO(Personal, Algorithm[State]):
    """Every client trains parts of its own beside an adapter that it mixes with its neighbours'.

    Shared with neighbours: the adapter. Private: pairs, the vocabulary head, the reward head, the
    bottleneck, a second adapter, optimiser moments. Averaged: the shared adapter, as `aggregate`
    says, over the experiment's `network`. Own parts are trained as in FedPDPO, with which it
    agrees on the complete graph with uniform weights; without own parts it is DecDPO.
    """

    name: Literal["decpdpo"] = "decpdpo"
    aggregate: Aggregate = Factors()
    """What of adapters is mixed."""

    works = (train, begin_adapter, begin, no_moments, projected, *aggregation.WORKS)
    sends_local_steps = True
    gossips: ClassVar[bool] = True
    tells_models: ClassVar[bool] = True
    clips_gossip: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        own = fed.each(begin, self.parts)
        theta = fed.each(begin_adapter, start, self.aggregate)
        return State(self.aggregate.split(start)[1], theta, own, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        before, own, moments, metrics = fed.each(
            train, state.fixed, state.theta, state.own, state.moments, self
        )
        theta = self.aggregate.mix(fed, before)
        new = State(state.fixed, state.theta | theta, state.own | own, state.moments | moments)
        consensus = consensus_metrics(fed, before, theta, self.aggregate)
        return new, {**fed.report(metrics), **consensus}

    def model(self, state: State) -> tuple[Tree, PerClient[Tree], PerClient[Tree]]:
        return (state.fixed, state.theta, state.own)
