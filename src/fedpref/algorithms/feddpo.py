"""Federated DPO: local steps, then a weighted mean.

Source: Jiang 2026, "Distributed Direct Preference Optimization", FedDPO(S, E).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.federation import aggregation
from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import AdapterState, no_moments
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, Federation, work
from fedpref.numerics.trees import Tree


@work("feddpo.train", keeps={1: "moments"}, reads=("moments",))
def train(
    client: Client, adapter: Tree, moments: Tree, method: FedDPO
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Return the client's message for the aggregate, its optimiser moments, and metrics."""
    received, fixed = method.aggregate.received(client, adapter)
    theta, moments, metrics = train_locally(client, received, method.local, moments, fixed=fixed)
    return method.aggregate.message(client, received, theta), moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedDPO(Algorithm[AdapterState]):
    """One adapter for all: the cohort trains it locally, the server adds the mean of the changes.

    Shared: the adapter. Private: pairs, optimiser moments. Averaged: the LoRA factors A and B,
    each apart, so that the product of the means is not the mean of the products; `aggregate` has
    other ways. Weights are example counts or equal (`federation.weighting`; the paper's code:
    equal). Deviations from the paper's code: adapters instead of full weights; a learning rate
    that is scheduled over the run.
    """

    name: Literal["feddpo"] = "feddpo"
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""
    aggregate: Aggregate = Factors()
    """How clients' adapters become one."""

    works = (train, no_moments, *aggregation.WORKS)
    sums: ClassVar[int] = 1
    sends_local_steps = True

    def init(self, fed: Federation, start: Tree) -> AdapterState:
        return AdapterState(start, fed.each(no_moments))

    def step(
        self, fed: Federation, state: AdapterState
    ) -> tuple[AdapterState, Mapping[str, float]]:
        messages, moments, metrics = fed.each(train, state.adapter, state.moments, self)
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        return AdapterState(adapter, state.moments | moments), {**fed.report(metrics), **residual}

    def model(self, state: AdapterState) -> tuple[Tree]:
        return (state.adapter,)
