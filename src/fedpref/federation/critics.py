"""Training for several objectives beside critics, and what such algorithms report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedpref.federation.aggregation import Aggregate, Product
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.objectives import Objectives
from fedpref.federation.verbs import Client, PerClient, work
from fedpref.models.own_parts import NO_PARTS
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import NonNegative

Preference = tuple[NonNegative, ...]
"""Shares of the task's objectives, in their order."""


@dataclass(frozen=True)
class CriticState:
    """The shared adapter; each client's critics and optimiser moments."""

    adapter: Tree
    critics: PerClient[Tree]
    moments: PerClient[Tree]


@work("critics.begin", sends=(), keeps={0: "own"})
def critics(client: Client) -> Tree:
    """Return a client's critics as they begin; none if the task has none."""
    return client.task.parts(NO_PARTS, client.rng)


def train_beside_critics(
    client: Client,
    adapter: Tree,
    own: Tree,
    moments: Tree,
    local: LocalTraining,
    aggregate: Aggregate,
    objectives: Objectives,
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Train the adapter for several objectives, and each objective's critic.

    Args:
        client: Whose data is trained on.
        adapter: As it was received.
        own: The client's critics.
        moments: Of the optimiser, where they are kept.
        local: How to train.
        aggregate: How clients' adapters become one.
        objectives: How objectives are weighed.

    Returns:
        The client's message, its critics, its moments, and metrics; `drift/theta` is the squared
        length of the adapter's change.
    """
    received, fixed = aggregate.received(client, adapter)
    theta, moments, metrics = train_locally(
        client, trees.apart(received, own), local, moments, fixed=fixed, objectives=objectives
    )
    trained = trees.select(theta, received)
    squared = {"drift/theta": trees.norm(trees.subtract(trained, received)) ** 2}
    message = aggregate.message(client, received, trained)
    return message, trees.select(theta, own), moments, {**metrics, **squared}


def about_means(report: Mapping[str, float], moved: float | None) -> Mapping[str, float]:
    """Return a report whose drifts are mean squared distances from means.

    Args:
        report: Means over clients, with `drift/weights` and `drift/theta` as mean squares.
        moved: The length of the mean change; None where changes have no mean, and `drift/theta`
            is left out.
    """
    drifts = dict(report)
    if "drift/weights" in drifts:
        squares = (v**2 for name, v in report.items() if name.startswith("weights/"))
        drifts["drift/weights"] -= sum(squares)
    if moved is None:
        drifts.pop("drift/theta", None)
    elif "drift/theta" in drifts:
        drifts["drift/theta"] -= moved**2
    # an estimate of zero can be slightly negative; what is no number stays none
    return {k: max(v, 0.0) if k.startswith("drift/") else v for k, v in drifts.items()}


def moved(aggregate: Aggregate, before: Tree, after: Tree) -> float | None:
    """Return the distance that the mean adapter moved; None where products are averaged.

    Clients hold the factors of products in bases of their own, so that these have no mean.
    """
    if isinstance(aggregate, Product):
        return None
    return trees.norm(trees.subtract(after, before))
