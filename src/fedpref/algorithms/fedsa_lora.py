"""FedSA-LoRA, for DPO.

Source: Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.federation.aggregation import factor
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import PersonalState, no_moments, own_copy, personalize
from fedpref.federation.local_training import LocalTraining, joining, train_locally
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree


@work("fedsa-lora.train", keeps={1: "own", 2: "moments"}, reads=("own", "moments"))
def train(
    client: Client, shared: Tree, own: Tree, moments: Tree, local: LocalTraining
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the change of the shared factors, the client's own factors, moments, and metrics."""
    if stray := shared.keys() - factor(shared, "A").keys():
        raise ValueError(f"{sorted(stray)[0]!r} is no factor that is shared")
    theta, moments, metrics = train_locally(client, trees.apart(shared, own), local, moments)
    change = trees.subtract(trees.select(theta, shared), shared)
    return change, trees.select(theta, own), moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedSA(Algorithm[PersonalState]):
    """Clients share the factors A, which learn what is common, and keep the factors B.

    Shared: A. Private: B, pairs, optimiser moments. Averaged: A, half of FedDPO's bytes.
    """

    name: Literal["fedsa-lora"] = "fedsa-lora"
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train, own_copy, no_moments, personalize)
    sums: ClassVar[int] = 1
    starts_alike: ClassVar[bool] = False
    sends_local_steps = True
    adapts: ClassVar[bool] = True

    def sent(self, start: Tree) -> Tree:
        return factor(start, "A")

    def init(self, fed: Federation, start: Tree) -> PersonalState:
        own = fed.each(own_copy, factor(start, "B"))
        return PersonalState(factor(start, "A"), own, fed.each(no_moments))

    def step(
        self, fed: Federation, state: PersonalState
    ) -> tuple[PersonalState, Mapping[str, float]]:
        delta, own, moments, metrics = fed.each(
            train, state.adapter, state.own, state.moments, self.local
        )
        adapter = trees.add(state.adapter, fed.mean(delta))
        new = PersonalState(adapter, state.own | own, state.moments | moments)
        return new, fed.report(metrics)

    def join(self, fed: Federation, state: PersonalState, steps: int) -> PersonalState:
        own = fed.each(personalize, state.adapter, state.own, joining(self.local, steps))
        return PersonalState(state.adapter, state.own | own, state.moments)

    def model(self, state: PersonalState) -> tuple[Tree, PerClient[Tree]]:
        return (state.adapter, state.own)
