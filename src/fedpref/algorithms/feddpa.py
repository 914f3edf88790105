"""A shared and a private adapter, added (FedDPA: Long et al. 2024, "Dual-Personalizing Adapter for Federated Foundation Models")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import trees
from fedpref.aggregation import Aggregate, Factors
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedpdpo import State
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend, joining, personalise
from fedpref.models.parts import Parts
from fedpref.personalisation import begin
from fedpref.trees import Tree


@work()
def train(client: Client, adapter: Tree, own: Tree, moments: Tree, method: FedDPA) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    received, fixed = method.aggregate.received(client, adapter)
    theta, moments, metrics = descend(client, {**received, **own}, method.local, moments, fixed=fixed)
    return method.aggregate.message(client, received, trees.select(theta, received)), trees.select(theta, own), moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedDPA:
    """Every client's model is the sum of the shared adapter and one of its own, trained together.

    Shared: an adapter. Private: pairs, a second adapter of the same rank, optimiser moments. Averaged: the shared adapter's LoRA
    factors. Deviation: the two are added with equal weight; the paper weighs them by each example's likeness to the client's data.
    """

    name: Literal["feddpa"] = "feddpa"
    local: Descent = Descent()
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    parts: ClassVar[Parts] = Parts(head=None, bottleneck=0, reward=False)
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(begin, self.parts), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(train, state.adapter, state.own, state.moments, self)
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        return State(adapter, state.own | own, state.moments | moments), {**fed.report(metrics), **residual}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        own = fed.each(personalise, state.adapter, state.own, joining(self.local, steps))
        return State(state.adapter, state.own | own, state.moments)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter, state.own)
