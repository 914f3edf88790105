"""FedCMOO (Askin et al. 2025): the server finds one set of weights a round, from compressed gradients of all clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedpref import trees
from fedpref.aggregation import Factors, signs
from fedpref.algorithms.feddpo import no_moments
from fedpref.algorithms.firm import about_means, critics, train_beside_critics
from fedpref.federation import Client, Federation, PerClient, work
from fedpref.local import Descent, seeded_dropout
from fedpref.multiobjective import descended
from fedpref.objectives import Objectives, jacobian
from fedpref.tasks.task import BatchSize
from fedpref.trees import Tree

WEIGHTS = "weights"


@dataclass(frozen=True)
class State:
    """The shared adapter and the server's weights; each client's critics and optimiser moments."""

    adapter: Tree
    weights: Tree
    critics: PerClient[Tree]
    moments: PerClient[Tree]


@work()
def sketch(client: Client, adapter: Tree, own: Tree, method: FedCMOO) -> Tree:
    """The objectives' gradients on a batch, each summed up in groups with random signs: as many numbers in all as the adapter has."""
    task = client.task
    params = trees.to({**adapter, **own}, task.device)
    theta = {name: params[name].clone().requires_grad_() for name in adapter}
    with seeded_dropout(client):
        batch = task.draw(params, params, client.shard, BatchSize(method.local.batch_size, method.local.max_tokens_per_batch), client.rng)
        losses, _ = task.losses({**params, **theta}, batch)
        rows = jacobian(losses, theta).cpu()
    width = rows.shape[1]
    groups = max(1, width // len(rows))
    signed = torch.nn.functional.pad(rows * signs(width, client.round), (0, -width % groups))
    return {"sketch": signed.view(len(rows), groups, -1).sum(2)}


@work()
def train(
    client: Client, adapter: Tree, own: Tree, weights: Tree, moments: Tree, method: FedCMOO
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    return train_beside_critics(client, adapter, own, moments, method.local, method.aggregate, Objectives(weights[WEIGHTS]))


@dataclass(frozen=True, kw_only=True)
class FedCMOO:
    """Weights are the server's and hold for a round.

    Shared: the adapter, the weights. Private: data, rewards, critics, optimiser moments. Averaged: sketches of the objectives' gradients on
    one batch, an adapter's worth of numbers, then the adapter's changes: twice FIRM's bytes up. Deviations: the sketch is linear, so
    that a mean of sketches is the sketch of the mean (random signs, the same on all clients; the paper has a randomised singular value
    decomposition, whose cross terms cost a second way down and up); the sketched batch's gradient is not used as the first local step.
    """

    name: Literal["fedcmoo"] = "fedcmoo"
    local: Descent = Descent()
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    weights_learning_rate: Annotated[float, Field(gt=0)] = 0.001  # of the server's projected steps
    weights_iterations: Annotated[int, Field(ge=1)] = 1000
    aggregate: ClassVar[Factors] = Factors(residual=False)
    pooled: ClassVar[bool] = False
    keeps_critics: ClassVar[bool] = True

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, {}, fed.each(critics), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        rows = fed.mean(fed.each(sketch, state.adapter, state.critics, self))["sketch"]
        weights = self.weigh(rows @ rows.T, state.weights.get(WEIGHTS))
        messages, own, moments, metrics = fed.each(train, state.adapter, state.critics, {WEIGHTS: weights}, state.moments, self)
        change = fed.mean(messages)
        adapter = trees.add(state.adapter, trees.scale(change, self.server_learning_rate))
        report = about_means(fed.report(metrics), trees.norm(change))
        return State(adapter, {WEIGHTS: weights}, state.critics | own, state.moments | moments), report

    def weigh(self, gram: Float[Tensor, "M M"], last: Float[Tensor, " M"] | None) -> Float[Tensor, " M"]:
        """The next weights: of gradients of a mean length of one, from the last weights."""
        scaled = gram / (gram.diagonal() + 1e-4).sqrt().mean() ** 2
        start = torch.full((len(gram),), 1 / len(gram)) if last is None else last
        return descended(scaled, start, self.weights_learning_rate, self.weights_iterations)

    def join(self, fed: Federation, state: State, steps: int) -> State:
        return state  # critics foretell rewards of training, they are no part of the model

    def model(self, state: State) -> tuple[Tree | PerClient[Tree], ...]:
        return (state.adapter,)
