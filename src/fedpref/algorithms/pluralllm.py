"""PluralLLM: federated averaging of a predictor of groups' preferences.

Source: Srewa et al. 2025, "PluralLLM", arXiv 2503.09925.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedpref.errors import UserError
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import AdapterState, no_moments
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, Federation, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree

WEIGHT = "weight/"


@work("pluralllm.train", keeps={1: "moments"}, reads=("moments",))
def train(
    client: Client, predictor: Tree, moments: Tree, method: PluralLLM
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Return the client's change of the predictor, its optimiser moments, and metrics.

    Where points are its weight, the change is multiplied by their number, which stands beside it.
    """
    theta, moments, metrics = train_locally(client, predictor, method.local, moments)
    change = trees.subtract(theta, predictor)
    if method.weights == "points":
        if "num_points" not in metrics:
            raise UserError(
                "algorithm.weights: points are those of opinions, which the task does not count. "
                "Take weights: federation."
            )
        points = metrics["num_points"]
        change = {**trees.scale(change, points), WEIGHT: torch.tensor(points)}
    return change, moments, metrics


@dataclass(frozen=True, kw_only=True)
class PluralLLM(Algorithm[AdapterState]):
    """Groups train one predictor locally and the server averages it.

    Shared: the predictor. Private: questions used and opinions, optimiser moments. Averaged: all
    of the predictor's parameters. The released program's settings are
    configs/pluralllm-published.yaml; those of configs/pluralllm.yaml are the same numbers with its
    quirks mended.
    """

    name: Literal["pluralllm"] = "pluralllm"
    local: LocalTraining = LocalTraining()
    """How a group trains within a round."""
    weights: Literal["federation", "points"] = "federation"
    """Weigh groups as `federation.weighting` says, or by the points of their tasks in the round.

    Points are those of context and targets, and go with `federation.weighting: equal`; the paper's
    program counts those of the round's first task.
    """

    works = (train, no_moments)
    sums: ClassVar[int] = 1
    sends_local_steps = True

    @property
    def weighs_clients(self) -> bool:
        return self.weights == "points"

    def init(self, fed: Federation, start: Tree) -> AdapterState:
        return AdapterState(start, fed.each(no_moments))

    def step(
        self, fed: Federation, state: AdapterState
    ) -> tuple[AdapterState, Mapping[str, float]]:
        changes, moments, metrics = fed.each(train, state.adapter, state.moments, self)
        change = dict(fed.mean(changes))
        if self.weights == "points":
            points = float(change.pop(WEIGHT))
            change = dict(trees.scale(change, 1 / points))
        adapter = trees.add(state.adapter, change)
        return AdapterState(adapter, state.moments | moments), fed.report(metrics)

    def model(self, state: AdapterState) -> tuple[Tree]:
        return (state.adapter,)
