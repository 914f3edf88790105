"""Federated DPO (Jiang 2026, "Distributed Direct Preference Optimization", FedDPO(S, E)): local steps, then a weighted mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref.aggregation import Aggregate, Factors
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """The shared adapter, and each client's optimiser moments (empty where they are not kept)."""

    adapter: Tree
    moments: PerClient[Tree]


@work()
def train(client: Client, adapter: Tree, moments: Tree, method: FedDPO) -> tuple[Tree, Tree, Mapping[str, float]]:
    received, fixed = method.aggregate.received(client, adapter)
    theta, moments, metrics = descend(client, received, method.local, moments, fixed=fixed)
    return method.aggregate.message(client, received, theta), moments, metrics


@work(sends=())
def no_moments(client: Client) -> Tree:
    return {}


@dataclass(frozen=True, kw_only=True)
class FedDPO:
    """One adapter for all: the cohort trains it locally, the server adds the weighted mean of the changes.

    Shared: the adapter. Private: pairs, optimiser moments. Averaged: the LoRA factors A and B, each apart, so that the product of
    the means is not the mean of the products. Weights are example counts or equal (`federation.weighting`; the paper's code:
    equal). Deviations from the paper's code: adapters instead of full weights; a learning rate scheduled over the run.
    """

    name: Literal["feddpo"] = "feddpo"
    local: Descent = Descent()
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        messages, moments, metrics = fed.each(train, state.adapter, state.moments, self)
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        return State(adapter, state.moments | moments), {**fed.report(metrics), **residual}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # nothing here is a client's own

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)
