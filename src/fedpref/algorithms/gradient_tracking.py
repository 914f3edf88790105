"""Gradient tracking with local steps, for DPO.

Source: Liu et al. 2023, "Decentralized Gradient Tracking with Local Steps" (K-GT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments, own_copy
from fedpref.federation.consensus import consensus_metrics, projected
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree


@dataclass(frozen=True)
class State:
    """Each client's adapter, the correction of its gradients, and its optimiser moments."""

    theta: PerClient[Tree]
    correction: PerClient[Tree]
    moments: PerClient[Tree]


@work(
    "gradient-tracking.train",
    sends=(),
    tells=(0, 1),
    keeps={0: "theta", 1: "seen", 2: "moments"},
    reads=("theta", "correction", "moments"),
)
def train(
    client: Client, theta: Tree, correction: Tree, moments: Tree, local: LocalTraining
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the adapter, the mean of the corrected gradients, moments, and metrics."""
    device = client.task.device
    shift = trees.to(correction, device)
    seen = trees.scale(trees.to(theta, device), 0.0)

    def correct(theta: Tree, gradients: Tree) -> None:
        for name, gradient in gradients.items():
            gradient.add_(shift[name])
            seen[name].add_(gradient, alpha=1 / local.steps)

    theta, moments, metrics = train_locally(client, theta, local, moments, correct)
    return theta, trees.to(seen, torch.device("cpu")), moments, metrics


@work(
    "gradient-tracking.track",
    sends=(),
    keeps={0: "correction"},
    reads={"correction": "correction", "seen": "seen", "mixed": "seen"},
)
def track(client: Client, correction: Tree, seen: Tree, mixed: Tree) -> Tree:
    """Return the next correction: what sets the client's gradient apart from its neighbours'."""
    return trees.add(correction, trees.subtract(mixed, seen))


@dataclass(frozen=True, kw_only=True)
class GradientTracking(Algorithm[State]):
    """DecDPO whose clients correct their gradients by what sets them apart from their neighbours'.

    Shared with neighbours: the adapter and the round's mean corrected gradient, twice DecDPO's
    bytes. Private: pairs, corrections, optimiser moments. Averaged: the LoRA factors A and B, each
    apart, and the gradients. Corrections sum to zero over clients. The mean gradient is summed up
    over the local steps; under plain SGD that is what the paper reads off the change of the
    parameters, and under AdamW, whose changes are no gradients, it still is one.
    """

    name: Literal["gradient-tracking"] = "gradient-tracking"
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train, track, own_copy, no_moments, projected)
    sends_local_steps = True
    gossips: ClassVar[bool] = True
    tells_models: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        theta = fed.each(own_copy, start)
        return State(theta, fed.each(own_copy, trees.scale(start, 0.0)), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        theta, seen, moments, metrics = fed.each(
            train, state.theta, state.correction, state.moments, self.local
        )
        _, mean = fed.mix(seen)
        correction = fed.each(track, state.correction, seen, mean)
        _, mixed = fed.mix(theta)
        new = State(state.theta | mixed, state.correction | correction, state.moments | moments)
        return new, {**fed.report(metrics), **consensus_metrics(fed, theta, mixed)}

    def model(self, state: State) -> tuple[PerClient[Tree]]:
        return (state.theta,)
