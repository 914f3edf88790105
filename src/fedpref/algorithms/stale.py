"""Federated DPO with bounded staleness (Jiang 2026): clients may start from an adapter that is some rounds old."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedpref import trees
from fedpref.algorithms.clustered import one
from fedpref.algorithms.feddpo import no_moments
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.trees import Tree


@dataclass(frozen=True)
class State:
    """The adapters of the last rounds, named AGE/NAME with age 0 for the newest, and each client's optimiser moments."""

    adapters: Tree
    moments: PerClient[Tree]


def drawn_age(client: Client, staleness: int) -> int:
    """How many rounds old, evenly from 0 to what is allowed and there is."""
    oldest = min(staleness, client.round)
    return int(torch.randint(oldest + 1, (), generator=client.rng)) if oldest else 0


@work()
def train(client: Client, adapters: Tree, moments: Tree, method: StaleFedDPO) -> tuple[Tree, Tree, Mapping[str, float]]:
    age = drawn_age(client, method.staleness)
    start = one(adapters, age)
    theta, moments, metrics = descend(client, start, method.local, moments)
    return trees.subtract(theta, one(adapters, 0) if method.send == "weights" else start), moments, {**metrics, "age": float(age)}


@dataclass(frozen=True, kw_only=True)
class StaleFedDPO:
    """FedDPO whose clients start from the adapter of q rounds ago, q drawn evenly from 0 to `staleness` for each client and round.

    Shared: the adapter. Private: pairs, optimiser moments. Averaged: the LoRA factors A and B, each apart. With `send: weights` the
    server's adapter becomes the mean of the clients', as in the paper's program; with `changes` their changes are added to
    it. The program knows staleness as on or off alone; the bounded form is ours. `bytes_down` counts all adapters that a
    client may start from, of which a deployed client would have received one.
    """

    name: Literal["feddpo-stale"] = "feddpo-stale"
    staleness: Annotated[int, Field(ge=0)] = 2  # rounds
    send: Literal["weights", "changes"] = "weights"
    local: Descent = Descent()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        copies = {f"{age}/{name}": tensor.clone() for age in range(self.staleness + 1) for name, tensor in start.items()}
        return State(copies, fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        delta, moments, metrics = fed.each(train, state.adapters, state.moments, self)
        newest = trees.add(one(state.adapters, 0), fed.mean(delta))
        known = [newest, *(one(state.adapters, age) for age in range(self.staleness))]
        adapters = {f"{age}/{name}": tensor for age, adapter in enumerate(known) for name, tensor in adapter.items()}
        return State(adapters, state.moments | moments), fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # nothing here is a client's own

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (one(state.adapters, 0),)
