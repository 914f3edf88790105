"""Decentralised DPO with bounded staleness: what a client hears of its neighbours may be some rounds old. Ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import trees
from fedpref.algorithms.clustered import one
from fedpref.algorithms.decdpo import measured
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedsa import begin
from fedpref.algorithms.stale import drawn_age
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """Each client's adapter, those that earlier rounds ended with, named AGE/NAME with age 1 for the last, and its optimiser moments."""

    theta: PerClient[Tree]
    past: PerClient[Tree]
    moments: PerClient[Tree]


@work(sends=())
def nothing_past(client: Client, start: Tree, staleness: int) -> Tree:
    return {f"{age}/{name}": tensor.clone() for age in range(1, staleness + 1) for name, tensor in start.items()}


@work(sends=(0, 1))
def adapt(client: Client, theta: Tree, past: Tree, moments: Tree, method: StaleDecDPO) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    theta, moments, metrics = descend(client, theta, method.local, moments)
    age = drawn_age(client, method.staleness)
    return theta, one(past, age) if age else theta, moments, {**metrics, "age": float(age)}


@work()
def combine(client: Client, theta: Tree, past: Tree, told: Tree, mixed: Tree, staleness: int) -> tuple[Tree, Tree]:
    theta = trees.add(theta, trees.scale(trees.subtract(mixed, told), 1 / (1 + staleness)))
    known = [theta, *(one(past, age) for age in range(1, staleness))][:staleness]
    return theta, {f"{age}/{name}": tensor for age, adapter in enumerate(known, 1) for name, tensor in adapter.items()}


@dataclass(frozen=True, kw_only=True)
class StaleDecDPO:
    """DecDPO whose clients tell their neighbours the adapter of q rounds ago, q drawn evenly from 0 to `staleness` for each and round.

    Shared with neighbours: the adapter. Private: pairs, optimiser moments. Averaged: the LoRA factors A and B, each apart: a client
    adds to its newest adapter what sets its neighbours' told ones apart from its own told one, so that the mean over clients is
    preserved, divided by 1 + `staleness`: undivided, late corrections overshoot and clients come apart. Of age 0 is the adapter just
    trained, of age 1 the one that the round before ended with. Without staleness it is DecDPO.
    """

    name: Literal["decdpo-stale"] = "decdpo-stale"
    staleness: Annotated[int, Field(ge=0)] = 2  # rounds
    local: Descent = Descent()
    pooled: ClassVar[bool] = False
    gossips: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        return State(fed.each(begin, start), fed.each(nothing_past, start, self.staleness), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        before, told, moments, metrics = fed.each(adapt, state.theta, state.past, state.moments, self)
        _, mixed = fed.mix(told)
        theta, past = fed.each(combine, before, state.past, told, mixed, self.staleness)
        new = State(state.theta | theta, state.past | past, state.moments | moments)
        return new, {**fed.report(metrics), **measured(fed, before, theta)}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # a client that comes later has no neighbour to take an adapter from

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.theta,)
