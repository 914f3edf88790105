"""SCAFFOLD, for DPO: control variates correct each client's gradients for its drift.

Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Positive


@dataclass(frozen=True)
class State:
    """The shared adapter and control variate; each client's own, and its optimiser moments."""

    adapter: Tree
    control: Tree
    own: PerClient[Tree]
    moments: PerClient[Tree]


@work("scaffold.begin")
def begin(client: Client, start: Tree) -> Tree:
    """Return a control variate of zero."""
    return trees.scale(start, 0.0)


@work("scaffold.train", sends=(0, 1, 2), keeps={3: "moments"}, reads=("moments",))
def train(
    client: Client, adapter: Tree, control: Tree, own: Tree, moments: Tree, local: LocalTraining
) -> tuple[Tree, Tree, Tree, Tree, Mapping[str, float]]:
    """Return the changes of adapter and control variate, the new one, moments, and metrics."""
    device = client.task.device
    shift = trees.to(trees.subtract(control, own), device)
    seen = trees.scale(trees.to(adapter, device), 0.0)  # the mean of the client's own gradients

    def correct(theta: Tree, gradients: Tree) -> None:
        for name, gradient in gradients.items():
            seen[name].add_(gradient, alpha=1 / local.steps)
            gradient.add_(shift[name])

    theta, moments, metrics = train_locally(client, adapter, local, moments, correct)
    seen = trees.to(seen, torch.device("cpu"))
    return trees.subtract(theta, adapter), trees.subtract(seen, own), seen, moments, metrics


@dataclass(frozen=True, kw_only=True)
class Scaffold(Algorithm[State]):
    """FedDPO whose clients follow their gradient - own control variate + mean control variate.

    Shared: the adapter and the mean control variate. Private: pairs, optimiser moments; own control
    variates stay where they are, but are the sums of what is sent of them. Averaged: changes of the
    LoRA factors and of the control variates, twice FedDPO's bytes up and down. A client's new
    control variate is the mean of its own gradients over the round. Under plain SGD with a constant
    rate that is the paper's option II, which reads the same mean off the change of the parameters;
    under AdamW, whose changes are no gradients, it still is right, and it is what AdamW is then
    fed. Deviation: the paper's clients weigh alike; here the mean control variate is the mean of
    all clients' own by whatever weights the means have, also where some of the clients are drawn,
    so that the weighted optimum stays fixed.
    """

    name: Literal["scaffold"] = "scaffold"
    server_learning_rate: Positive = 1.0
    """What the mean change is multiplied by before it is added."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train, begin, no_moments)
    sums: ClassVar[int] = 2
    sends_local_steps = True

    def init(self, fed: Federation, start: Tree) -> State:
        own = fed.each(begin, start)
        return State(start, trees.scale(start, 0.0), own, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        delta, drift, own, moments, metrics = fed.each(
            train, state.adapter, state.control, state.own, state.moments, self.local
        )
        change = trees.scale(fed.mean(delta), self.server_learning_rate)
        # the mean is over the cohort; clients that were not drawn keep their control variates, so
        # that the weighted mean over all moves by the cohort's share of the weight
        moved = trees.scale(fed.mean(drift), fed.share)
        adapter, control = trees.add(state.adapter, change), trees.add(state.control, moved)
        new = State(adapter, control, state.own | own, state.moments | moments)
        return new, fed.report(metrics)

    def model(self, state: State) -> tuple[Tree]:
        return (state.adapter,)
