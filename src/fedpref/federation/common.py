"""What many algorithms share: works of a few lines, and the states of the usual kinds of method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import COPY, MOMENTS, Client, PerClient, work
from fedpref.numerics.trees import Tree


@dataclass(frozen=True)
class AdapterState:
    """The shared adapter, and each client's optimiser moments (empty where they are not kept)."""

    adapter: Tree
    moments: PerClient[Tree]


@dataclass(frozen=True)
class PersonalState:
    """What is shared, each client's own parts, and each client's optimiser moments."""

    adapter: Tree
    own: PerClient[Tree]
    moments: PerClient[Tree]


@work("common.no_moments", keeps={0: MOMENTS})
def no_moments(client: Client) -> Tree:
    """Return the moments of an optimiser that has not begun: none."""
    return {}


@work("common.own_copy", keeps={0: COPY})
def own_copy(client: Client, tree: Tree) -> Tree:
    """Return the tree that everybody was sent, which from now on is the client's own."""
    return tree


@work(
    "common.train_own",
    sends=(),
    tells=(0,),
    keeps={0: "theta", 1: "moments"},
    reads=("theta", "moments"),
)
def train_own(
    client: Client, fixed: Tree, theta: Tree, moments: Tree, local: LocalTraining
) -> tuple[Tree, Tree, Mapping[str, float]]:
    """Train a client's own adapter, which may be sent to neighbours, beside what stays fixed.

    Args:
        client: Who trains.
        fixed: Parameters that stay.
        theta: The client's own adapter.
        moments: Optimiser moments, empty to begin afresh.
        local: Steps, batches, optimiser and schedule.

    Returns:
        The trained adapter, moments, metrics.
    """
    return train_locally(client, theta, local, moments, fixed=fixed)


@work("common.personalize", sends=(), keeps={0: "own"}, reads=("own",))
def personalize(client: Client, shared: Tree, own: Tree, local: LocalTraining) -> Tree:
    """Return the client's own parts, trained beside what is shared."""
    return train_locally(client, own, local, {}, fixed=shared, leaves=False)[0]


def drawn_age(client: Client, staleness: int) -> int:
    """Return an age in rounds, drawn uniformly from 0 to `staleness` or the rounds so far."""
    oldest = min(staleness, client.round)
    return int(torch.randint(oldest + 1, (), generator=client.rng)) if oldest else 0
