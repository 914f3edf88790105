"""FIRM: clients resolve their objectives by regularised min-norm problems and send one adapter.

Source: Nourzad et al. 2025, "FIRM", arXiv 2511.16992.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.errors import UserError
from fedpref.federation import aggregation
from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments, own_copy
from fedpref.federation.critics import (
    Preference,
    about_means,
    critics,
    moved,
    train_beside_critics,
)
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.objectives import Objectives, of_last_layers, preferred
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics.min_norm import MinNorm, require_solver
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import TaskSettings
from fedpref.types import Count, Fraction


@dataclass(frozen=True)
class State:
    """The shared adapter; each client's critics, the weights of its last step, and moments."""

    adapter: Tree
    critics: PerClient[Tree]
    weights: PerClient[Tree]
    moments: PerClient[Tree]


@work(
    "firm.train",
    keeps={1: "own", 2: "weights", 3: "moments"},
    reads=("own", "weights", "moments"),
)
def train(
    client: Client, adapter: Tree, own: Tree, weights: Tree, moments: Tree, method: FIRM
) -> tuple[Tree, Tree, Tree, Tree, Mapping[str, float]]:
    """Return the client's message, its critics, last weights and moments, and metrics."""
    wanted = method.preferences.get(client.shard.name, method.preference)
    preference = preferred(wanted, client.task.objectives)
    last = weights.get("weights")

    def weigh(gram: Float[Tensor, "M M"]) -> Float[Tensor, " M"]:
        nonlocal last
        solved = method.solver(gram, preference)
        last = solved if last is None else torch.lerp(solved, last, method.smoothing)
        return last

    layers = of_last_layers(adapter, method.gram_layers) if method.gram_layers else None
    message, own, moments, metrics = train_beside_critics(
        client, adapter, own, moments, method.local, method.aggregate, Objectives(weigh, layers)
    )
    if last is None:  # a single objective
        return message, own, {}, moments, metrics
    squared = sum(metrics[f"weights/{name}"] ** 2 for name in client.task.objectives)
    return message, own, {"weights": last}, moments, {**metrics, "drift/weights": squared}


@dataclass(frozen=True, kw_only=True)
class FIRM(Algorithm[State]):
    """FedDPO's program; at every local step a client weighs its objectives by their gradients.

    Shared: the adapter. Private: prompts, answers, rewards, critics, gradients, weights, optimiser
    moments. Averaged: the adapter's changes, so that a client sends as much for any number of
    objectives. Weights solve a regularised min-norm problem over the objectives' gradients. The
    paper's abstract names all of it but the regulariser's form, the preference's, and the
    smoothing of weights, which are ours (`solver`, `smoothing`). AdamW is fed the weighted
    gradient; the paper's optimiser is not known.

    Metrics: `weights/...`, the means of clients' weights; `drift/weights` and `drift/theta`, the
    mean squared distances of clients' weights (means over their steps) and adapters from their
    means over clients, exact where clients weigh by examples; the latter is left out where
    products are averaged.
    """

    name: Literal["firm"] = "firm"
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""
    solver: MinNorm = MinNorm()
    """The min-norm problem whose solution the weights are."""
    preference: Preference = ()
    """Shares of the task's objectives, in their order; by default equal."""
    preferences: Mapping[str, Preference] = field(default_factory=dict)
    """The shares of clients, by name, that are not `preference`."""
    smoothing: Fraction = 0.0
    """The share of the last step's weights that stays."""
    gram_layers: Count | None = None
    """Find weights from the gradients of so many last layers alone; by default of all."""
    aggregate: Aggregate = Factors()
    """How clients' adapters become one."""

    works = (train, critics, own_copy, no_moments, *aggregation.WORKS)
    sums: ClassVar[int] = 1
    sends_local_steps = True
    keeps_critics: ClassVar[bool] = True

    def check_task(self, task: TaskSettings) -> None:
        require_solver()
        preferred(self.preference, task.objectives)
        for client, preference in self.preferences.items():
            preferred(preference, task.objectives, f"algorithm.preferences.{client}")

    def check_clients(self, names: tuple[str, ...]) -> None:
        if unknown := sorted(self.preferences.keys() - set(names)):
            raise UserError(
                f"algorithm.preferences: {unknown[:5]} are no clients; the clients are "
                f"{list(names)[:8]}."
            )

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(critics), fed.each(own_copy, {}), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        messages, own, weights, moments, metrics = fed.each(
            train, state.adapter, state.critics, state.weights, state.moments, self
        )
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        report = about_means(fed.report(metrics), moved(self.aggregate, state.adapter, adapter))
        new = State(adapter, state.critics | own, state.weights | weights, state.moments | moments)
        return new, {**report, **residual}

    def model(self, state: State) -> tuple[Tree]:
        return (state.adapter,)
