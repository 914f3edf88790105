"""PluralLLM (Srewa et al. 2025, arXiv 2503.09925): federated averaging of a predictor of groups' preferences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedpref import trees
from fedpref.algorithms.feddpo import State, no_moments
from fedpref.errors import UserError
from fedpref.federation import Client, Federation, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree

WEIGHT = "weight/"


@work()
def train(client: Client, predictor: Tree, moments: Tree, method: PluralLLM) -> tuple[Tree, Tree, Mapping[str, float]]:
    """The client's change of the predictor; where points are its weight, times how many it has seen, which stand beside."""
    theta, moments, metrics = descend(client, predictor, method.local, moments)
    change = trees.subtract(theta, predictor)
    if method.weights == "points":
        if "num_points" not in metrics:
            raise UserError("algorithm.weights: points are those of opinions, which the task does not count. Take weights: federation.")
        points = metrics["num_points"]
        change = {**trees.scale(change, points), WEIGHT: torch.tensor(points)}
    return change, moments, metrics


@dataclass(frozen=True, kw_only=True)
class PluralLLM:
    """Groups train one predictor locally and the server averages it.

    Shared: the predictor. Private: questions used and opinions, optimiser moments. Averaged: all of the predictor's parameters, weighted as
    `federation.weighting` says, or by the points, of context and targets, that a group's tasks happened to have in the round (`weights:
    points`, beside `federation.weighting: equal`; the paper's program counts those of the round's first task). The released program's
    settings are configs/pluralllm-published.yaml; those of configs/pluralllm.yaml are the same numbers with its quirks mended.
    """

    name: Literal["pluralllm"] = "pluralllm"
    local: Descent = Descent()
    weights: Literal["federation", "points"] = "federation"
    pooled: ClassVar[bool] = False

    @property
    def weighs_clients(self) -> bool:
        """Whether clients' weights are the algorithm's own."""
        return self.weights == "points"

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        changes, moments, metrics = fed.each(train, state.adapter, state.moments, self)
        mean = dict(fed.mean(changes))
        change = trees.scale(mean, 1 / float(mean.pop(WEIGHT))) if self.weights == "points" else mean
        return State(trees.add(state.adapter, change), state.moments | moments), fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # a group that comes later is told apart by its context alone

    def model(self, state: State) -> tuple[Tree, ...]:
        return (state.adapter,)
