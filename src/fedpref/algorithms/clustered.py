"""Clustered adapters: each client trains the one of several that suits it.

Sources: Ghosh et al. 2020 (IFCA); Wu et al. 2024 (FedBiscuit).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedpref.errors import UserError
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments, own_copy
from fedpref.federation.local_training import LocalTraining, place, seeded_dropout, train_locally
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.tasks.batches import BatchSize

SHARE, COHORT = "share", "cohort"


@dataclass(frozen=True)
class State:
    """All adapters, nested by number, the one that each client uses, and its place in its data."""

    adapters: Tree
    chosen: PerClient[Tree]
    moments: PerClient[Tree]


def suitable(client: Client, adapters: Tree, clusters: int, local: LocalTraining) -> int:
    """Return the number of the adapter with the least loss on a batch of the client's own.

    The batch is four times a training batch.
    """
    tokens = local.max_tokens_per_batch
    size = BatchSize(4 * local.batch_size, tokens and 4 * tokens)
    first = trees.part(adapters, 0)
    batch = client.task.draw(first, first, client.shard, size, client.rng)
    with torch.no_grad(), seeded_dropout(client):
        losses = [
            client.task.losses(trees.part(adapters, k), batch)[0].mean().item()
            for k in range(clusters)
        ]
    # what has diverged suits nobody
    return min(range(clusters), key=lambda k: (math.isnan(losses[k]), losses[k]))


@work("clustered.train", keeps={1: "choice", 2: "moments"}, reads=("moments",))
def train(
    client: Client,
    adapters: Tree,
    moments: Tree,
    clusters: int,
    local: LocalTraining,
    first: Tree,
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the changes of all adapters, zero but for one, that one's number, and metrics.

    In between stands the client's place in its data. Of the first cohort each takes an adapter in
    turn.
    """
    number = (
        first[COHORT].tolist().index(client.id) % clusters
        if first
        else suitable(client, adapters, clusters, local)
    )
    start = trees.part(adapters, number)
    theta, moments, metrics = train_locally(client, start, local, place(moments))
    zeros = trees.scale(adapters, 0.0)
    shares = {f"{k}/{SHARE}": torch.tensor(float(k == number)) for k in range(clusters)}
    changed = trees.nest({number: trees.subtract(theta, start)})
    number_tree = {SHARE: torch.tensor(number)}
    return {**zeros, **shares, **changed}, number_tree, place(moments), metrics


@work("clustered.choose", sends=(), keeps={0: "chosen"}, reads={"choice": "choice"})
def choose(client: Client, adapters: Tree, choice: Tree) -> Tree:
    """Return the adapter of the number that the client chose."""
    return trees.part(adapters, int(choice[SHARE]))


@work("clustered.find", sends=(), keeps={0: "chosen"})
def find(client: Client, adapters: Tree, clusters: int, local: LocalTraining) -> Tree:
    """Return the adapter that suits a client which comes later."""
    return trees.part(adapters, suitable(client, adapters, clusters, local))


@dataclass(frozen=True, kw_only=True)
class Clustered(Algorithm[State]):
    """Several adapters, of which a client trains the one with the least loss on its own data.

    Shared: all adapters, at `clusters` times FedDPO's bytes. Private: pairs. Averaged: each
    adapter's LoRA factors over the clients that took it. In the first round clients take them in
    turn. Deviations from FedBiscuit: no ensemble of the adapters answers, a client uses the one
    that it took last, as it was after that round; optimiser moments are not kept.
    """

    name: Literal["clustered"] = "clustered"
    clusters: Annotated[int, Field(ge=2, le=64)] = 2
    """How many adapters there are."""
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""

    works = (train, choose, find, own_copy, no_moments)
    sums_apart = True

    def refuse_unused(self) -> None:
        if self.local.keep_optimizer:
            raise UserError(
                "algorithm.local.keep_optimizer: a client of clustered may train another adapter "
                "in each round, which moments of the last one do not fit. Set it to false."
            )

    def init(self, fed: Federation, start: Tree) -> State:
        copies = {
            k: {name: tensor.clone() for name, tensor in start.items()}
            for k in range(self.clusters)
        }
        return State(trees.nest(copies), fed.each(own_copy, start), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        first = {} if fed.round else {COHORT: torch.tensor(fed.active)}
        message, choice, moments, metrics = fed.each(
            train, state.adapters, state.moments, self.clusters, self.local, first
        )
        mean = fed.mean(message)
        shares = {k: mean[f"{k}/{SHARE}"].clamp(min=1e-9) for k in range(self.clusters)}
        adapters = {
            name: tensor + mean[name] / shares[int(name.split("/", 1)[0])]
            for name, tensor in state.adapters.items()
        }
        chosen = fed.each(choose, adapters, choice)
        new = State(adapters, state.chosen | chosen, state.moments | moments)
        return new, fed.report(metrics)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        nearest = fed.each(find, state.adapters, self.clusters, self.local)
        return State(state.adapters, state.chosen | nearest, state.moments)

    def model(self, state: State) -> tuple[PerClient[Tree]]:
        return (state.chosen,)
