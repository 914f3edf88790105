"""Decentralised DPO with bounded staleness: what a client hears may be some rounds old. Ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import drawn_age, no_moments, own_copy
from fedpref.federation.consensus import consensus_metrics, projected
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Age


@dataclass(frozen=True)
class State:
    """Each client's adapter, those of earlier rounds, nested by age from 1, and its moments."""

    theta: PerClient[Tree]
    past: PerClient[Tree]
    moments: PerClient[Tree]


@work("decdpo-stale.nothing_past", keeps={0: "past"})
def nothing_past(client: Client, start: Tree, staleness: int) -> Tree:
    """Return the past of a client that has none: the starting adapter, for every age."""
    copies = {
        age: {name: tensor.clone() for name, tensor in start.items()}
        for age in range(1, staleness + 1)
    }
    return trees.nest(copies)


@work(
    "decdpo-stale.adapt",
    sends=(),
    tells=(0, 1),
    keeps={0: "theta", 1: "theta", 2: "moments"},
    reads=("theta", "past", "moments"),
)
def adapt(
    client: Client, theta: Tree, past: Tree, moments: Tree, method: StaleDecDPO
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the trained adapter, the one that is told to neighbours, moments, and metrics."""
    theta, moments, metrics = train_locally(client, theta, method.local, moments)
    age = drawn_age(client, method.staleness)
    told = trees.part(past, age) if age else theta
    return theta, told, moments, {**metrics, "age": float(age)}


@work(
    "decdpo-stale.combine",
    sends=(),
    tells=(0,),
    keeps={0: "theta", 1: "past"},
    reads={"theta": "theta", "past": "past", "told": "theta", "mixed": "theta"},
)
def combine(
    client: Client, theta: Tree, past: Tree, told: Tree, mixed: Tree, staleness: int
) -> tuple[Tree, Tree]:
    """Return the adapter after hearing the neighbours, and the new past."""
    apart = trees.subtract(mixed, told)
    theta = trees.add(theta, trees.scale(apart, 1 / (1 + staleness)))
    older = (trees.part(past, age) for age in range(1, staleness))
    recent = [theta, *older][:staleness]
    return theta, trees.nest(dict(enumerate(recent, 1)))


@dataclass(frozen=True, kw_only=True)
class StaleDecDPO(Algorithm[State]):
    """DecDPO whose clients tell their neighbours the adapter of q rounds ago.

    q is drawn evenly from 0 to `staleness` for each client and round: of age 0 is the adapter just
    trained, of age 1 the one that the round before ended with. Shared with neighbours: the
    adapter. Private: pairs, optimiser moments. Averaged: the LoRA factors A and B, each apart: a
    client adds to its newest adapter what sets its neighbours' told ones apart from its own told
    one, so that the mean over clients is preserved, divided by 1 + `staleness`: undivided, late
    corrections overshoot and clients come apart. Without staleness it is DecDPO.
    """

    name: Literal["decdpo-stale"] = "decdpo-stale"
    staleness: Age = 2
    """How many rounds old may be what a client tells."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (adapt, combine, nothing_past, own_copy, no_moments, projected)
    sends_local_steps = True
    gossips: ClassVar[bool] = True
    tells_models: ClassVar[bool] = True
    clips_gossip: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        theta = fed.each(own_copy, start)
        past = fed.each(nothing_past, start, self.staleness)
        return State(theta, past, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        before, told, moments, metrics = fed.each(
            adapt, state.theta, state.past, state.moments, self
        )
        _, mixed = fed.mix(told)
        theta, past = fed.each(combine, before, state.past, told, mixed, self.staleness)
        new = State(state.theta | theta, state.past | past, state.moments | moments)
        return new, {**fed.report(metrics), **consensus_metrics(fed, before, theta)}

    def model(self, state: State) -> tuple[PerClient[Tree]]:
        return (state.theta,)
