"""Decentralised DPO: local steps, then a mix with the neighbours.

Source: Jiang 2026, "Distributed Direct Preference Optimization", DecDPO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.federation import aggregation
from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments, train_own
from fedpref.federation.consensus import consensus_metrics, projected
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics.trees import Tree


@dataclass(frozen=True)
class State:
    """What nobody trains, each client's adapter, and its optimiser moments (empty if not kept)."""

    fixed: Tree
    theta: PerClient[Tree]
    moments: PerClient[Tree]


@work("decdpo.begin", sends=(), tells=(0,), keeps={0: "theta"})
def begin(client: Client, start: Tree, aggregate: Aggregate) -> Tree:
    """Return what the client trains of the adapter that everybody starts from."""
    return aggregate.received(client, start)[0]


@dataclass(frozen=True, kw_only=True)
class DecDPO(Algorithm[State]):
    """Every client trains an adapter of its own and takes the weighted mean with its neighbours'.

    Shared with neighbours: the adapter. Private: pairs, gradients, optimiser moments. Averaged:
    the LoRA factors A and B, each apart, B alone, or their products, as `aggregate` says. The
    graph is the experiment's `network`. Deviations: adapters in place of full weights; the paper's
    optimiser persists over rounds (`local.keep_optimizer`), here it starts afresh by default.
    """

    name: Literal["decdpo"] = "decdpo"
    order: Literal["adapt-then-combine", "combine-then-adapt"] = "adapt-then-combine"
    """Train before mixing, as the paper's program does, or after it."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""
    aggregate: Aggregate = Factors()
    """What of adapters is mixed."""

    works = (train_own, begin, no_moments, projected, *aggregation.WORKS)
    sends_local_steps = True
    gossips: ClassVar[bool] = True
    tells_models: ClassVar[bool] = True
    clips_gossip: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        fixed = self.aggregate.split(start)[1]
        return State(fixed, fed.each(begin, start, self.aggregate), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        if self.order == "adapt-then-combine":
            before, moments, metrics = self._train(fed, state, state.theta)
            theta = self.aggregate.mix(fed, before)
            mixed = theta
        else:
            before = state.theta
            mixed = self.aggregate.mix(fed, before)
            theta, moments, metrics = self._train(fed, state, mixed)
        new = State(state.fixed, state.theta | theta, state.moments | moments)
        consensus = consensus_metrics(fed, before, mixed, self.aggregate)
        return new, {**fed.report(metrics), **consensus}

    def _train(
        self, fed: Federation, state: State, theta: PerClient[Tree]
    ) -> tuple[PerClient[Tree], PerClient[Tree], PerClient[Mapping[str, float]]]:
        return fed.each(train_own, state.fixed, theta, state.moments, self.local)

    def model(self, state: State) -> tuple[Tree, PerClient[Tree]]:
        return (state.fixed, state.theta)
