"""A shared and a private adapter, added (FedDPA: Long et al. 2024, "Dual-Personalizing Adapter for Federated Foundation Models")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref import trees
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedpdpo import State
from fedpref.algorithms.fedsa import train_both
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent
from fedpref.models.parts import OWN_ADAPTER
from fedpref.trees import Tree


@work
def begin(client: Client, start: Tree) -> Tree:
    return {OWN_ADAPTER + name: tensor for name, tensor in start.items()}


@dataclass(frozen=True, kw_only=True)
class FedDPA:
    """Every client's model is the sum of the shared adapter and one of its own, trained together.

    Shared: an adapter. Private: pairs, a second adapter of the same rank, optimiser moments. Averaged: the shared adapter's LoRA
    factors. Deviation: the two are added with equal weight; the paper weighs them by each example's likeness to the client's data.
    """

    name: Literal["feddpa"] = "feddpa"
    local: Descent = Descent()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(begin, start), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        delta, own, moments, metrics = fed.each(train_both, state.adapter, state.own, state.moments, self.local)
        return State(trees.add(state.adapter, fed.mean(delta)), state.own | own, state.moments | moments), fed.report(metrics)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter, state.own)
