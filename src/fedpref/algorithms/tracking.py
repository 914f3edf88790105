"""Gradient tracking with local steps, for DPO (K-GT: Liu et al. 2023, "Decentralized Gradient Tracking with Local Steps")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedpref import trees
from fedpref.algorithms.decdpo import measured
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.fedsa import begin
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """Each client's adapter, the correction of its gradients, and its optimiser moments (empty where they are not kept)."""

    theta: PerClient[Tree]
    correction: PerClient[Tree]
    moments: PerClient[Tree]


@work(sends=(0, 1))
def train(client: Client, theta: Tree, correction: Tree, moments: Tree, local: Descent) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    shift = trees.to(correction, client.task.device)
    seen = trees.scale(trees.to(theta, client.task.device), 0.0)  # the mean of the corrected gradients

    def correct(theta: Tree, gradients: Tree) -> None:
        for name, gradient in gradients.items():
            gradient.add_(shift[name])
            seen[name].add_(gradient, alpha=1 / local.steps)

    theta, moments, metrics = descend(client, theta, local, moments, correct)
    return theta, trees.to(seen, torch.device("cpu")), moments, metrics


@work(sends=())
def track(client: Client, correction: Tree, seen: Tree, mixed: Tree) -> Tree:
    return trees.add(correction, trees.subtract(mixed, seen))


@dataclass(frozen=True, kw_only=True)
class GradientTracking:
    """DecDPO whose clients correct their gradients by what sets them apart from their neighbours', so that no drift is left.

    Shared with neighbours: the adapter and the round's mean corrected gradient, twice DecDPO's bytes. Private: pairs, corrections,
    optimiser moments. Averaged: the LoRA factors A and B, each apart, and the gradients. Corrections sum to zero over clients. The mean
    gradient is summed up over the local steps; under plain SGD that is what the paper reads off the change of the parameters,
    and under AdamW, whose changes are no gradients, it still is one.
    """

    name: Literal["gradient-tracking"] = "gradient-tracking"
    local: Descent = Descent()
    pooled: ClassVar[bool] = False
    gossips: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        return State(fed.each(begin, start), fed.each(begin, trees.scale(start, 0.0)), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        theta, seen, moments, metrics = fed.each(train, state.theta, state.correction, state.moments, self.local)
        _, mean = fed.mix(seen)
        correction = fed.each(track, state.correction, seen, mean)
        _, mixed = fed.mix(theta)
        new = State(state.theta | mixed, state.correction | correction, state.moments | moments)
        return new, {**fed.report(metrics), **measured(fed, theta, mixed)}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # a client that comes later has no neighbour to take an adapter from

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.theta,)
