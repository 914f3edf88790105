"""Clustered adapters: clients train the one of several that suits them (Ghosh et al. 2020; FedBiscuit, Wu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedpref import trees
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend, seeded_dropout
from fedpref.tasks.task import BatchSize
from fedpref.trees import Tree

SHARE = "share"


@dataclass(frozen=True)
class State:
    """All adapters, named NUMBER/NAME, and the one that each client uses."""

    adapters: Tree
    chosen: PerClient[Tree]


def one(adapters: Tree, number: int) -> Tree:
    """The adapter of this number."""
    return {name.split("/", 1)[1]: tensor for name, tensor in adapters.items() if name.startswith(f"{number}/")}


def suitable(client: Client, adapters: Tree, clusters: int, local: Descent) -> int:
    """The number of the adapter with the least loss on a batch of the client's own, four times a training batch."""
    batch = client.task.draw(one(adapters, 0), one(adapters, 0), client.shard, BatchSize(4 * local.batch_size), client.rng)
    with torch.no_grad(), seeded_dropout(client):
        losses = [client.task.losses(one(adapters, k), batch)[0].mean().item() for k in range(clusters)]
    return min(range(clusters), key=losses.__getitem__)


@work(sends=())
def begin(client: Client, adapter: Tree) -> Tree:
    return adapter


@work()
def train(client: Client, adapters: Tree, clusters: int, local: Descent) -> tuple[Tree, Tree, Mapping[str, float]]:
    number = client.id % clusters
    if client.round:
        number = suitable(client, adapters, clusters, local)
    start = one(adapters, number)
    theta, _, metrics = descend(client, start, local, {})
    message = trees.scale(adapters, 0.0)
    message = {**message, **{f"{k}/{SHARE}": torch.tensor(float(k == number)) for k in range(clusters)}}
    changed = {f"{number}/{name}": tensor for name, tensor in trees.subtract(theta, start).items()}
    return {**message, **changed}, {SHARE: torch.tensor(number)}, metrics


@work(sends=())
def choose(client: Client, adapters: Tree, choice: Tree) -> Tree:
    return one(adapters, int(choice[SHARE]))


@work(sends=())
def find(client: Client, adapters: Tree, clusters: int, local: Descent) -> Tree:
    return one(adapters, suitable(client, adapters, clusters, local))


@dataclass(frozen=True, kw_only=True)
class Clustered:
    """`clusters` adapters; each round a client takes the one with the least loss on a batch of its own, and trains that.

    Shared: all adapters, at `clusters` times FedDPO's bytes. Private: pairs. Averaged: each adapter's LoRA factors over the clients that
    took it. In the first round clients take them in turn. Deviations from FedBiscuit: no ensemble of the adapters answers, a client
    uses the one that it took last, as it was after that round; optimiser moments are not kept.
    """

    name: Literal["clustered"] = "clustered"
    clusters: Annotated[int, Field(ge=2)] = 2
    local: Descent = Descent()
    pooled: ClassVar[bool] = False

    def init(self, fed: Federation, start: Tree) -> State:
        return State(
            {f"{k}/{name}": tensor.clone() for k in range(self.clusters) for name, tensor in start.items()}, fed.each(begin, start)
        )

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        message, choice, metrics = fed.each(train, state.adapters, self.clusters, self.local)
        mean = fed.mean(message)
        adapters = {
            name: tensor + mean[name] / mean[f"{name.split('/', 1)[0]}/{SHARE}"].clamp(min=1e-9) for name, tensor in state.adapters.items()
        }
        return State(adapters, state.chosen | fed.each(choose, adapters, choice)), fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return State(state.adapters, state.chosen | fed.each(find, state.adapters, self.clusters, self.local))

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.chosen,)
