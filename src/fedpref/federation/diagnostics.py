"""How far a federation is from a stationary point, and its clients from agreement.

Nothing of it is used in training. Both are about the mean model: the mean over clients of the
parameters that a task trains, beside the own parts of each client, if any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from fedpref.federation.local_training import seeded_dropout
from fedpref.federation.objectives import jacobian
from fedpref.federation.verbs import ANYTHING, Client, Federation, work
from fedpref.models.own_parts import NO_PARTS
from fedpref.numerics import trees
from fedpref.numerics.min_norm import stationarity
from fedpref.numerics.trees import Tree
from fedpref.tasks.batches import BatchSize

Diagnostic = Literal["pooled-gradient", "disagreement", "pareto-stationarity"]
LOSS, ROWS = "loss", "rows"
DRAWN = 64  # examples of a client, or prompts, that Pareto-stationarity is estimated from


def diagnose(
    fed: Federation, model: Sequence[Any], names: tuple[str, ...], wanted: Sequence[Diagnostic]
) -> Mapping[str, float]:
    """Return diagnostics of the active clients, who must have training data.

    `pooled-gradient`: the objective of all clients' training examples together at the mean model,
    weighted like means over clients are, and its gradient's squared norm. `disagreement`: the share
    of its held-out examples for which a client's model chooses otherwise than the mean model does,
    a tie being half a choice. `pareto-stationarity`: the least squared norm of a weighted mean of
    the objectives' gradients over all clients at the mean model, each client's on one drawn batch,
    whose noise it holds; it is zero at a point from which no direction is good for all objectives.

    Args:
        fed: The federation.
        model: The parts of each client's model.
        names: Names of the parameters that the task trains.
        wanted: Which diagnostics.
    """
    shared = trees.select(
        trees.merge(*(part for part in model if isinstance(part, Mapping))), names
    )
    apart = tuple(name for name in names if name not in shared)
    mean = {**shared, **(fed.mean(fed.each(trained, apart, *model)) if apart else {})}
    metrics: dict[str, float] = {}
    if "pooled-gradient" in wanted:
        gradient = dict(fed.mean(fed.each(pooled, mean, *model)))
        metrics["pooled_loss"] = float(gradient.pop(LOSS))
        metrics["pooled_gradient_norm_squared"] = trees.norm(gradient) ** 2
    if "pareto-stationarity" in wanted:
        rows = fed.mean(fed.each(slopes, mean, *model))[ROWS]
        metrics["pareto_stationarity"] = stationarity(rows @ rows.T)
    if "disagreement" in wanted:
        metrics |= fed.report(fed.each(disagreement, mean, *model))
    return metrics


@work("diagnostics.trained", reads={"parts": ANYTHING})
def trained(client: Client, names: tuple[str, ...], *parts: Tree) -> Tree:
    """Return the parameters of these names of the client's model."""
    return trees.select(trees.merge(*parts), names)


@work("diagnostics.pooled", reads={"parts": ANYTHING})
def pooled(client: Client, mean: Tree, *parts: Tree) -> Tree:
    """Return the gradient of the client's mean loss over its training examples, and the loss."""
    task, device = client.task, client.task.device
    theta = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in mean.items()}
    params = {**trees.to(trees.merge(*parts), device), **theta}
    loss = 0.0
    with seeded_dropout(client):
        for batch, share in task.batches(client.shard):
            value = share * task.losses(params, batch)[0].mean()
            value.backward()
            loss += float(value.detach())
    gradient = {
        name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for name, tensor in theta.items()
    }
    return {
        **trees.to(gradient, torch.device("cpu")),
        LOSS: torch.tensor(loss, dtype=torch.float64),
    }


@work("diagnostics.slopes", reads={"parts": ANYTHING})
def slopes(client: Client, mean: Tree, *parts: Tree) -> Tree:
    """Return each objective's gradient on one batch, with fresh critics where it has any."""
    task, device = client.task, client.task.device
    params = trees.to({**task.parts(NO_PARTS, client.rng), **trees.merge(*parts), **mean}, device)
    theta = {name: params[name].clone().requires_grad_() for name in mean}
    with seeded_dropout(client):
        losses, _ = task.losses(
            {**params, **theta},
            task.draw(params, params, client.shard, BatchSize(DRAWN), client.rng),
        )
        return {ROWS: jacobian(losses, theta).cpu()}


@work("diagnostics.disagreement", sends=(), reads={"parts": ANYTHING})
def disagreement(client: Client, mean: Tree, *parts: Tree) -> Mapping[str, float]:
    """Return the share of held-out examples on which client and mean model differ."""
    own = trees.merge(*parts)
    apart = client.task.choices(own, client.shard) - client.task.choices(
        {**own, **mean}, client.shard
    )
    return {"disagreement": float(apart.abs().mean())}


WORKS = (trained, pooled, slopes, disagreement)
"""What diagnostics run on clients."""
