"""FedOpt (Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2): the mean change is a gradient for the server's optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedpref import trees
from fedpref.aggregation import Factors
from fedpref.algorithms.feddpo import FedDPO, no_moments, train
from fedpref.federation import Federation, PerClient
from fedpref.local import Descent
from fedpref.trees import Tree

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class State:
    """The shared adapter, each client's optimiser moments, and the server's own first and second moments."""

    adapter: Tree
    moments: PerClient[Tree]
    first: Tree
    second: Tree


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """FedAvgM (Hsu et al. 2019): m = beta m + change, adapter += learning_rate m."""

    name: Literal["momentum"] = "momentum"
    learning_rate: Positive = 1.0
    beta: Decay = 0.9

    def __call__(self, first: Tree, second: Tree, change: Tree) -> tuple[Tree, Tree, Tree]:
        first = trees.add(trees.scale(first, self.beta), change)
        return first, second, trees.scale(first, self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """FedAdam, FedYogi or FedAdagrad: adapter += learning_rate m / (sqrt(v) + tau), without bias correction, v from tau^2.

    The learning rate is about the largest change of one parameter a round.
    """

    name: Literal["adam", "yogi", "adagrad"] = "adam"
    learning_rate: Positive = 1e-3
    beta1: Decay = 0.9  # the paper's FedAdagrad has 0
    beta2: Decay = 0.99  # of Adam and Yogi
    tau: Positive = 1e-3

    def __call__(self, first: Tree, second: Tree, change: Tree) -> tuple[Tree, Tree, Tree]:
        first = {name: torch.lerp(change[name], first[name], self.beta1) for name in change}
        second = {name: self._second(second[name], change[name].square()) for name in change}
        return first, second, {name: self.learning_rate * first[name] / (second[name].sqrt() + self.tau) for name in change}

    def _second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        if self.name == "adagrad":
            return v + square
        if self.name == "yogi":
            return v - (1 - self.beta2) * square * (v - square).sign()
        return torch.lerp(square, v, self.beta2)


@dataclass(frozen=True, kw_only=True)
class FedOpt:
    """FedDPO with an optimiser at the server: momentum, Adam, Yogi or Adagrad.

    Shared: the adapter. Private: pairs, clients' optimiser moments. Averaged: the LoRA factors' changes, as in FedDPO, which is momentum
    with `beta` 0. The server's moments never leave it.
    """

    name: Literal["fedopt"] = "fedopt"
    server: Annotated[Momentum | Adaptive, Field(discriminator="name")] = Momentum()
    local: Descent = Descent()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        second = getattr(self.server, "tau", 0.0) ** 2
        return State(start, fed.each(no_moments), trees.scale(start, 0.0), {name: torch.full_like(t, second) for name, t in start.items()})

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        local = FedDPO(local=self.local, aggregate=Factors(residual=False))
        delta, moments, metrics = fed.each(train, state.adapter, state.moments, local)
        first, second, change = self.server(state.first, state.second, fed.mean(delta))
        return State(trees.add(state.adapter, change), state.moments | moments, first, second), fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # nothing here is a client's own

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)
