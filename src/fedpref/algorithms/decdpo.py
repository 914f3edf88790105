"""Decentralised DPO (Jiang 2026, "Distributed Direct Preference Optimization", DecDPO): local steps, then a mix with the neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedpref import seeds
from fedpref.aggregation import Factors, FrozenA
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedsa import begin
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree

PROBES = 16


@dataclass(frozen=True)
class State:
    """What nobody trains, each client's adapter, and each client's optimiser moments (empty where they are not kept)."""

    fixed: Tree
    theta: PerClient[Tree]
    moments: PerClient[Tree]


@work
def train(client: Client, fixed: Tree, theta: Tree, moments: Tree, local: Descent) -> tuple[Tree, Tree, Mapping[str, float]]:
    return descend(client, theta, local, moments, fixed=fixed)


@work
def projected(client: Client, theta: Tree) -> Tree:
    """The adapter's products with random vectors that all clients draw alike, and their squares."""
    rng = seeds.generator(0, "probe", round=client.round)
    shadow = sum(torch.randn(PROBES, theta[name].numel(), generator=rng) @ theta[name].flatten() for name in sorted(theta))
    return {"value": torch.as_tensor(shadow).double(), "square": torch.as_tensor(shadow).double().square()}


def consensus_error(fed: Federation, theta: PerClient[Tree]) -> float:
    """The mean over clients of |theta_i - mean|^2, estimated from random projections: their variance over clients."""
    mean = fed.mean(fed.each(projected, theta))
    return float((mean["square"] - mean["value"].square()).mean())


def measured(fed: Federation, before: PerClient[Tree], after: PerClient[Tree]) -> Mapping[str, float]:
    """The consensus error before and after mixing."""
    return {"consensus_error": consensus_error(fed, after), "consensus_error_before_mixing": consensus_error(fed, before)}


@dataclass(frozen=True, kw_only=True)
class DecDPO:
    """Every client owns an adapter, trains it on its own pairs, and takes the weighted mean of its neighbours' and its own.

    Shared with neighbours: the adapter. Private: pairs, gradients, optimiser moments. Averaged: the LoRA factors A and B, each apart, or
    B alone with `frozen-a`. `order`: adapt then combine, as the paper's program does, or combine then adapt. The graph is the
    experiment's `network`. Deviations: adapters in place of full weights; the paper's optimiser persists over rounds
    (`local.keep_optimizer`), here it starts afresh by default.
    """

    name: Literal["decdpo"] = "decdpo"
    order: Literal["adapt-then-combine", "combine-then-adapt"] = "adapt-then-combine"
    local: Descent = Descent()
    aggregate: Annotated[Factors | FrozenA, Field(discriminator="name")] = Factors()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        trained, fixed = self.aggregate.split(start)
        return State(fixed, fed.each(begin, trained), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        if self.order == "adapt-then-combine":
            before, moments, metrics = fed.each(train, state.fixed, state.theta, state.moments, self.local)
            _, theta = fed.mix(before)
            mixed = theta
        else:
            before = state.theta
            _, mixed = fed.mix(before)
            theta, moments, metrics = fed.each(train, state.fixed, mixed, state.moments, self.local)
        new = State(state.fixed, state.theta | theta, state.moments | moments)
        return new, {**fed.report(metrics), **measured(fed, before, mixed)}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # a client that comes later has no neighbour to take an adapter from

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.fixed, state.theta)
