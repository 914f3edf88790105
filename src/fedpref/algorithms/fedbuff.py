"""Buffered asynchronous aggregation: the server moves when some are done, whoever is still at work.

Source: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedpref.algorithms.feddpo_stale import State
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, Federation, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Age, NonNegative, Positive


@work("fedbuff.train", keeps={1: "moments"}, reads=("moments",))
def train(
    client: Client, adapters: Tree, ages: Tree, moments: Tree, method: FedBuff
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Return the client's weighted change of what it started from, its moments, and metrics.

    Args:
        client: Who trains.
        adapters: By age, those that somebody started from.
        ages: Of what each client started from, by number; who is not among them is not late.
        moments: The client's optimiser's.
        method: The settings.
    """
    age = round(float(ages[str(client.id)])) if str(client.id) in ages else 0
    if age > method.staleness:
        zero = trees.scale(trees.part(adapters, 0), 0.0)
        return zero, moments, {"age": float(age), "too_old": 1.0}
    start = trees.part(adapters, age)
    theta, moments, metrics = train_locally(client, start, method.local, moments)
    change = trees.scale(trees.subtract(theta, start), method.weight(age))
    return change, moments, {**metrics, "age": float(age), "too_old": 0.0}


@dataclass(frozen=True, kw_only=True)
class FedBuff(Algorithm[State]):
    """FedDPO that waits for nobody: each round is the next clients to be done, from what they had.

    Shared: the adapter. Private: pairs, optimiser moments. Averaged: changes of the LoRA factors A
    and B, each apart, weighed by 1 / (1 + age)^`staleness_exponent`; the age of a change is how
    many steps the server has made since the client began. `federation.concurrency` says how many
    train at a time and `federation.clients_per_round` how many changes make a step; without
    concurrency it is FedDPO. Clients' times are drawn, so that over sites too it is known
    beforehand who is done when. That changes older than `staleness` count for nothing is ours.
    """

    name: Literal["fedbuff"] = "fedbuff"
    staleness: Age = 8
    """How many steps old what a client started from may be."""
    staleness_exponent: NonNegative = 0.5
    """How much less a change counts for its age; 0 weighs all alike."""
    server_learning_rate: Positive = 1.0
    """What the mean change is multiplied by."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train, no_moments)
    sums: ClassVar[int] = 1
    starts_alike: ClassVar[bool] = False
    sends_local_steps = True
    waits_for_nobody = True

    def weight(self, age: int) -> float:
        """Return what a change of an age counts."""
        return float((1 + age) ** -self.staleness_exponent)

    def init(self, fed: Federation, start: Tree) -> State:
        return State.begun(start, self.staleness, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        ages = {i: fed.ages[i] for i in fed.active if i in fed.ages}
        wanted = {0, *(age for age in ages.values() if age <= self.staleness)}
        told = {age: trees.part(state.adapters, age) for age in sorted(wanted)}
        said = {str(i): torch.tensor([float(age)]) for i, age in ages.items()}
        change, moments, metrics = fed.each(train, trees.nest(told), said, state.moments, self)
        moved = trees.scale(fed.mean(change), self.server_learning_rate)
        newest = trees.add(trees.part(state.adapters, 0), moved)
        return state.moved(newest, self.staleness, moments), fed.report(metrics)

    def model(self, state: State) -> tuple[Tree]:
        return (trees.part(state.adapters, 0),)
