"""FedPDPO (Zhu et al. 2026, "FedPDPO", arXiv 2603.19741): a shared adapter between heads that never leave their client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref import trees
from fedpref.aggregation import Aggregate, Factors
from fedpref.algorithms.feddpo import no_moments
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend, joining
from fedpref.models.parts import HEAD, Parts
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
def personalise(client: Client, shared: Tree, own: Tree, personal: Descent, head_rate: float = 1.0) -> Tree:
    """Train what is the client's own, beside what is shared."""
    return descend(client, own, personal, {}, fixed=shared, rates={HEAD: head_rate})[0]


@work
def train(client: Client, adapter: Tree, own: Tree, moments: Tree, method: FedPDPO) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    rates, personal = {HEAD: method.head_rate}, method.personal or method.local
    received, fixed = method.aggregate.received(client, adapter)
    if method.phases == "joint" or not own:
        theta, moments, metrics = descend(client, {**received, **own}, method.local, moments, fixed=fixed, rates=rates)
        own = trees.select(theta, own)
    else:
        own, kept, before = descend(client, own, personal, trees.select(moments, own, "/"), fixed=adapter, rates=rates)
        theta, moments, metrics = descend(client, received, method.local, trees.select(moments, received, "/"), fixed={**fixed, **own})
        moments = {**moments, **kept}
        metrics = {**metrics, **{f"personal/{name}": value for name, value in before.items() if not name.startswith("num_")}}
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
    personal: Descent | None = None  # the first phase; None: as the second
    local: Descent = Descent()  # the second
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    head_rate: Annotated[float, Field(gt=0)] = 0.1  # of a full vocabulary head, times the phase's learning rate
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(begin, self.parts), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        messages, own, moments, metrics = fed.each(train, state.adapter, state.own, state.moments, self)
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        return State(adapter, state.own | own, state.moments | moments), {**fed.report(metrics), **residual}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        own = fed.each(personalise, state.adapter, state.own, joining(self.personal or self.local, steps), self.head_rate)
        return State(state.adapter, state.own | own, state.moments)

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter, state.own)
