"""The laws of distributed DPO, measured on log-linear policies with the algorithms that train
language models.

Each law is a number that theory gives, beside the same number measured, with a 95 % interval
(Student's t) over independent repetitions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats

from fedpref.algorithms import DecDPO, FedDPO
from fedpref.federation.participation import draw
from fedpref.numerics.topology import Shape, mixing, rho
from log_linear import (
    Coins,
    LogLinear,
    Pairs,
    clients,
    engine,
    gradient,
    objective,
    optimum,
    plain,
    spread,
)

BETA = 1.0


@dataclass(frozen=True)
class Law:
    """What theory says of a figure, what was measured, and the curves of the law's picture: title
    -> (x, y, theory's y).
    """

    name: str
    theory: float
    values: tuple[float, ...]  # one for each repetition
    note: str = ""
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]] = field(
        default_factory=dict
    )
    axes: tuple[str, str] = ("", "")

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean, and its 95 % interval's ends; one value alone has none."""
        mean = statistics.fmean(self.values)
        if len(self.values) < 2:
            return mean, math.nan, math.nan
        half = (
            float(stats.t.ppf(0.975, len(self.values) - 1))
            * statistics.stdev(self.values)
            / len(self.values) ** 0.5
        )
        return mean, mean - half, mean + half


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Of a power law through these points."""
    return float(stats.linregress(np.log(x), np.log(y)).slope)


def through_origin(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The slope of a proportionality, and the share of the variance that it explains."""
    a, b = np.asarray(x), np.asarray(y)
    slope = float(a @ b / (a @ a))
    return slope, 1 - float(((b - slope * a) ** 2).sum() / ((b - b.mean()) ** 2).sum())


def drift(repetitions: int, quick: bool) -> Iterator[Law]:
    """Clients that differ, all take part, exact gradients: where FedDPO comes to rest, the squared
    gradient is not zero.
    """
    steps, rates = ((2, 4, 8) if quick else (2, 3, 4, 6, 8)), (0.05, 0.1)
    by_steps, by_rate, at_one, curve = [], [], [], ([], [], [])
    for seed in range(repetitions):
        shards = clients(8, 12, 5, 1.0, seed)
        best = optimum(shards, BETA)

        floors = {
            (count, rate): resting(shards, best, count, rate)
            for count in (1, *steps)
            for rate in rates[: 2 if count == 4 else 1]
        }
        at_one.append(floors[1, rates[0]] / floors[2, rates[0]])
        by_steps.append(
            exponent([count - 1 for count in steps], [floors[count, rates[0]] for count in steps])
        )
        by_rate.append(exponent(rates, [floors[4, rate] for rate in rates]))
        if not seed:
            xs = [count - 1.0 for count in steps]
            ys = [floors[count, rates[0]] for count in steps]
            curve = (xs, ys, [ys[0] * x**2 for x in xs])
    yield Law(
        "drift floor: exponent of E - 1",
        2,
        tuple(by_steps),
        "FedDPO, 8 clients",
        {"floor": curve},
        ("local steps less one", "squared gradient"),
    )
    yield Law("drift floor: exponent of the learning rate", 2, tuple(by_rate), "E = 4")
    yield Law("drift floor with one local step, as a share of that with two", 0, tuple(at_one))


def resting(shards: Sequence[Pairs], best: torch.Tensor, steps: int, rate: float) -> float:
    """The squared gradient where FedDPO with so many exact local steps comes to rest: after ten
    times the slowest direction's time.
    """
    task = LogLinear(len(best), beta=BETA, start=best)
    fed, method = engine(task, shards, 0), FedDPO(local=plain(steps, rate))
    state = method.init(fed, {"theta": best})
    for round in range(math.ceil(10 / (slowest(shards, best) * rate * steps))):
        fed.begin(round, fed.clients)
        state, _ = method.step(fed, state)
    return float(gradient(shards, BETA, state.adapter["theta"]).square().sum())


def slowest(shards: Sequence[Pairs], theta: torch.Tensor) -> float:
    """The least curvature of the objective."""
    hessian = torch.autograd.functional.hessian(lambda point: objective(shards, BETA, point), theta)
    return float(torch.linalg.eigvalsh(hessian)[0])


def participation(repetitions: int, quick: bool) -> Iterator[Law]:
    """A cohort of S of N clients, one exact step each: the squared gradient's floor is that of
    sampling without replacement.
    """
    count, rate, rounds = 16, 0.2, 300 if quick else 1500
    sizes = (1, 2, 4, 8, 16)
    expected = [(count - size) / (size * (count - 1)) for size in sizes]
    explained, at_all, farthest, curve = [], [], [], ([], [], [])
    for seed in range(repetitions):
        shards = clients(count, 12, 5, 1.0, 100 + seed)
        best = optimum(shards, BETA)
        floors = []
        for size in sizes:
            fed = engine(LogLinear(5, beta=BETA, start=best), shards, seed)
            method = FedDPO(local=plain(1, rate))
            state, found = method.init(fed, {"theta": best}), []
            cohorts = torch.Generator().manual_seed(seed)
            for round in range(rounds if size < count else 50):
                fed.begin(round, draw([1.0] * count, size, cohorts))
                state, _ = method.step(fed, state)
                found.append(float(gradient(shards, BETA, state.adapter["theta"]).square().sum()))
            floors.append(statistics.fmean(found[len(found) // 5 :]))
        slope, share = through_origin(expected, floors)
        explained.append(share)
        at_all.append(floors[-1] / floors[0])
        farthest.append(
            max(
                abs(floor / (slope * x) - 1)
                for floor, x in zip(floors[:-1], expected[:-1], strict=True)
            )
        )
        if not seed:
            curve = (expected, floors, [slope * x for x in expected])
    yield Law(
        "participation floor: variance explained by (N - S) / (S (N - 1))",
        1,
        tuple(explained),
        "FedDPO, N = 16, E = 1",
        {"floor": curve},
        ("(N - S) / (S (N - 1))", "squared gradient"),
    )
    yield Law(
        "participation floor: largest relative distance from that proportion",
        0,
        tuple(farthest),
        "S from 1 to 8",
    )
    yield Law(
        "participation floor with everybody, as a share of that with one client", 0, tuple(at_all)
    )


def consensus(repetitions: int, quick: bool) -> Iterator[Law]:
    """Pure noise, unit curvature, adapt then combine: the consensus error from the whole spectrum
    of the mixing matrix, and its bound.
    """
    count, dimensions, rounds, rest = 16, 2000, 60 if quick else 160, 100
    graphs, rates = ("path", "ring", "star", "torus", "exponential"), (0.02, 0.04)
    worst, above, powers = [], [], []
    curves: dict[str, tuple[list[float], list[float], list[float]]] = {
        "graphs and rates": ([], [], [])
    }
    for seed in range(repetitions):
        ratios, shares, measured = [], [], {}
        for graph in graphs:
            matrix = mixing(Shape(graph).graph([str(i) for i in range(count)], 0))
            spectrum = np.sort(np.linalg.eigvalsh(matrix))[:-1]
            for rate in rates:
                formula = (
                    rate**2
                    * dimensions
                    / count
                    * sum(e**2 / (1 - e**2 * (1 - rate) ** 2) for e in spectrum)
                )
                bound = rate**2 * dimensions * rho(matrix) ** 2 / (1 - rho(matrix) ** 2)
                value = statistics.fmean(
                    noise(dimensions, count, rate, matrix, seed, rest, rounds)[0]
                )
                measured[graph, rate] = value
                ratios.append(abs(value / formula - 1))
                shares.append(value / bound)
                if not seed:
                    for line, new in zip(
                        curves["graphs and rates"], (formula, value, formula), strict=True
                    ):
                        line.append(new)
        worst.append(max(ratios))
        above.append(max(shares))
        powers.append(exponent(rates, [measured["exponential", rate] for rate in rates]))
    axes = ("closed form", "measured")
    yield Law(
        "consensus error: largest relative distance from the closed form",
        0,
        tuple(worst),
        f"{len(graphs)} graphs of 16",
        curves,
        axes,
    )
    yield Law(
        "consensus error: largest share of eta^2 s^2 d rho^2 / (1 - rho^2)",
        1,
        tuple(above),
        "a bound: at most 1",
    )
    yield Law(
        "consensus error: exponent of the learning rate",
        2,
        tuple(powers),
        "exponential graph; exactly 2 as eta goes to 0",
    )


def speedup(repetitions: int, quick: bool) -> Iterator[Law]:
    """The noise of the mean model falls as one over the number of clients."""
    counts, rate, rounds = (8, 16, 32, 64), 0.1, 40 if quick else 120
    powers, curve = [], ([], [], [])
    for seed in range(repetitions):
        floors = []
        for count in counts:
            matrix = mixing(Shape("ring").graph([str(i) for i in range(count)], 0))
            floors.append(statistics.fmean(noise(1000, count, rate, matrix, seed, 40, rounds)[1]))
        powers.append(exponent(counts, floors))
        if not seed:
            curve = (counts, floors, [floors[0] * counts[0] / count for count in counts])
    yield Law(
        "speed-up: exponent of N in the mean model's noise",
        -1,
        tuple(powers),
        "DecDPO, ring",
        {"floor": curve},
        ("clients", "|mean|^2"),
    )


def noise(
    dimensions: int, count: int, rate: float, matrix: Any, seed: int, rest: int, rounds: int
) -> tuple[list[float], list[float]]:
    """DecDPO on fair coins, each round after so many to rest: the consensus error, and the mean
    model's squared distance to the optimum.
    """
    task = Coins(dimensions)
    fed = engine(task, [Coin()] * count, seed, matrix)
    method = DecDPO(local=plain(1, rate))
    state = method.init(fed, task.init(torch.Generator()))
    found = []
    for round in range(rest + rounds):
        fed.begin(round, fed.clients)
        state, _ = method.step(fed, state)
        if round >= rest:
            found.append(spread(fed, state.theta))
    return [error for error, _ in found], [distance for _, distance in found]


@dataclass(frozen=True)
class Coin:
    """A client of `Coins`: labels are drawn, there is no data."""

    name: str = "coin"

    def __len__(self) -> int:
        return 1


def bounds(repetitions: int, quick: bool) -> Iterator[Law]:
    """Gradient and Hessian of the loss on random trajectories of a log-linear policy, as shares of
    what bounds them.
    """
    horizon, actions, dimensions, beta, draws = 4, 3, 3, 0.7, 300 if quick else 3000
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def loss(theta: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Of two trajectories [2, horizon, actions, dimensions] that take the first action
        everywhere; the reference is theta = 0.
        """
        score = torch.log_softmax(features @ theta, -1)[..., 0].sum(1)
        return -torch.nn.functional.logsigmoid(beta * (score[0] - score[1]))

    features = normal(draws, 2, horizon, actions, dimensions)
    limit = features.norm(dim=-1).amax((1, 2, 3))
    theta = 3 * normal(draws, dimensions)
    slopes = torch.vmap(torch.func.grad(loss))(theta, features).norm(dim=1)
    curves = torch.linalg.matrix_norm(torch.vmap(torch.func.hessian(loss))(theta, features), 2)
    yield Law(
        "gradient norm: largest share of 4 beta B H",
        1,
        (float((slopes / (4 * beta * limit * horizon)).max()),),
        "a bound: at most 1",
    )
    second = 4 * beta**2 * limit**2 * horizon**2 + 2 * beta * horizon * limit**2
    yield Law(
        "Hessian norm: largest share of 4 beta^2 B^2 H^2 + 2 beta H B^2",
        1,
        (float((curves / second).max()),),
        "a bound: at most 1",
    )

    def pair(theta: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(beta * difference @ theta)

    difference = normal(draws, dimensions)
    # where gradient and Hessian are largest
    theta = torch.cat([-10 * difference[: draws // 2], torch.zeros_like(difference[draws // 2 :])])
    slopes = torch.vmap(torch.func.grad(pair))(theta, difference).norm(dim=1) / (
        beta * difference.norm(dim=1)
    )
    curves = (
        torch.linalg.matrix_norm(torch.vmap(torch.func.hessian(pair))(theta, difference), 2)
        / (beta * difference.norm(dim=1)) ** 2
    )
    yield Law(
        "same answers for all: largest share of beta |x|",
        1,
        (float(slopes.max()),),
        "a bound, reached",
    )
    yield Law(
        "same answers for all: largest share of beta^2 |x|^2 / 4",
        1,
        (float(4 * curves.max()),),
        "a bound, reached",
    )


LAWS: tuple[Callable[[int, bool], Iterator[Law]], ...] = (
    drift,
    participation,
    consensus,
    speedup,
    bounds,
)
