"""FedPDPO (Zhu et al. 2026, "FedPDPO", arXiv 2603.19741): a shared adapter between heads that never leave their client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import seeds
from fedpref.aggregation import Aggregate, Factors, Product
from fedpref.algorithms.feddpo import no_moments
from fedpref.errors import UserError
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import joining
from fedpref.models.parts import Parts
from fedpref.personalisation import Personal, begin, settle
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """What is shared, each client's own parts, and each client's optimiser moments."""

    adapter: Tree
    own: PerClient[Tree]
    moments: PerClient[Tree]


@work()
def begin_alike(client: Client, parts: Parts) -> Tree:
    return client.task.parts(parts, seeds.generator(0, "parts"))


@work()
def train(client: Client, adapter: Tree, own: Tree, moments: Tree, method: FedPDPO) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    received, fixed = method.aggregate.received(client, adapter)
    theta, own, moments, metrics = method.train(client, received, fixed, own, moments)
    return method.aggregate.message(client, received, theta), own, moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedPDPO(Personal):
    """Each round every client first trains its own parts under the adapter it received, then the adapter, with its own heads fixed.

    Shared: the adapter. Private: pairs, the vocabulary head, the reward head, the bottleneck, a second adapter, optimiser moments.
    Averaged: the shared adapter, as `aggregate` says. Published are vocabulary head, reward head, bottleneck and which part is
    shared; the losses (`task.explicit`), the order of the phases, the learning rates, that the bottleneck is private, and the second
    adapter are ours. The second phase also trains the bottleneck and the own adapter. `joint` trains everything in every step.
    """

    name: Literal["fedpdpo"] = "fedpdpo"
    share_bottleneck: bool = False  # average it with the adapter; the second phase trains it
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    pooled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share_bottleneck and isinstance(self.aggregate, Product):
            raise UserError("algorithm.share_bottleneck: a bottleneck is no product of factors; take aggregate: factors or frozen-a.")

    def init(self, fed: Federation, start: Tree) -> State:
        own = self.parts
        if self.share_bottleneck and own.bottleneck:
            shared = Parts(head=None, bottleneck=own.bottleneck, reward=False, adapter=False)
            start, own = {**start, **fed.mean(fed.each(begin_alike, shared))}, replace(own, bottleneck=0)
        return State(start, fed.each(begin, own), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(train, state.adapter, state.own, state.moments, self)
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        return State(adapter, state.own | own, state.moments | moments), {**fed.report(metrics), **residual}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        own = fed.each(settle, state.adapter, state.own, joining(self.local, steps), self)
        return State(state.adapter, state.own | own, state.moments)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter, state.own)
