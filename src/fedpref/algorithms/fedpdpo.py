"""FedPDPO (Zhu et al. 2026, "FedPDPO", arXiv 2603.19741): a shared adapter between heads that never leave their client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import trees
from fedpref.aggregation import Aggregate, Factors
from fedpref.algorithms.feddpo import no_moments
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend, joining
from fedpref.models.parts import HEAD, HEADS, OWN_ADAPTER, Parts
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """The shared adapter, each client's own parts, and each client's optimiser moments."""

    adapter: Tree
    own: PerClient[Tree]
    moments: PerClient[Tree]


@work
def begin(client: Client, parts: Parts) -> Tree:
    return client.task.parts(parts, client.rng)


@work
def personalise(client: Client, shared: Tree, own: Tree, personal: Descent) -> Tree:
    """Train what is the client's own, beside what is shared."""
    return descend(client, own, personal, {}, fixed=shared)[0]


@work
def settle(client: Client, shared: Tree, own: Tree, personal: Descent, method: FedPDPO) -> Tree:
    return descend(client, own, personal, {}, fixed=shared, rates=method.rates(own))[0]


@work
def train(client: Client, adapter: Tree, own: Tree, moments: Tree, method: FedPDPO) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    rates, personal = method.rates(own), replace(method.local, steps=method.personal_steps or method.local.steps)
    received, fixed = method.aggregate.received(client, adapter)
    if method.phases == "joint" or not own:
        theta, moments, metrics = descend(client, {**received, **own}, method.local, moments, fixed=fixed, rates=rates)
        own = trees.select(theta, own)
    else:
        own, kept, first = descend(client, own, personal, trees.select(moments, own, "/"), fixed=adapter, rates=rates)
        heads = trees.select(own, HEADS)
        free = {**received, **{name: tensor for name, tensor in own.items() if name not in heads}}
        before = trees.select({**moments, **kept}, free, "/")
        theta, moments, metrics = descend(client, free, method.local, before, fixed={**fixed, **heads}, rates=rates)
        own = {**heads, **trees.select(theta, own)}
        moments = {**kept, **moments}
        metrics = {**metrics, **{f"personal/{name}": value for name, value in first.items() if not name.startswith("num_")}}
    return method.aggregate.message(client, received, trees.select(theta, received)), own, moments, metrics


@dataclass(frozen=True, kw_only=True)
class FedPDPO:
    """Each round every client first trains its own parts under the adapter it received, then the adapter between its own parts.

    Shared: the adapter. Private: pairs, the vocabulary head, the reward head, the bottleneck, optimiser moments. Averaged: the LoRA
    factors A and B, each apart. Published are the parts and which of them is shared; the losses (`task.explicit`), the order of the
    phases, the learning rates and that the bottleneck is private are ours. `joint` trains everything at once for `local.steps`.
    """

    name: Literal["fedpdpo"] = "fedpdpo"
    parts: Parts = Parts()
    phases: Literal["alternate", "joint"] = "alternate"
    personal_steps: Annotated[int, Field(ge=1)] | None = None  # of the first phase; None: as many as of the second
    local: Descent = Descent()  # the second phase, and how the first trains
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    head_rate: Annotated[float, Field(gt=0)] = 0.1  # of a full vocabulary head, times the learning rate
    adapter_rate: Annotated[float, Field(gt=0)] = 0.3  # of the own adapter, likewise: what is common is for the shared one to learn
    pooled: ClassVar[bool] = False

    def rates(self, own: Tree) -> Mapping[str, float]:
        """Factors of the learning rate, by name."""
        return {HEAD: self.head_rate} | {name: self.adapter_rate for name in own if name.startswith(OWN_ADAPTER)}

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(begin, self.parts), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(train, state.adapter, state.own, state.moments, self)
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        return State(adapter, state.own | own, state.moments | moments), {**fed.report(metrics), **residual}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        own = fed.each(settle, state.adapter, state.own, joining(self.local, steps), self)
        return State(state.adapter, state.own | own, state.moments)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter, state.own)
