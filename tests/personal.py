"""An algorithm with private state, for the contract tests: LoRA's A factors are shared, its B
factors never leave a client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree


@dataclass(frozen=True)
class State:
    shared: Tree
    private: PerClient[Tree]


def is_private(name: str) -> bool:
    return ".lora_B." in name


@work("tests-personal.begin", sends=(), keeps={0: "private"})
def begin(client: Client, start: Tree) -> Tree:
    return {name: tensor for name, tensor in start.items() if is_private(name)}


@work("tests-personal.train", keeps={1: "private"}, reads=("private",))
def train(
    client: Client, shared: Tree, private: Tree, local: LocalTraining
) -> tuple[Tree, Tree, Mapping[str, float]]:
    theta, _, metrics = train_locally(client, {**shared, **private}, local, {})
    return {n: theta[n] - shared[n] for n in shared}, {n: theta[n] for n in private}, metrics


@dataclass(frozen=True)
class Personal(Algorithm[State]):
    name: Literal["personal"] = "personal"
    local: LocalTraining = LocalTraining()

    works = (begin, train)

    def init(self, fed: Federation, start: Tree) -> State:
        return State({n: t for n, t in start.items() if not is_private(n)}, fed.each(begin, start))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        delta, private, metrics = fed.each(train, state.shared, state.private, self.local)
        return State(trees.add(state.shared, fed.mean(delta)), state.private | private), fed.report(
            metrics
        )

    def join(self, fed: Federation, state: State, steps: int) -> State:
        _, private, _ = fed.each(train, state.shared, state.private, self.local)
        return State(state.shared, state.private | private)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return state.shared, state.private
