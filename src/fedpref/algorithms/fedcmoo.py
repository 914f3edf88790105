"""FedCMOO: the server finds one set of weights a round, from compressed gradients of all clients.

Source: Askin et al. 2025, "Federated Communication-Efficient Multi-Objective Optimization".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.federation.aggregation import Factors, signs
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.common import no_moments
from fedpref.federation.critics import about_means, critics, train_beside_critics
from fedpref.federation.local_training import LocalTraining, seeded_dropout
from fedpref.federation.objectives import Objectives, jacobian
from fedpref.federation.verbs import Client, Federation, PerClient, WithheldError, work
from fedpref.numerics import trees
from fedpref.numerics.min_norm import projected_descent
from fedpref.numerics.trees import Tree
from fedpref.tasks.batches import BatchSize
from fedpref.types import Count, Positive

WEIGHTS = "weights"
EPSILON = 1e-4  # of the published code, below a squared length


@dataclass(frozen=True)
class State:
    """The shared adapter and the server's weights; each client's critics and moments."""

    adapter: Tree
    weights: Tree
    critics: PerClient[Tree]
    moments: PerClient[Tree]


@work("fedcmoo.sketch", reads=("own",))
def sketch(client: Client, adapter: Tree, own: Tree, method: FedCMOO) -> Tree:
    """Return the objectives' gradients on a batch, each summed up in groups with random signs.

    Together these are as many numbers as the adapter has.
    """
    task, local = client.task, method.local
    params = trees.to(trees.apart(adapter, own), task.device)
    theta = {name: params[name].clone().requires_grad_() for name in adapter}
    size = BatchSize(local.batch_size, local.max_tokens_per_batch)
    with seeded_dropout(client):
        batch = task.draw(params, params, client.shard, size, client.rng)
        if len(size.seen) < client.least_examples:
            raise WithheldError(
                f"the sketch of {len(size.seen)} examples does not leave; {client.least_examples} "
                "are the least here"
            )
        losses, _ = task.losses({**params, **theta}, batch)
        rows = jacobian(losses, theta).cpu()
    width = rows.shape[1]
    groups = max(1, width // len(rows))
    signed = torch.nn.functional.pad(rows * signs(width, client.round), (0, -width % groups))
    return {"sketch": signed.view(len(rows), groups, -1).sum(2)}


@work("fedcmoo.train", keeps={1: "own", 2: "moments"}, reads=("own", "moments"))
def train(
    client: Client, adapter: Tree, own: Tree, weights: Tree, moments: Tree, method: FedCMOO
) -> tuple[Tree, Tree, Tree, Mapping[str, float]]:
    """Return the adapter's change under the server's weights, critics, moments, and metrics."""
    objectives = Objectives(weights[WEIGHTS])
    return train_beside_critics(
        client, adapter, own, moments, method.local, method.aggregate, objectives
    )


@dataclass(frozen=True, kw_only=True)
class FedCMOO(Algorithm[State]):
    """The server weighs the objectives, from sketches of their gradients, once a round.

    Shared: the adapter, the weights. Private: data, rewards, critics, optimiser moments. Averaged:
    sketches of the objectives' gradients on one batch, an adapter's worth of numbers, then the
    adapter's changes: twice FIRM's bytes up. Deviations: the sketch is linear, so that a mean of
    sketches is the sketch of the mean (random signs, the same on all clients; the paper has a
    randomised singular value decomposition, whose cross terms cost a second way down and up); the
    sketched batch's gradient is not used as the first local step.
    """

    name: Literal["fedcmoo"] = "fedcmoo"
    local: LocalTraining = LocalTraining()
    """How a client trains within a round."""
    server_learning_rate: Positive = 1.0
    """What the mean change is multiplied by before it is added."""
    weights_learning_rate: Positive = 0.001
    """The length of the server's projected gradient steps towards the weights."""
    weights_iterations: Count = 1000
    """How many of these steps it takes a round."""

    works = (train, sketch, critics, no_moments)
    aggregate: ClassVar[Factors] = Factors(residual=False)
    keeps_critics: ClassVar[bool] = True

    @property
    def means(self) -> int:
        return 2  # of sketches, and of changes

    def init(self, fed: Federation, start: Tree) -> State:
        return State(start, {}, fed.each(critics), fed.each(no_moments))

    def step(self, fed: Federation, state: State) -> tuple[State, Mapping[str, float]]:
        rows = fed.mean(fed.each(sketch, state.adapter, state.critics, self))["sketch"]
        weights = {WEIGHTS: self.weigh(rows @ rows.T, state.weights.get(WEIGHTS), len(fed.active))}
        messages, own, moments, metrics = fed.each(
            train, state.adapter, state.critics, weights, state.moments, self
        )
        change = fed.mean(messages)
        adapter = trees.add(state.adapter, trees.scale(change, self.server_learning_rate))
        report = about_means(fed.report(metrics), trees.norm(change))
        new = State(adapter, weights, state.critics | own, state.moments | moments)
        return new, report

    def weigh(
        self, gram: Float[Tensor, "M M"], last: Float[Tensor, " M"] | None, clients: int = 1
    ) -> Float[Tensor, " M"]:
        """Return the next weights, from the last ones.

        Args:
            gram: Inner products of the objectives' mean gradients; they are scaled to a mean length
                of one first.
            last: The weights of the round before; None begins with equal ones.
            clients: How many gradients the mean is of.
        """
        # the paper's constant is for the sum over clients, whose products are larger by N^2
        scaled = gram / (gram.diagonal() + EPSILON / clients**2).sqrt().mean() ** 2
        start = torch.full((len(gram),), 1 / len(gram)) if last is None else last
        return projected_descent(scaled, start, self.weights_learning_rate, self.weights_iterations)

    def model(self, state: State) -> tuple[Tree]:
        return (state.adapter,)
