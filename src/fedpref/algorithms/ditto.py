"""Ditto (Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization"), for DPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import trees
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedpdpo import State
from fedpref.algorithms.fedsa import begin
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree


@work
def train(
    client: Client, adapter: Tree, own: Tree, moments: Tree, local: Descent, personal: Descent, strength: float
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    received = trees.to(adapter, client.task.device)

    def pull(theta: Tree, gradients: Tree) -> None:
        for name, gradient in gradients.items():
            gradient.add_(theta[name] - received[name], alpha=strength)

    theta, moments, metrics = descend(client, adapter, local, moments)
    own, _, _ = descend(client, own, personal, {}, pull)
    return trees.subtract(theta, adapter), own, moments, metrics


@dataclass(frozen=True, kw_only=True)
class Ditto:
    """FedDPO, beside which every client trains an adapter of its own that is held near the shared one.

    Shared: an adapter that no client uses. Private: pairs, each client's own adapter, which it does use. Averaged: the shared
    adapter's LoRA factors. `strength` is the paper's lambda; the own adapter's optimiser starts afresh each round.
    """

    name: Literal["ditto"] = "ditto"
    strength: Annotated[float, Field(ge=0)] = 0.1
    personal: Descent = Descent()  # of the own adapter
    local: Descent = Descent()  # of the shared one
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(begin, start), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        delta, own, moments, metrics = fed.each(train, state.adapter, state.own, state.moments, self.local, self.personal, self.strength)
        return State(trees.add(state.adapter, fed.mean(delta)), state.own | own, state.moments | moments), fed.report(metrics)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.own,)
