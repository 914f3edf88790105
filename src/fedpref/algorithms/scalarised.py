"""Linear scalarisation: federated averaging on a fixed weighted sum of objectives, of one of them alone if the others weigh nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref.aggregation import Aggregate, Factors
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.firm import Preference, about_means, critics, moved, train_beside_critics
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent
from fedpref.objectives import Objectives, preferred
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """The shared adapter; each client's critics and optimiser moments."""

    adapter: Tree
    critics: PerClient[Tree]
    moments: PerClient[Tree]


@work()
def train(client: Client, adapter: Tree, own: Tree, moments: Tree, method: Scalarised) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    objectives = Objectives(preferred(method.preference, client.task.objectives))
    return train_beside_critics(client, adapter, own, moments, method.local, method.aggregate, objectives)


@dataclass(frozen=True, kw_only=True)
class Scalarised:
    """FIRM with weights that nothing moves: its limit for a strong regulariser.

    Shared: the adapter. Private: data, rewards, critics, optimiser moments. Averaged: the adapter's changes.
    """

    name: Literal["scalarised"] = "scalarised"
    local: Descent = Descent()
    preference: Preference = ()  # over the task's objectives, in their order; none: equal
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    pooled: ClassVar[bool] = False
    keeps_critics: ClassVar[bool] = True

    def check_objectives(self, objectives: tuple[str, ...]) -> None:
        """Raise UserError where the preference does not fit the task's objectives."""
        preferred(self.preference, objectives)

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(critics), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(train, state.adapter, state.critics, state.moments, self)
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        report = about_means(fed.report(metrics), moved(self.aggregate, state.adapter, adapter))
        return State(adapter, state.critics | own, state.moments | moments), {**report, **residual}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # critics foretell rewards of training, they are no part of the model

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)
