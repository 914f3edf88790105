"""Log-linear policies: a task whose optimum, noise and curvature are known, for checking theory
with the algorithms themselves.

A policy pi(a) proportional to exp(theta' f(a)) whose reference is theta = 0 has, for a pair of
answers whose features differ by x, the reward margin beta theta' x, whatever the number of answers:
the log-partition cancels. Its DPO loss is -log sigma(beta theta' x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from fedpref.engines import Simulation
from fedpref.federation.local_training import LocalTraining
from fedpref.federation.verbs import Client, work
from fedpref.numerics import trees
from fedpref.numerics.topology import Matrix
from fedpref.numerics.trees import Tree
from fedpref.tasks import BatchSize


@dataclass(frozen=True)
class Pairs:
    """A client's pairs of answers: the differences of their features, and how probably the first is
    preferred.
    """

    name: str
    features: Tensor  # [n, d]
    preferred: Tensor  # [n]

    def __len__(self) -> int:
        return len(self.features)


class LogLinear:
    """The task; gradients are those of a client's expected loss."""

    description = "a log-linear policy"
    device = torch.device("cpu")
    devices = 1

    def __init__(self, dimensions: int, *, beta: float = 1.0, start: Tensor | None = None) -> None:
        self.beta = beta
        self.start = torch.zeros(dimensions, dtype=torch.float64) if start is None else start

    def move_to(self, worker: int) -> None:
        pass

    def init(self, rng: torch.Generator) -> Tree:
        return {"theta": self.start.clone()}

    def draw(
        self, params: Tree, start: Tree, shard: Pairs, size: BatchSize, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return shard.features, shard.preferred

    def losses(
        self, params: Tree, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Mapping[str, float]]:
        features, preferred = batch
        margin = self.beta * features @ params["theta"]
        return (softplus(margin) - preferred * margin).mean()[None], {}


class Coins(LogLinear):
    """The same where features are unit vectors and labels are fair coins: the optimum is zero.

    With beta = 2 the gradient in every coordinate is tanh(theta), with noise of variance one. All
    coordinates are seen in every step, and their losses add up.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__(dimensions, beta=2.0, start=torch.zeros(dimensions))

    def draw(
        self, params: Tree, start: Tree, shard: Any, size: BatchSize, rng: torch.Generator
    ) -> Any:
        return torch.randint(2, self.start.shape, generator=rng) * 2.0 - 1

    def losses(self, params: Tree, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        return -logsigmoid(self.beta * batch * params["theta"]).sum()[None], {}


def plain(steps: int, rate: float) -> LocalTraining:
    """Plain gradient descent at a constant rate."""
    return LocalTraining(
        steps=steps,
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        max_grad_norm=1e12,
    )


def clients(count: int, pairs: int, dimensions: int, apart: float, seed: int) -> list[Pairs]:
    """Clients with their own pairs, who prefer by a common taste and `apart` of their own."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    common = normal(dimensions)
    found = []
    for number in range(count):
        features = normal(pairs, dimensions)
        found.append(
            Pairs(
                str(number),
                features,
                torch.sigmoid(features @ (common + apart * normal(dimensions)) / dimensions**0.5),
            )
        )
    return found


def objective(shards: Sequence[Pairs], beta: float, theta: Tensor) -> Tensor:
    """The mean over clients of their expected losses."""
    task = LogLinear(len(theta), beta=beta)
    return torch.stack(
        [task.losses({"theta": theta}, (shard.features, shard.preferred))[0][0] for shard in shards]
    ).mean()


def gradient(shards: Sequence[Pairs], beta: float, theta: Tensor) -> Tensor:
    """Of the objective."""
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(objective(shards, beta, theta), theta)[0]


def optimum(shards: Sequence[Pairs], beta: float) -> Tensor:
    """Where the objective is least, by Newton's method."""
    theta = torch.zeros(shards[0].features.shape[1], dtype=torch.float64)
    for _ in range(50):
        hessian = torch.autograd.functional.hessian(
            lambda point: objective(shards, beta, point), theta
        )
        theta = theta - torch.linalg.solve(hessian, gradient(shards, beta, theta))
    return theta


@work("log_linear.moments", sends=(0,), reads=("theta",))
def moments(client: Client, theta: Tree) -> Tree:
    return {"value": theta["theta"], "square": theta["theta"].square()}


def engine(task: Any, shards: Sequence[Any], seed: int, mixing: Matrix | None = None) -> Simulation:
    """All clients with equal weights, and a network that stays as it is."""
    network = {} if mixing is None else {"mixing": lambda round, active: mixing}
    return Simulation(task, shards, seed=seed, rounds=1, weighting="equal", **network)


def spread(fed: Simulation, theta: Any) -> tuple[float, float]:
    """The mean over clients of |theta_i - mean|^2, and |mean|^2."""
    mean = fed.mean(fed.each(moments, theta))
    return float((mean["square"] - mean["value"].square()).sum()), trees.norm(
        {"mean": mean["value"]}
    ) ** 2
