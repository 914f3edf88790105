"""FedProx, for DPO: local steps that are held near where they began.

Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref.federation import aggregation
from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import AdapterState, no_moments
from fedpref.federation.local_training import LocalTraining, pull_towards, train_locally
from fedpref.federation.verbs import Client, Federation, work
from fedpref.numerics.trees import Tree
from fedpref.types import NonNegative


@work("fedprox.train", keeps={1: "moments"}, reads=("moments",))
def train(
    client: Client, adapter: Tree, moments: Tree, method: FedProx
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Return the client's message for the aggregate, its optimiser moments, and metrics."""
    received, fixed = method.aggregate.received(client, adapter)
    pull = pull_towards(received, method.mu, client)
    theta, moments, metrics = train_locally(
        client, received, method.local, moments, pull, fixed=fixed
    )
    return method.aggregate.message(client, received, theta), moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedProx(Algorithm[AdapterState]):
    """FedDPO whose clients also minimise mu/2 |theta - adapter|^2 to the adapter they received.

    Shared: the adapter. Private: pairs, optimiser moments. Averaged: the LoRA factors, as in
    FedDPO, which is `mu` = 0. Deviation: clients take a fixed number of steps; the paper's work of
    varying precision is `federation.deadline`'s business.
    """

    name: Literal["fedprox"] = "fedprox"
    mu: Annotated[NonNegative, Field(le=1e30)] = 0.01
    """The strength of the pull towards the received adapter."""
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
