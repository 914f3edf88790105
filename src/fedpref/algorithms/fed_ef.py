"""Federated averaging of sparse or low-rank changes with error feedback, for DPO.

Source: Li and Li 2023, "Analysis of Error Feedback in Federated Non-Convex Optimization with Biased
Compression: Fast Convergence and Partial Participation" (Fed-EF with SGD's server step). Low rank
in place of few entries is ours there; of gradients it is PowerSGD's (Vogels et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Count, Portion, Positive


@dataclass(frozen=True)
class State:
    """The shared adapter; what each client has not yet sent, and its optimiser moments."""

    adapter: Tree
    unsent: PerClient[Tree]
    moments: PerClient[Tree]


@work("fed-ef.begin", sends=(), keeps={0: "unsent"})
def begin(client: Client) -> Tree:
    """Return what a client has not yet sent: nothing."""
    return {}


@work("fed-ef.train", keeps={1: "unsent", 2: "moments"}, reads=("unsent", "moments"))
def train(
    client: Client, adapter: Tree, unsent: Tree, moments: Tree, method: FedEF
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return what is sent of the change, what is left of it, moments, and metrics."""
    theta, moments, metrics = train_locally(client, adapter, method.local, moments)
    change = trees.subtract(theta, adapter)
    due = trees.add(change, unsent) if unsent else change
    if method.rank is None:
        sent = trees.sparse(due, method.fraction)
    else:
        sent = trees.low_rank(due, method.rank)
    return sent, trees.subtract(due, sent), moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedEF(Algorithm[State]):
    """FedDPO whose clients send the most of their change in few numbers, and the rest later.

    Shared: the adapter. Private: pairs, optimiser moments, and what of a client's changes was not
    yet sent, which is added to its next one. Averaged: what is sent of changes of the LoRA
    factors; where a client sends nothing, its share is zero. What everybody is sent is whole. A
    client takes what it has sent for arrived: where it then falls out of the sum, that is lost.
    """

    name: Literal["fed-ef"] = "fed-ef"
    fraction: Portion = 0.05
    """The share of each tensor's entries that is sent, those of the largest magnitude."""
    rank: Count | None = None
    """Send of each matrix so many of its singular values, the largest ones, as two thin factors, in
    place of entries; null sends entries."""
    server_learning_rate: Positive = 1.0
    """What the mean change is multiplied by before it is added."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train, begin, no_moments)
    sums: ClassVar[int] = 1
    sends_local_steps = True

    @property
    def compression(self) -> Mapping[str, Any]:
        if self.rank is None:
            return {"name": "top-k", "fraction": self.fraction}
        return {"name": "low-rank", "rank": self.rank}

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(begin), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        sent, unsent, moments, metrics = fed.each(
            train, state.adapter, state.unsent, state.moments, self
        )
        change = trees.scale(fed.mean(sent), self.server_learning_rate)
        adapter = trees.add(state.adapter, change)
        new = State(adapter, state.unsent | unsent, state.moments | moments)
        return new, fed.report(metrics)

    def model(self, state: State) -> tuple[Tree]:
        return (state.adapter,)
