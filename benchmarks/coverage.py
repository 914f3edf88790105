"""How often intervals of a mean over clients and seeds hold it, by simulation.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --quick --json figures.json

Effects of seeds, of clients and of both together are drawn from normal distributions, for 3, 5 and
10 seeds, 6, 12 and 50 clients, and whichever of the three varies most; the share of intervals that
hold the mean should be 0.95. Beside `fedpref.numerics.intervals` stands the percentile bootstrap.
`--skewed` draws from a shifted exponential distribution instead, which no claim is made about.

Then how evenly clients fare (`fedpref.numerics.fairness`): clients of 80 pairs each, whose own
accuracies differ by 0 to 15 points, and the share of intervals that hold the worst client's, the
mean of the worst tenth's, the standard deviation, and the share of clients that lose.

Figures: `coverage_lowest` and `coverage_highest`, `fairness_lowest` and `fairness_highest`, shares
of simulations.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpref.numerics.fairness import fairness
from fedpref.numerics.intervals import interval

SEEDS, CLIENTS = (3, 5, 10), (6, 12, 50)
SPREADS = (  # standard deviations of seeds, of clients, and of both together
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (1, 1, 0),
    (3, 1, 0),
    (1, 3, 0),
    (1, 1, 1),
    (3, 2, 2),
    (2, 5, 3),
    (3, 1, 3),
    (1, 3, 3),
    (0.5, 0.5, 3),
)
BETWEEN = (0.0, 0.02, 0.05, 0.1, 0.15)  # standard deviations of clients' own accuracies
PAIRS = 80
RESAMPLES = 400
Matrix = NDArray[np.float64]


def percentiles(values: Matrix, rng: np.random.Generator) -> tuple[float, float]:
    """The interval of a bootstrap over seeds and over clients."""
    seeds, clients = values.shape
    rows = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    columns = rng.integers(clients, size=(RESAMPLES, 1, clients))
    low, high = np.percentile(values[rows, columns].mean((1, 2)), [2.5, 97.5])
    return float(low), float(high)


def held(
    seeds: int, clients: int, spread: tuple[float, ...], times: int, some: int, skewed: bool
) -> dict[str, float]:
    """The share of intervals that hold the mean, which is zero; of percentiles in some of them."""
    rng = np.random.default_rng([seeds, clients, *(int(10 * one) for one in spread)])

    def draw(*size: int) -> Matrix:
        return rng.exponential(size=size) - 1 if skewed else rng.normal(size=size)

    found = {"interval": 0, "percentiles": 0}
    for k in range(times):
        values = (
            spread[0] * draw(seeds, 1)
            + spread[1] * draw(1, clients)
            + spread[2] * draw(seeds, clients)
        )
        low, high = interval(values)
        found["interval"] += low <= 0 <= high
        if k < some:
            low, high = percentiles(values, rng)
            found["percentiles"] += low <= 0 <= high
    return {
        "interval": found["interval"] / times,
        **({"percentiles": found["percentiles"] / some} if some else {}),
    }


def held_by_clients(clients: int, between: float, times: int) -> dict[str, float]:
    """The share of intervals that hold what they are about, for clients of 80 pairs each."""
    rng = np.random.default_rng([clients, round(100 * between)])
    held = dict.fromkeys(("worst", "worst_decile", "std", "harmed"), 0)
    tenth = -(-clients // 10)
    for _ in range(times):
        own = np.clip(0.6 + between * rng.normal(size=clients), 0.02, 0.98)
        share = rng.binomial(PAIRS, own) / PAIRS
        smoothed = (share * PAIRS + 0.5) / (PAIRS + 1)
        of_pairs = np.sqrt(smoothed * (1 - smoothed) / PAIRS)
        gained = own - 0.6 + 0.04 * rng.normal(size=clients)
        truths = {
            "worst": own.min(),
            "worst_decile": np.sort(own)[:tenth].mean(),
            "std": own.std(ddof=1),
            "harmed": (own < 0.6).mean(),
        }
        found = fairness(list(share), list(of_pairs))
        gains = fairness(list(gained), [0.04] * clients)
        if found is None or gains is None:
            raise RuntimeError("there is an interval for three clients or more")
        for name, truth in truths.items():
            low, high = getattr(gains if name == "harmed" else found, name)
            held[name] += low <= truth <= high
    return {name: count / times for name, count in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=4000, help="simulations of each setting")
    parser.add_argument("--quick", action="store_true", help="without the bootstrap")
    parser.add_argument("--skewed", action="store_true", help="exponential effects, not normal")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    some = 0 if arguments.quick else min(arguments.times, 200)  # the bootstrap is slow
    found: dict[str, dict[str, float]] = {}
    for seeds, clients, spread in product(SEEDS, CLIENTS, SPREADS):
        name = f"{seeds} seeds, {clients} clients, spread {spread}"
        found[name] = held(seeds, clients, spread, arguments.times, some, arguments.skewed)
        print(f"{name:50s} {found[name]['interval']:.3f}", flush=True)
    figures: dict[str, Any] = {}
    for form, names in (
        ("interval", ("coverage_lowest", "coverage_highest")),
        ("percentiles", ("percentiles_lowest", "percentiles_highest")),
    ):
        if values := [shares[form] for shares in found.values() if form in shares]:
            figures |= {names[0]: min(values), names[1]: max(values)}
    even: list[float] = []
    for clients, between in product(CLIENTS, BETWEEN):
        shares = held_by_clients(clients, between, arguments.times // 8)
        even += shares.values()
        texts = (f"{name} {share:.3f}" for name, share in shares.items())
        print(f"{clients} clients, {100 * between:.0f} points apart".ljust(50), *texts, flush=True)
    figures |= {"fairness_lowest": min(even), "fairness_highest": max(even)}
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
