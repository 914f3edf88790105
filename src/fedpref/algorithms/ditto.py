"""Ditto, for DPO: a personal adapter that is held near a shared one.

Source: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedpref.errors import UserError
from fedpref.federation.aggregation import Factors, FrozenA
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import PersonalState, no_moments, own_copy
from fedpref.federation.local_training import (
    LocalTraining,
    joining,
    place,
    pull_towards,
    train_locally,
)
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics.trees import Tree
from fedpref.types import NonNegative


@work("ditto.train_near", sends=(), keeps={0: "own"}, reads=("own",))
def train_near(
    client: Client, adapter: Tree, own: Tree, personal: LocalTraining, strength: float
) -> Tree:
    """Return the client's own adapter, trained while it is held near the shared one."""
    return near(client, adapter, own, {}, personal, strength)[0]


def near(
    client: Client, adapter: Tree, own: Tree, kept: Tree, personal: LocalTraining, strength: float
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Return the own adapter after its steps, the client's place in its data, and metrics."""
    pull = pull_towards(adapter, strength, client)
    # the shared adapter never sees it
    theta, kept, metrics = train_locally(
        client, own, personal, place(kept), pull, leaves=False, feeds=False
    )
    return theta, place(kept), metrics


@work("ditto.train", keeps={1: "own", 2: "moments"}, reads=("own", "moments"))
def train(
    client: Client, adapter: Tree, own: Tree, moments: Tree, method: Ditto
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the client's message for the aggregate, its own adapter, moments, and metrics."""
    received, fixed = method.aggregate.received(client, adapter)
    theta, moments, metrics = train_locally(client, received, method.local, moments, fixed=fixed)
    personal = method.personal or method.local
    own, seen, beside = near(client, adapter, own, moments, personal, method.strength)
    message = method.aggregate.message(client, received, theta)
    # it has seen what both are trained on; of a private step nothing is counted
    counts = {
        name: value + beside[name]
        for name, value in metrics.items()
        if name.startswith("num_") and name in beside
    }
    return message, own, {**moments, **seen}, {**metrics, **counts}


@dataclass(frozen=True, kw_only=True)
class Ditto(Algorithm[PersonalState]):
    """FedDPO, beside which every client trains an adapter of its own, held near the shared one.

    Shared: an adapter that no client uses. Private: pairs, each client's own adapter, which it
    does use. Averaged: the shared adapter's LoRA factors. `strength` is the paper's lambda; the
    own adapter's optimiser starts afresh each round. Each of the two takes the local steps, so that
    a client sees twice the pairs of FedDPO's. The own adapter is held factor by factor, so
    factors must keep their meaning over rounds: `aggregate: product` is not for it.
    """

    name: Literal["ditto"] = "ditto"
    strength: Annotated[NonNegative, Field(le=1e30)] = 0.1
    """How strongly the own adapter is pulled towards the shared one."""
    personal: LocalTraining | None = None
    """How the own adapter is trained; by default as `local`."""
    local: LocalTraining = LocalTraining()
    """How a client trains the shared adapter within a round."""
    aggregate: Annotated[Factors | FrozenA, Field(discriminator="name")] = Factors()
    """How clients' adapters become one."""

    works = (train, train_near, own_copy, no_moments)
    sums: ClassVar[int] = 1
    sends_local_steps = True

    def refuse_unused(self) -> None:
        if self.personal is not None and self.personal.keep_optimizer:
            raise UserError(
                "algorithm.personal.keep_optimizer: moments of personal adapters are not kept. Set "
                "it to false."
            )

    def init(self, fed: Federation, start: Tree) -> PersonalState:
        return PersonalState(start, fed.each(own_copy, start), fed.each(no_moments))

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
        settings = joining(self.personal or self.local, steps)
        begun = fed.each(own_copy, state.adapter)
        own = fed.each(train_near, state.adapter, begun, settings, self.strength)
        return PersonalState(state.adapter, state.own | own, state.moments)

    def model(self, state: PersonalState) -> tuple[PerClient[Tree]]:
        return (state.own,)
