"""FSMGDA: clients train for each objective apart, and the server weighs the mean changes.

Source: Yang et al. 2023, "Federated Multi-Objective Learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments
from fedpref.federation.critics import CriticState, Preference, critics
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.objectives import Objectives, preferred
from fedpref.federation.verbs import Client, Federation, work
from fedpref.numerics import trees
from fedpref.numerics.min_norm import MinNorm, require_solver
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import CRITIC, TaskSettings
from fedpref.types import Positive


@work("fsmgda.train", keeps={1: "own", 2: "moments"}, reads=("own", "moments"))
def train(
    client: Client, adapter: Tree, own: Tree, moments: Tree, method: FSMGDA
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the adapter's change for each objective, nested, critics, moments, metrics."""
    names = client.task.objectives
    changes: dict[int, Tree] = {}
    kept: dict[int, Tree] = {}
    critic: dict[str, Tensor] = dict(own)
    sums: dict[str, float] = {}
    for m, name in enumerate(names):
        alone = Objectives(torch.nn.functional.one_hot(torch.tensor(m), len(names)))
        theta, kept[m], metrics = train_locally(
            client,
            trees.apart(adapter, own),
            method.local,
            trees.part(moments, m),
            objectives=alone,
        )
        changes[m] = trees.subtract(trees.select(theta, adapter), adapter)
        critic |= {key: value for key, value in theta.items() if key == CRITIC + name}
        for key, value in metrics.items():
            if not key.startswith("weights/"):
                share = 1 if key.startswith("num_") else len(names)
                sums[key] = sums.get(key, 0.0) + value / share
    return trees.nest(changes), critic, trees.nest(kept), sums


@dataclass(frozen=True, kw_only=True)
class FSMGDA(Algorithm[CriticState]):
    """Every objective has local steps of its own, and the server weighs what comes of them.

    Shared: the adapter. Private: data, rewards, critics, optimiser moments. Averaged: a change of
    the adapter for each of M objectives, M times the bytes and the local steps of FIRM. Weights
    solve the min-norm problem of the mean changes, each kept between 0.001 and 0.999 as the
    paper's code does with two; a regulariser and a preference (`solver`) are not the paper's.
    Metrics: `weights/0`, `weights/1` and so on, in the order of the task's objectives.
    """

    name: Literal["fsmgda"] = "fsmgda"
    local: LocalTraining = LocalTraining()
    """How a client trains for each objective within a round."""
    solver: MinNorm = MinNorm(b=0.0)
    """The min-norm problem whose solution the weights are."""
    preference: Preference = ()
    """Shares of the task's objectives, in their order; by default equal."""
    server_learning_rate: Positive = 1.0
    """What the weighted change is multiplied by before it is added."""

    works = (train, critics, no_moments)
    keeps_critics: ClassVar[bool] = True

    def check_task(self, task: TaskSettings) -> None:
        require_solver()
        preferred(self.preference, task.objectives)

    def init(self, fed: Federation, start: Tree) -> CriticState:
        return CriticState(start, fed.each(critics), fed.each(no_moments))

    def step(self, fed: Federation, state: CriticState) -> tuple[CriticState, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(
            train, state.adapter, state.critics, state.moments, self
        )
        mean = fed.mean(messages)
        count = len(mean) // len(state.adapter)
        changes = [trees.select(trees.part(mean, m), state.adapter) for m in range(count)]
        flat = torch.stack(
            [torch.cat([change[name].flatten() for name in sorted(change)]) for change in changes]
        )
        preference = preferred(self.preference, [str(m) for m in range(count)])
        weights = self.solver(flat @ flat.T, preference).clamp(0.001, 0.999)
        shares: list[float] = (weights / weights.sum()).tolist()
        step = trees.total(
            trees.scale(change, self.server_learning_rate * share)
            for change, share in zip(changes, shares, strict=True)
        )
        report = {f"weights/{m}": share for m, share in enumerate(shares)}
        new = CriticState(
            trees.add(state.adapter, step), state.critics | own, state.moments | moments
        )
        return new, {**fed.report(metrics), **report}

    def model(self, state: CriticState) -> tuple[Tree]:
        return (state.adapter,)
