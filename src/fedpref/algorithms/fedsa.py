"""FedSA-LoRA (Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning"), for DPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref import trees
from fedpref.aggregation import factor
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedpdpo import State
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend, joining, personalise
from fedpref.trees import Tree


@work(sends=())
def begin(client: Client, own: Tree) -> Tree:
    return own


@work()
def train(client: Client, shared: Tree, own: Tree, moments: Tree, local: Descent) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    theta, moments, metrics = descend(client, {**shared, **own}, local, moments)
    return trees.subtract(trees.select(theta, shared), shared), trees.select(theta, own), moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedSA:
    """Clients share the factors A, which learn what is common, and keep the factors B.

    Shared: A. Private: B, pairs, optimiser moments. Averaged: A, half of FedDPO's bytes.
    """

    name: Literal["fedsa-lora"] = "fedsa-lora"
    local: Descent = Descent()
    pooled: ClassVar[bool] = False
    adapts: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        return State(factor(start, "A"), fed.each(begin, factor(start, "B")), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        delta, own, moments, metrics = fed.each(train, state.adapter, state.own, state.moments, self.local)
        return State(trees.add(state.adapter, fed.mean(delta)), state.own | own, state.moments | moments), fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        own = fed.each(personalise, state.adapter, state.own, joining(self.local, steps))
        return State(state.adapter, state.own | own, state.moments)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter, state.own)
