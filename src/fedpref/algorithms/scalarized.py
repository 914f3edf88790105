"""Linear scalarisation: federated averaging on a fixed weighted sum of objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpref.federation import aggregation
from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments
from fedpref.federation.critics import (
    CriticState,
    Preference,
    about_means,
    critics,
    moved,
    train_beside_critics,
)
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.objectives import Objectives, preferred
from fedpref.federation.verbs import Client, Federation, work
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import TaskSettings


@work("scalarized.train", keeps={1: "own", 2: "moments"}, reads=("own", "moments"))
def train(
    client: Client, adapter: Tree, own: Tree, moments: Tree, method: Scalarized
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the client's message for the aggregate, its critics, moments, and metrics."""
    objectives = Objectives(preferred(method.preference, client.task.objectives))
    return train_beside_critics(
        client, adapter, own, moments, method.local, method.aggregate, objectives
    )


@dataclass(frozen=True, kw_only=True)
class Scalarized(Algorithm[CriticState]):
    """FIRM with weights that nothing moves: its limit for a strong regulariser.

    Shared: the adapter. Private: data, rewards, critics, optimiser moments. Averaged: the
    adapter's changes. With all weight on one objective the others are ignored.
    """

    name: Literal["scalarized"] = "scalarized"
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""
    preference: Preference = ()
    """The weights of the task's objectives, in their order; by default equal."""
    aggregate: Aggregate = Factors()
    """How clients' adapters become one."""

    works = (train, critics, no_moments, *aggregation.WORKS)
    sums: ClassVar[int] = 1
    sends_local_steps = True
    keeps_critics: ClassVar[bool] = True

    def check_task(self, task: TaskSettings) -> None:
        preferred(self.preference, task.objectives)

    def init(self, fed: Federation, start: Tree) -> CriticState:
        return CriticState(start, fed.each(critics), fed.each(no_moments))

    def step(self, fed: Federation, state: CriticState) -> tuple[CriticState, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(
            train, state.adapter, state.critics, state.moments, self
        )
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        report = about_means(fed.report(metrics), moved(self.aggregate, state.adapter, adapter))
        new = CriticState(adapter, state.critics | own, state.moments | moments)
        return new, {**report, **residual}

    def model(self, state: CriticState) -> tuple[Tree]:
        return (state.adapter,)
