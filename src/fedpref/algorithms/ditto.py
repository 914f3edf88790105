"""Ditto (Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization"), for DPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import trees
from fedpref.aggregation import Factors, FrozenA
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedpdpo import State
from fedpref.algorithms.fedsa import begin
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend, joining
from fedpref.trees import Tree


@work(sends=())
def personalise(client: Client, adapter: Tree, own: Tree, personal: Descent, strength: float) -> Tree:
    """Train the own adapter, held near the shared one."""
    centre = trees.to(adapter, client.task.device)

    def pull(theta: Tree, gradients: Tree) -> None:
        for name, gradient in gradients.items():
            gradient.add_(theta[name] - centre[name], alpha=strength)

    return descend(client, own, personal, {}, pull)[0]


@work()
def train(client: Client, adapter: Tree, own: Tree, moments: Tree, method: Ditto) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    received, fixed = method.aggregate.received(client, adapter)
    theta, moments, metrics = descend(client, received, method.local, moments, fixed=fixed)
    own = personalise(client, adapter, own, method.personal or method.local, method.strength)
    return method.aggregate.message(client, received, theta), own, moments, metrics


@dataclass(frozen=True, kw_only=True)
class Ditto:
    """FedDPO, beside which every client trains an adapter of its own that is held near the shared one.

    Shared: an adapter that no client uses. Private: pairs, each client's own adapter, which it does use. Averaged: the shared
    adapter's LoRA factors. `strength` is the paper's lambda; the own adapter's optimiser starts afresh each round. The own adapter is
    held factor by factor, so factors must keep their meaning over rounds: `aggregate: product` is not for it.
    """

    name: Literal["ditto"] = "ditto"
    strength: Annotated[float, Field(ge=0)] = 0.1
    personal: Descent | None = None  # of the own adapter; None: as local
    local: Descent = Descent()  # of the shared one
    aggregate: Annotated[Factors | FrozenA, Field(discriminator="name")] = Factors()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(begin, start), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(train, state.adapter, state.own, state.moments, self)
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        return State(adapter, state.own | own, state.moments | moments), {**fed.report(metrics), **residual}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        settings = joining(self.personal or self.local, steps)
        own = fed.each(personalise, state.adapter, fed.each(begin, state.adapter), settings, self.strength)
        return State(state.adapter, state.own | own, state.moments)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.own,)
