"""FIRM (Nourzad et al. 2025, arXiv 2511.16992): clients resolve their objectives by regularised min-norm problems and send one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedpref import trees
from fedpref.aggregation import Aggregate, Factors, Product
from fedpref.algorithms.feddpo import no_moments
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, descend
from fedpref.models.parts import NO_PARTS
from fedpref.multiobjective import MinNorm
from fedpref.objectives import Objectives, of_last_layers, preferred
from fedpref.trees import Tree

Preference = tuple[float, ...]


@dataclass(frozen=True)
class State:
    """The shared adapter; each client's critics, the weights of its last step, and optimiser moments."""

    adapter: Tree
    critics: PerClient[Tree]
    weights: PerClient[Tree]
    moments: PerClient[Tree]


@work(sends=())
def critics(client: Client) -> Tree:
    """A client's critics as they begin, if the task has any."""
    return client.task.parts(NO_PARTS, client.rng)


def train_beside_critics(
    client: Client, adapter: Tree, own: Tree, moments: Tree, local: Descent, aggregate: Aggregate, objectives: Objectives
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """The client's message, its critics and moments after local training, and metrics."""
    received, fixed = aggregate.received(client, adapter)
    theta, moments, metrics = descend(client, {**received, **own}, local, moments, fixed=fixed, objectives=objectives)
    trained = trees.select(theta, received)
    squared = {"drift/theta": trees.norm(trees.subtract(trained, received)) ** 2}
    return aggregate.message(client, received, trained), trees.select(theta, own), moments, {**metrics, **squared}


def about_means(report: Mapping[str, float], moved: float | None) -> Mapping[str, float]:
    """Mean squares as mean squared distances from means: of weights, and of changes whose mean is so long (None: factors have no mean)."""
    found = dict(report)
    if "drift/weights" in found:
        found["drift/weights"] -= sum(value**2 for name, value in report.items() if name.startswith("weights/"))
    if moved is None:
        del found["drift/theta"]
    else:
        found["drift/theta"] -= moved**2
    return {name: max(0.0, value) if name.startswith("drift/") else value for name, value in found.items()}


def moved(aggregate: Aggregate, before: Tree, after: Tree) -> float | None:
    """How far the mean adapter came; None where products are averaged, whose factors clients hold in bases of their own."""
    return None if isinstance(aggregate, Product) else trees.norm(trees.subtract(after, before))


@work()
def train(
    client: Client, adapter: Tree, own: Tree, weights: Tree, moments: Tree, method: FIRM
) -> tuple[Tree, Tree, Tree, Tree, Mapping[str, float]]:
    preference = preferred(method.preferences.get(client.shard.name, method.preference), client.task.objectives)
    last = weights.get("weights")

    def weigh(gram: Float[Tensor, "M M"]) -> Float[Tensor, " M"]:
        nonlocal last
        found = method.solver(gram, preference)
        last = found if last is None else torch.lerp(found, last, method.smoothing)
        return last

    objectives = Objectives(weigh, of_last_layers(adapter, method.gram_layers) if method.gram_layers else None)
    message, own, moments, metrics = train_beside_critics(client, adapter, own, moments, method.local, method.aggregate, objectives)
    if last is None:  # a single objective
        return message, own, {}, moments, metrics
    squared = sum(metrics[f"weights/{name}"] ** 2 for name in client.task.objectives)
    return message, own, {"weights": last}, moments, {**metrics, "drift/weights": squared}


@dataclass(frozen=True, kw_only=True)
class FIRM:
    """FedDPO's program; at every local step a client weighs its objectives by a regularised min-norm problem over their gradients.

    Shared: the adapter. Private: prompts, answers, rewards, critics, gradients, weights, optimiser moments. Averaged: the adapter's
    changes, so that a client sends as much for any number of objectives. The abstract names all of it but the regulariser's form, the
    preference's, and the smoothing of weights, which are ours (`solver`, `smoothing`). AdamW is fed the weighted gradient; the
    paper's optimiser is not known. `gram_layers` takes the gradients that weights are found from on the last layers alone.

    Metrics: `weights/...`, the means of clients' weights; `drift/weights` and `drift/theta`, the mean squared distances of clients' weights
    (means over their steps) and adapters from their means over clients, exact where clients weigh by examples; the latter is left out
    where products are averaged.
    """

    name: Literal["firm"] = "firm"
    local: Descent = Descent()
    solver: MinNorm = MinNorm()
    preference: Preference = ()  # over the task's objectives, in their order; none: equal
    preferences: Mapping[str, Preference] = field(default_factory=dict)  # of clients by name, where it is not that
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share that the last step's weights keep
    gram_layers: Annotated[int, Field(ge=1)] | None = None  # None: all
    aggregate: Annotated[Aggregate, Field(discriminator="name")] = Factors()
    pooled: ClassVar[bool] = False
    keeps_critics: ClassVar[bool] = True

    def check_objectives(self, objectives: tuple[str, ...]) -> None:
        """Raise UserError where a preference does not fit the task's objectives."""
        preferred(self.preference, objectives)
        for client, preference in self.preferences.items():
            preferred(preference, objectives, f"algorithm.preferences.{client}")

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, fed.each(critics), fed.each(no_moments), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        done = fed.each(train, state.adapter, state.critics, state.weights, state.moments, self)
        messages, own, weights, moments, metrics = done
        adapter, residual = self.aggregate.merge(fed, state.adapter, messages)
        report = about_means(fed.report(metrics), moved(self.aggregate, state.adapter, adapter))
        state = State(adapter, state.critics | own, state.weights | weights, state.moments | moments)
        return state, {**report, **residual}

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # critics foretell rewards of training, they are no part of the model

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)
