"""Lines on equal terms: at one KL, after as many rounds or pairs, or the way to one figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpref.errors import UserError
from fedpref.numerics.metrics import HEADLINES, Headline, low_is_good

SEEN = ("num_pairs", "num_samples", "num_points")  # what tasks count of what was trained on
CLOSE = 0.1  # of what was seen, which lines may differ by: batches are drawn, and so are sizes
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Course:
    """How a line went: its evaluations on the same rows, and what it had cost by each of them.

    Attributes:
        clients: Of each evaluation, clients' metrics.
        spent: Of each evaluation, `rounds`, `seconds`, `mb` and `pairs` until then.
    """

    clients: Sequence[Mapping[str, Mapping[str, float]]]
    spent: Sequence[Mapping[str, float]]

    def mean(self, metric: str, place: int) -> float:
        """Return a metric's mean over clients at an evaluation."""
        return float(np.mean([row[metric] for row in self.clients[place].values()]))

    @property
    def measures(self) -> list[str]:
        """What an evaluation may be chosen by."""
        common = set.intersection(*({*row} for of_all in self.clients for row in of_all.values()))
        return [*self.spent[0], *sorted(name for name in common if not name.startswith("num_"))]


def course(evaluations: Sequence[Row], rounds: Sequence[Row]) -> Course:
    """Return how a line went.

    Args:
        evaluations: Its rows of evaluations, on the same held-out rows.
        rounds: Its rows of rounds.
    """
    spent = []
    for row in evaluations:
        before = [one for one in rounds if one["round"] <= row["round"]]
        spent.append(
            {
                "rounds": float(row["round"]),
                "seconds": sum(one["seconds"] for one in before),
                "mb": sum(one["bytes_up"] + one["bytes_down"] for one in before) / 1e6,
                "pairs": float(sum(one.get(name, 0) for one in before for name in SEEN)),
            }
        )
    return Course([row["clients"] for row in evaluations], spent)


def seen(rounds: Sequence[Row]) -> float:
    """Return how many examples a line has seen in all of its rounds; nan where it does not say."""
    counts = [row[name] for row in rounds for name in SEEN if name in row]
    return sum(counts) if counts else math.nan


def parse(text: str) -> tuple[str, float]:
    """Return a name and a number, from `kl=2`; raises UserError where it is none."""
    name, equals, value = text.partition("=")
    try:
        if equals and name.strip() and math.isfinite(float(value)):
            return name.strip(), float(value)
    except ValueError:
        pass
    raise UserError(f"{text!r}: expected NAME=NUMBER, as in kl=2 or rounds=5.")


def at(line: str, way: Course, name: str, value: float, metric: str) -> dict[str, float]:
    """Return clients' values where a line's mean of another metric was first at a value.

    Between two evaluations they are taken as straight lines.

    Args:
        line: Its name, for messages.
        way: How it went.
        name: The metric that is made equal, or `rounds`, `seconds`, `mb`, `pairs`.
        value: Its value.
        metric: What is read there.

    Raises:
        UserError: The line does not measure it, or was never there.
    """
    if name not in way.measures:
        raise UserError(
            f"--at {name}: {line} does not measure it; what can be made equal is "
            f"{', '.join(way.measures)}."
        )
    places = [
        way.spent[k][name] if name in way.spent[k] else way.mean(name, k)
        for k in range(len(way.clients))
    ]
    crossed = _first(places, value)
    if crossed is None:
        raise UserError(
            f"--at {name}={value:g}: {line} was never there; its evaluations have "
            f"{min(places):.4g} to {max(places):.4g}. Take a value that all lines pass, more "
            "rounds, or evaluate_on_start and a smaller evaluate_every."
        )
    always = [name for name in way.clients[0] if all(name in one for one in way.clients)]
    columns = {name: [one[name][metric] for one in way.clients] for name in always}
    return {
        name: float(np.interp(crossed, range(len(places)), column))
        for name, column in columns.items()
    }


def cost_of(way: Course, metric: str, value: float) -> Mapping[str, float] | None:
    """Return what a line had spent when its mean over clients first reached a figure.

    Args:
        way: How it went.
        metric: Of clients.
        value: The figure, in the metric's own unit.

    Returns:
        `rounds`, `seconds`, `mb` and `pairs`, between two evaluations in proportion; None where it
        never reached it.
    """
    sign = -1.0 if low_is_good(metric) else 1.0
    means = [sign * way.mean(metric, k) for k in range(len(way.clients))]
    place = 0.0 if means[0] >= sign * value else _first(means, sign * value, rising=True)
    if place is None:
        return None
    spots = range(len(means))
    return {
        name: float(np.interp(place, spots, [one[name] for one in way.spent]))
        for name in way.spent[0]
    }


def _first(values: Sequence[float], wanted: float, *, rising: bool = False) -> float | None:
    """Return where values first pass one, in steps between them; None where they never do."""
    for k, one in enumerate(values):
        if one == wanted:
            return float(k)
        if k + 1 < len(values):
            after = values[k + 1]
            if one < wanted < after or (not rising and after < wanted < one):
                return k + (wanted - one) / (after - one)
    return None


def scaled(metric: str, text: str) -> float:
    """Return a figure in a metric's own unit, from how it is written: 65 is 0.65 of accuracy."""
    shown: Headline = HEADLINES[metric]
    try:
        if math.isfinite(value := float(text)):
            return value / shown.scale
    except ValueError:
        pass
    raise UserError(f"--to {text!r}: expected a number in the unit of the table, {shown.caption}.")
