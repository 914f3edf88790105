"""FedPDPO (Zhu et al. 2026, "FedPDPO", arXiv 2603.19741): a shared adapter between heads that never leave their client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import seeds, trees
from fedpref.aggregation import Aggregate, Factors, Product
from fedpref.algorithms.feddpo import no_moments
from fedpref.errors import UserError
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend, halves, joining
from fedpref.models.parts import DOWN, HEAD, HEADS, OWN_ADAPTER, UP, VOCABULARY_HEAD, Parts
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """What is shared, each client's own parts, and each client's optimiser moments."""

    adapter: Tree
    own: PerClient[Tree]
    moments: PerClient[Tree]


@work
def begin(client: Client, parts: Parts) -> Tree:
    return client.task.parts(parts, client.rng)


@work
def begin_alike(client: Client, parts: Parts) -> Tree:
    return client.task.parts(parts, seeds.generator(0, "parts"))


@work
def settle(client: Client, shared: Tree, own: Tree, personal: Descent, method: FedPDPO) -> Tree:
    return descend(client, own, personal, {}, fixed=shared, rates=method.rates(own))[0]


@work
def train(client: Client, adapter: Tree, own: Tree, moments: Tree, method: FedPDPO) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    rates = method.rates(own)
    received, fixed = method.aggregate.received(client, adapter)
    if method.phases == "joint" or not own:
        theta, moments, metrics = descend(client, {**received, **own}, method.local, moments, fixed=fixed, rates=rates)
        own = trees.select(theta, own)
    else:
        first, second = halves(method.local, method.personal_steps)
        own, kept, before = descend(client, own, first, trees.select(moments, own, "/"), fixed={**received, **fixed}, rates=rates)
        heads = trees.select(own, HEADS if method.freeze == "heads" else VOCABULARY_HEAD)
        free = {**received, **{name: tensor for name, tensor in own.items() if name not in heads}}
        moments = {**moments, **kept}
        theta, kept, metrics = descend(client, free, second, trees.select(moments, free, "/"), fixed={**fixed, **heads}, rates=rates)
        own, moments = {**heads, **trees.select(theta, own)}, {**moments, **kept}
        sums = {name: value + before[name] for name, value in metrics.items() if name.startswith("num_")}
        metrics = {**metrics, **{f"personal/{name}": value for name, value in before.items() if name not in sums}, **sums}
    return method.aggregate.message(client, received, trees.select(theta, received)), own, moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedPDPO:
    """Each round every client first trains its own parts under the adapter it received, then the adapter, with its own heads fixed.

    Shared: the adapter. Private: pairs, the vocabulary head, the reward head, the bottleneck, a second adapter, optimiser moments.
    Averaged: the shared adapter, as `aggregate` says. Published are vocabulary head, reward head, bottleneck and which part is
    shared; the losses (`task.explicit`), the order of the phases, the learning rates, that the bottleneck is private, and the second
    adapter are ours. The second phase also trains the bottleneck and the own adapter. `joint` trains everything in every step.
    """

    name: Literal["fedpdpo"] = "fedpdpo"
    parts: Parts = Parts()
    phases: Literal["alternate", "joint"] = "alternate"
    personal_steps: Annotated[int, Field(ge=1)] | None = 1  # of a round's local steps, those of the first phase; None: a third
    freeze: Literal["vocabulary-head", "heads"] = "vocabulary-head"  # in the second phase; `heads`: the reward head too
    share_bottleneck: bool = False  # average it with the adapter; the second phase trains it
    local: Descent = Descent()
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    head_rate: Annotated[float, Field(gt=0)] = 0.1  # of a full vocabulary head, times the learning rate
    bottleneck_rate: Annotated[float, Field(gt=0)] = 0.1  # likewise
    adapter_rate: Annotated[float, Field(gt=0)] = 0.2  # of the own adapter, likewise: what is common is for the shared one to learn
    pooled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.phases == "alternate":
            halves(self.local, self.personal_steps)
        if self.share_bottleneck and isinstance(self.aggregate, Product):
            raise UserError("algorithm.share_bottleneck: a bottleneck is no product of factors; take aggregate: factors or frozen-a.")

    def rates(self, own: Tree) -> Mapping[str, float]:
        """Factors of the learning rate, by name."""
        return {HEAD: self.head_rate, DOWN: self.bottleneck_rate, UP: self.bottleneck_rate} | {
            name: self.adapter_rate for name in own if name.startswith(OWN_ADAPTER)
        }

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
