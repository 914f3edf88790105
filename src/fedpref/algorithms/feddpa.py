"""FedDPA, for DPO: a shared and a private adapter, added.

Source: Long et al. 2024, "Dual-Personalizing Adapter for Federated Foundation Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.federation import aggregation
from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import PersonalState, no_moments, personalize
from fedpref.federation.local_training import LocalTraining, joining, train_locally
from fedpref.federation.personal import begin
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.models.own_parts import Parts
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree


@work("feddpa.train", keeps={1: "own", 2: "moments"}, reads=("own", "moments"))
def train(
    client: Client, adapter: Tree, own: Tree, moments: Tree, method: FedDPA
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the client's message for the aggregate, its own adapter, moments, and metrics."""
    received, fixed = method.aggregate.received(client, adapter)
    both = trees.apart(received, own)
    theta, moments, metrics = train_locally(client, both, method.local, moments, fixed=fixed)
    message = method.aggregate.message(client, received, trees.select(theta, received))
    return message, trees.select(theta, own), moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedDPA(Algorithm[PersonalState]):
    """Every client's model is the sum of the shared adapter and one of its own, trained together.

    Shared: an adapter. Private: pairs, a second adapter of the same rank, optimiser moments.
    Averaged: the shared adapter's LoRA factors. Deviation: the two are added with equal weight;
    the paper weighs them by each example's likeness to the client's data.
    """

    name: Literal["feddpa"] = "feddpa"
    local: LocalTraining = LocalTraining()
    """How a client trains both adapters within a round."""
    aggregate: Aggregate = Factors()
    """How clients' shared adapters become one."""

    works = (train, begin, personalize, no_moments, *aggregation.WORKS)
    sums: ClassVar[int] = 1
    sends_local_steps = True
    parts: ClassVar[Parts] = Parts(head=None, bottleneck=0, reward=False)

    def init(self, fed: Federation, start: Tree) -> PersonalState:
        return PersonalState(start, fed.each(begin, self.parts), fed.each(no_moments))

    def step(
        self, fed: Federation, state: PersonalState
    ) -> tuple[PersonalState, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(
            train, state.adapter, state.own, state.moments, self
        )
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        new = PersonalState(adapter, state.own | own, state.moments | moments)
        return new, {**fed.report(metrics), **residual}

    def join(self, fed: Federation, state: PersonalState, steps: int) -> PersonalState:
        own = fed.each(personalize, state.adapter, state.own, joining(self.local, steps))
        return PersonalState(state.adapter, state.own | own, state.moments)

    def model(self, state: PersonalState) -> tuple[Tree, PerClient[Tree]]:
        return (state.adapter, state.own)
