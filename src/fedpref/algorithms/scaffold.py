"""SCAFFOLD (Karimireddy et al. 2020): control variates take out of each client's gradients what sets them apart from the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedpref import trees
from fedpref.algorithms.feddpo import no_moments
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """The shared adapter and control variate, and each client's own control variate and optimiser moments."""

    adapter: Tree
    control: Tree
    own: PerClient[Tree]
    moments: PerClient[Tree]


@work(sends=())
def begin(client: Client, start: Tree) -> Tree:
    return trees.scale(start, 0.0)


@work(sends=(0, 1))
def train(
    client: Client, adapter: Tree, control: Tree, own: Tree, moments: Tree, local: Descent
) -> tuple[Tree, Tree, Tree, Tree, Mapping[str, float]]:
    shift = trees.to(trees.subtract(control, own), client.task.device)
    seen = trees.scale(trees.to(adapter, client.task.device), 0.0)  # the mean of the client's own gradients

    def correct(theta: Tree, gradients: Tree) -> None:
        for name, gradient in gradients.items():
            seen[name].add_(gradient, alpha=1 / local.steps)
            gradient.add_(shift[name])

    theta, moments, metrics = descend(client, adapter, local, moments, correct)
    seen = trees.to(seen, torch.device("cpu"))
    return trees.subtract(theta, adapter), trees.subtract(seen, own), seen, moments, metrics


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """FedDPO whose clients descend along their gradient - own control variate + mean control variate.

    Shared: the adapter and the mean control variate. Private: pairs, own control variates, optimiser moments. Averaged: changes of
    the LoRA factors and of the control variates, twice FedDPO's bytes up and down. A client's new control variate is the mean of its
    own gradients over the round. Under plain SGD with a constant rate that is the paper's option II, which reads the same mean off the
    change of the parameters; under AdamW, whose changes are no gradients, it still is right, and it is what AdamW is then fed.
    With weights by examples and sampled clients, the mean control variate is that of the sample, scaled by its share of clients.
    """

    name: Literal["scaffold"] = "scaffold"
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    local: Descent = Descent()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, trees.scale(start, 0.0), fed.each(begin, start), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        done = fed.each(train, state.adapter, state.control, state.own, state.moments, self.local)
        delta, drift, own, moments, metrics = done
        adapter = trees.add(state.adapter, trees.scale(fed.mean(delta), self.server_learning_rate))
        control = trees.add(state.control, trees.scale(fed.mean(drift), len(fed.active) / len(fed.clients)))
        return State(adapter, control, state.own | own, state.moments | moments), fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # nothing here is a client's own

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)
