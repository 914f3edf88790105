"""FedSA-LoRA (Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning") and FFA-LoRA (Sun et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref import trees
from fedpref.algorithms.feddpo import State as SharedState
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedpdpo import State
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree


def factor(tree: Tree, letter: str) -> Tree:
    """The adapter's A factors or its B factors."""
    marks = (f".lora_{letter}.", f".lora_embedding_{letter}")
    return {name: tensor for name, tensor in tree.items() if any(mark in name for mark in marks)}


@work
def begin(client: Client, own: Tree) -> Tree:
    return own


@work
def train_both(client: Client, shared: Tree, own: Tree, moments: Tree, local: Descent) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    theta, moments, metrics = descend(client, {**shared, **own}, local, moments)
    return trees.subtract(trees.select(theta, shared), shared), trees.select(theta, own), moments, metrics


@work
def train_b(client: Client, adapter: Tree, moments: Tree, local: Descent) -> tuple[Tree, Tree, Mapping[str, float]]:
    b = factor(adapter, "B")
    theta, moments, metrics = descend(client, b, local, moments, fixed=factor(adapter, "A"))
    return trees.subtract(theta, b), moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedSA:
    """Clients share the factors A, which learn what is common, and keep the factors B.

    Shared: A. Private: B, pairs, optimiser moments. Averaged: A, half of FedDPO's bytes.
    """

    name: Literal["fedsa-lora"] = "fedsa-lora"
    local: Descent = Descent()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(factor(start, "A"), fed.each(begin, factor(start, "B")), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        delta, own, moments, metrics = fed.each(train_both, state.adapter, state.own, state.moments, self.local)
        return State(trees.add(state.adapter, fed.mean(delta)), state.own | own, state.moments | moments), fed.report(metrics)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter, state.own)


@dataclass(frozen=True, kw_only=True)
class FFA:
    """FedDPO with the factors A frozen where they were drawn: then the mean of the products is the product of the means.

    Shared: the adapter. Private: pairs, optimiser moments. Averaged: B, half of FedDPO's bytes up.
    """

    name: Literal["ffa-lora"] = "ffa-lora"
    local: Descent = Descent()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> SharedState:
        return SharedState(start, fed.each(no_moments))

    def step(self, fed: Federation, state: SharedState) -> tuple[SharedState, Mapping[str, float]]:
        delta, moments, metrics = fed.each(train_b, state.adapter, state.moments, self.local)
        b = trees.add(factor(state.adapter, "B"), fed.mean(delta))
        return SharedState({**state.adapter, **b}, state.moments | moments), fed.report(metrics)

    def model(self, state: SharedState) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)
