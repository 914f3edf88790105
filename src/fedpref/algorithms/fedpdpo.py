"""FedPDPO: a shared adapter between heads that never leave their client.

Source: Zhu et al. 2026, "FedPDPO", arXiv 2603.19741.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from fedpref.errors import UserError
from fedpref.federation import aggregation
from fedpref.federation.aggregation import Aggregate, Factors, Product
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import PersonalState, no_moments
from fedpref.federation.local_training import joining
from fedpref.federation.personal import Personal, begin, settle
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.models.own_parts import Parts
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree

SEED = "seed"


@work("fedpdpo.begin_alike")
def begin_alike(client: Client, parts: Parts, drawn: Tree) -> Tree:
    """Return fresh parts that are the same on every client, so that their mean is one of them."""
    return client.task.parts(parts, seeds.generator(int(drawn[SEED]), "parts"))


@work("fedpdpo.train", keeps={1: "own", 2: "moments"}, reads=("own", "moments"))
def train(
    client: Client, adapter: Tree, own: Tree, moments: Tree, method: FedPDPO
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the client's message for the aggregate, its own parts, moments, and metrics."""
    received, fixed = method.aggregate.received(client, adapter)
    theta, own, moments, metrics = method.train(client, received, fixed, own, moments)
    return method.aggregate.message(client, received, theta), own, moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedPDPO(Personal, Algorithm[PersonalState]):
    """Every client trains its own parts under the adapter it received, then the adapter.

    Shared: the adapter. Private: pairs, the vocabulary head, the reward head, the bottleneck, a
    second adapter, optimiser moments. Averaged: the shared adapter, as `aggregate` says. Published
    are the vocabulary head, the reward head, the bottleneck, and which part is shared. Ours are
    the losses (`task.explicit`), the order of the phases, the learning rates, that the bottleneck
    is private, and the second adapter. The second phase also trains the client's bottleneck and
    its own adapter, and of its heads those that `freeze` does not keep fixed. `joint` trains
    everything in every step.
    """

    name: Literal["fedpdpo"] = "fedpdpo"
    share_bottleneck: bool = False
    """Average the bottleneck with the adapter; the second phase then trains it."""
    aggregate: Aggregate = Factors()
    """How clients' adapters become one."""

    works = (train, begin, begin_alike, settle, no_moments, *aggregation.WORKS)
    sums: ClassVar[int] = 1
    sends_local_steps = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share_bottleneck and isinstance(self.aggregate, Product):
            raise UserError(
                "algorithm.share_bottleneck: a bottleneck is no product of factors. Take "
                "aggregate: factors or frozen-a."
            )

    @property
    def _shared_parts(self) -> Parts:
        """Return the parts that are shared beside the adapter."""
        return Parts(head=None, bottleneck=self.parts.bottleneck, reward=False, adapter=False)

    @property
    def shares_parts_once(self) -> bool:
        return self.share_bottleneck

    def given(self, join_steps: int) -> tuple[Any, ...]:
        own = replace(self.parts, bottleneck=0)
        return (self._shared_parts, own, self.as_personal, *super().given(join_steps))

    def init(self, fed: Federation, start: Tree) -> PersonalState:
        own = self.parts
        if self.share_bottleneck and own.bottleneck:
            # the adapter is drawn by the run's seed, which clients are not told
            seed = int.from_bytes(trees.digest(start)[:7], "big")
            drawn = {SEED: torch.tensor(seed)}
            start = {**start, **fed.mean(fed.each(begin_alike, self._shared_parts, drawn))}
            own = replace(own, bottleneck=0)
        return PersonalState(start, fed.each(begin, own), fed.each(no_moments))

    def step(
        self, fed: Federation, state: PersonalState
    ) -> tuple[PersonalState, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(
            train, state.adapter, state.own, state.moments, self
        )
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        new = PersonalState(adapter, state.own | own, state.moments | moments)
        return new, {**fed.report(metrics), **residual}

    def join(self, fed: Federation, state: PersonalState, steps: int) -> PersonalState:
        own = fed.each(settle, state.adapter, state.own, joining(self.local, steps), self)
        return PersonalState(state.adapter, state.own | own, state.moments)

    def model(self, state: PersonalState) -> tuple[Tree, PerClient[Tree]]:
        return (state.adapter, state.own)
