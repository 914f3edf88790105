"""Federated DPO with bounded staleness: clients may start from an adapter that is some rounds old.

Source: Jiang 2026, "Distributed Direct Preference Optimization"; the bounded form is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import drawn_age, no_moments
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Age


@dataclass(frozen=True)
class State:
    """The adapters of the last rounds, nested by age, 0 the newest; each client's moments."""

    adapters: Tree
    moments: PerClient[Tree]

    @staticmethod
    def begun(start: Tree, oldest: int, moments: PerClient[Tree]) -> State:
        """Return the state of a run in which all ages have the same adapter.

        Args:
            start: The adapter.
            oldest: The highest age.
            moments: Each client's.
        """
        copies = {
            age: {name: tensor.clone() for name, tensor in start.items()}
            for age in range(oldest + 1)
        }
        return State(trees.nest(copies), moments)

    def moved(self, newest: Tree, oldest: int, moments: PerClient[Tree]) -> State:
        """Return the state with a newer adapter, by which all others are a round older."""
        older = (trees.part(self.adapters, age) for age in range(oldest))
        return State(trees.nest(dict(enumerate([newest, *older]))), self.moments | moments)


@work("feddpo-stale.train", keeps={1: "moments"}, reads=("moments",))
def train(
    client: Client, adapters: Tree, moments: Tree, method: StaleFedDPO
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Return what the client sends, its optimiser moments, and metrics."""
    age = drawn_age(client, method.staleness)
    start = trees.part(adapters, age)
    theta, moments, metrics = train_locally(client, start, method.local, moments)
    since = trees.part(adapters, 0) if method.send == "weights" else start
    return trees.subtract(theta, since), moments, {**metrics, "age": float(age)}


@dataclass(frozen=True, kw_only=True)
class StaleFedDPO(Algorithm[State]):
    """FedDPO whose clients start from the adapter of q rounds ago, q drawn for each and each round.

    Shared: the adapter. Private: pairs, optimiser moments. Averaged: the LoRA factors A and B,
    each apart. The paper's program knows staleness as on or off alone; here q is drawn evenly from
    0 to `staleness`, which is ours. `bytes_down` counts all adapters that a client may start from,
    of which a deployed client would have received one.
    """

    name: Literal["feddpo-stale"] = "feddpo-stale"
    staleness: Age = 2
    """How many rounds old an adapter may be."""
    send: Literal["weights", "changes"] = "weights"
    """Average the clients' adapters, as the paper's program does, or add their mean change."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train, no_moments)
    sums: ClassVar[int] = 1
    starts_alike: ClassVar[bool] = False
    sends_local_steps = True

    def init(self, fed: Federation, start: Tree) -> State:
        return State.begun(start, self.staleness, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        delta, moments, metrics = fed.each(train, state.adapters, state.moments, self)
        newest = trees.add(trees.part(state.adapters, 0), fed.mean(delta))
        return state.moved(newest, self.staleness, moments), fed.report(metrics)

    def model(self, state: State) -> tuple[Tree]:
        return (trees.part(state.adapters, 0),)
