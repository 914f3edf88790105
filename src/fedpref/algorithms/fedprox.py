"""FedProx (Li et al. 2020, "Federated Optimization in Heterogeneous Networks"): local steps that are held near where they began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import trees
from fedpref.aggregation import Aggregate, Factors
from fedpref.algorithms.feddpo import State, no_moments
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree


@work()
def train(client: Client, adapter: Tree, moments: Tree, method: FedProx) -> tuple[Tree, Tree, Mapping[str, float]]:
    received, fixed = method.aggregate.received(client, adapter)
    centre = trees.to(received, client.task.device)

    def pull(theta: Tree, gradients: Tree) -> None:
        for name, gradient in gradients.items():
            gradient.add_(theta[name] - centre[name], alpha=method.mu)

    theta, moments, metrics = descend(client, received, method.local, moments, pull, fixed=fixed)
    return method.aggregate.message(client, received, theta), moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedProx:
    """FedDPO whose clients also minimise mu/2 |theta - adapter|^2, the squared distance from the adapter they received.

    Shared: the adapter. Private: pairs, optimiser moments. Averaged: the LoRA factors, as in FedDPO, which is `mu` = 0. Deviation:
    clients take a fixed number of steps; the paper's work of varying precision is `federation.deadline`'s business.
    """

    name: Literal["fedprox"] = "fedprox"
    mu: Annotated[float, Field(ge=0)] = 0.01
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
