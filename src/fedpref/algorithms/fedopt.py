"""FedDPO with an optimiser at the server: momentum, or an adaptive one.

Sources: Hsu et al. 2019 (FedAvgM); Reddi et al. 2021, "Adaptive Federated Optimization".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from fedpref.algorithms.feddpo import FedDPO, train
from fedpref.federation.aggregation import Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import Federation, PerClient
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Fraction, Positive


@dataclass(frozen=True)
class State:
    """The adapter, clients' moments, and the server's first and second moments."""

    adapter: Tree
    moments: PerClient[Tree]
    first: Tree
    second: Tree


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """FedAvgM (Hsu et al. 2019): m = beta m + change, adapter += learning_rate m."""

    name: Literal["momentum"] = "momentum"
    learning_rate: Positive = 1.0
    """Of the server."""
    beta: Fraction = 0.9
    """The share of the last momentum that stays; 0 is FedDPO."""

    tau: ClassVar[float] = 0.0

    def __call__(self, first: Tree, second: Tree, change: Tree) -> tuple[Tree, Tree, Tree]:
        """Return the next moments, and what is added to the adapter."""
        first = trees.add(trees.scale(first, self.beta), change)
        return first, second, trees.scale(first, self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """FedAdam, FedYogi or FedAdagrad: adapter += learning_rate m / (sqrt(v) + tau), v from tau^2.

    There is no bias correction. The learning rate is about the largest change of one parameter in
    a round.
    """

    name: Literal["adam", "yogi", "adagrad"] = "adam"
    learning_rate: Positive = 1e-3
    """Of the server."""
    beta1: Fraction = 0.9
    """The decay of the first moment; the paper's FedAdagrad has 0."""
    beta2: Fraction = 0.99
    """The decay of Adam's and Yogi's second moment."""
    tau: Positive = 1e-3
    """How adaptive the steps are: less adaptive the larger it is."""

    def __call__(self, first: Tree, second: Tree, change: Tree) -> tuple[Tree, Tree, Tree]:
        """Return the next moments, and what is added to the adapter."""
        first = {name: torch.lerp(change[name], first[name], self.beta1) for name in change}
        second = {name: self._second(second[name], change[name].square()) for name in change}
        step = {
            name: self.learning_rate * first[name] / (second[name].sqrt() + self.tau)
            for name in change
        }
        return first, second, step

    def _second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        if self.name == "adagrad":
            return v + square
        if self.name == "yogi":
            return v - (1 - self.beta2) * square * (v - square).sign()
        return torch.lerp(square, v, self.beta2)


@dataclass(frozen=True, kw_only=True)
class FedOpt(Algorithm[State]):
    """FedDPO with an optimiser at the server: momentum, Adam, Yogi or Adagrad.

    Shared: the adapter. Private: pairs, clients' optimiser moments. Averaged: the LoRA factors'
    changes, as in FedDPO, which is momentum with `beta` 0. The server's moments never leave it.
    """

    name: Literal["fedopt"] = "fedopt"
    server: Annotated[Momentum | Adaptive, Field(discriminator="name")] = Momentum()
    """The server's optimiser."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train, no_moments)
    sums: ClassVar[int] = 1
    sends_local_steps = True

    @property
    def _program(self) -> FedDPO:
        """Return FedDPO, whose work clients do."""
        return FedDPO(local=self.local, aggregate=Factors(residual=False))

    def given(self, join_steps: int) -> tuple[Any, ...]:
        return (self._program, *super().given(join_steps))

    def init(self, fed: Federation, start: Tree) -> State:
        floor = self.server.tau**2
        second = {name: torch.full_like(tensor, floor) for name, tensor in start.items()}
        return State(start, fed.each(no_moments), trees.scale(start, 0.0), second)

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        delta, moments, metrics = fed.each(train, state.adapter, state.moments, self._program)
        first, second, change = self.server(state.first, state.second, fed.mean(delta))
        adapter = trees.add(state.adapter, change)
        return State(adapter, state.moments | moments, first, second), fed.report(metrics)

    def model(self, state: State) -> tuple[Tree]:
        return (state.adapter,)
