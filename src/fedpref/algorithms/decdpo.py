"""Decentralised DPO (Jiang 2026, "Distributed Direct Preference Optimization", DecDPO): local steps, then a mix with the neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref.aggregation import Aggregate, Factors
from fedpref.algorithms.feddpo import no_moments
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """What nobody trains, each client's adapter, and each client's optimiser moments (empty where they are not kept)."""

    fixed: Tree
    theta: PerClient[Tree]
    moments: PerClient[Tree]


@work()
def train(client: Client, fixed: Tree, theta: Tree, moments: Tree, local: Descent) -> tuple[Tree, Tree, Mapping[str, float]]:
    return descend(client, theta, local, moments, fixed=fixed)


@work()
def begin(client: Client, start: Tree, aggregate: Aggregate) -> Tree:
    return aggregate.received(client, start)[0]


@work()
def projected(client: Client, theta: Tree, aggregate: Aggregate) -> Tree:
    """The adapter's random sums and their squares."""
    shadow = aggregate.shadow(theta, client.round).double()
    return {"value": shadow, "square": shadow.square()}


def consensus_error(fed: Federation, theta: PerClient[Tree], aggregate: Aggregate = Factors()) -> float:
    """The mean over clients of |theta_i - mean|^2, estimated from random sums of each tensor's entries: their variance over clients.

    Distances are between factors, or between the products that they stand for where these are what is mixed.
    """
    mean = fed.mean(fed.each(projected, theta, aggregate))
    return max(0.0, float((mean["square"] - mean["value"].square()).sum()))


def measured(fed: Federation, before: PerClient[Tree], after: PerClient[Tree], aggregate: Aggregate = Factors()) -> Mapping[str, float]:
    """The consensus error before and after mixing."""
    return {
        "consensus_error": consensus_error(fed, after, aggregate),
        "consensus_error_before_mixing": consensus_error(fed, before, aggregate),
    }


@dataclass(frozen=True, kw_only=True)
class DecDPO:
    """Every client owns an adapter, trains it on its own pairs, and takes the weighted mean of its neighbours' and its own.

    Shared with neighbours: the adapter. Private: pairs, gradients, optimiser moments. Averaged: the LoRA factors A and B, each apart,
    B alone, or their products, as `aggregate` says. `order`: adapt then combine, as the paper's program does, or combine then adapt.
    The graph is the experiment's `network`. Deviations: adapters in place of full weights; the paper's optimiser persists over
    rounds (`local.keep_optimizer`), here it starts afresh by default.
    """

    name: Literal["decdpo"] = "decdpo"
    order: Literal["adapt-then-combine", "combine-then-adapt"] = "adapt-then-combine"
    local: Descent = Descent()
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    pooled: ClassVar[bool] = False
    gossips: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        fixed = self.aggregate.split(start)[1]
        return State(fixed, fed.each(begin, start, self.aggregate), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        if self.order == "adapt-then-combine":
            before, moments, metrics = fed.each(train, state.fixed, state.theta, state.moments, self.local)
            theta = self.aggregate.mix(fed, before)
            mixed = theta
        else:
            before = state.theta
            mixed = self.aggregate.mix(fed, before)
            theta, moments, metrics = fed.each(train, state.fixed, mixed, state.moments, self.local)
        new = State(state.fixed, state.theta | theta, state.moments | moments)
        return new, {**fed.report(metrics), **measured(fed, before, mixed, self.aggregate)}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # a client that comes later has no neighbour to take an adapter from

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.fixed, state.theta)
