"""Charts of variants by seeds, in Plotly's form: means, and bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedpref.numerics.metrics import ACCURACY
from fedpref.reports.charts import (
    LEARNING,
    Chart,
    axes,
    band,
    error_bars,
    filled,
    gain_colours,
    lined,
    names_on,
)
from fedpref.reports.groups import Group, Matrix

BAND = "The mean over seeds; the band is from the lowest to the highest seed."


def over_rounds(
    name: str, rounds: Sequence[int], values: Matrix, number: int
) -> Iterator[dict[str, Any]]:
    """Yield the traces of a group: the band over its seeds, if it has several, and the mean."""
    if len(values) > 1:
        yield from band(name, rounds, values.min(0).tolist(), values.max(0).tolist(), number)
    yield {**lined(name, rounds, values.mean(0).tolist(), number), "legendgroup": name}


def held_out(groups: Sequence[Group]) -> Iterator[Chart]:
    """Yield a chart of the metric by which clients are compared, over rounds."""
    courses = [group.course() for group in groups]
    if max(len(rounds) for rounds, _ in courses) < 2:
        return
    data = [
        trace
        for number, (group, (rounds, values)) in enumerate(zip(groups, courses, strict=True))
        for trace in over_rounds(group.name, rounds, values, number)
    ]
    shown = groups[0].shown
    caption = f"Means over clients. {BAND}"
    caption += " On rows that are set aside to choose by." * groups[0].lines[0].chooses
    yield Chart(f"Held-out {shown.title} over rounds", caption, data, axes("round", shown.caption))


def learning(groups: Sequence[Group]) -> Iterator[Chart]:
    """Yield charts of training's losses and accuracies, over rounds."""
    for metric, title in LEARNING.items():
        scale = 100 if metric == ACCURACY else 1
        data: list[dict[str, Any]] = []
        for number, group in enumerate(groups):
            rounds, values = group.training(metric)
            if rounds:
                data += over_rounds(group.name, rounds, scale * values, number)
        if data:
            unit = ", %" if scale == 100 else ""
            caption = f"On each round's own examples, before each step. {BAND}"
            yield Chart(title.capitalize(), caption, data, axes("round", title + unit))


def gains(groups: Sequence[Group]) -> Iterator[Chart]:
    """Yield a chart of each client's value less what it has in the first group."""
    first, *others = groups
    base = first.clients()
    data: list[dict[str, Any]] = []
    names: list[str] = []
    for number, group in enumerate(others, 1):
        gained = {
            name: value - base[name] for name, value in group.clients().items() if name in base
        }
        names += [name for name in sorted(gained, key=gained.__getitem__) if name not in names]
        luck = _luck(first, group)
        bars = {
            "type": "bar",
            "orientation": "h",
            "name": group.name,
            "marker": filled(number),
            "x": list(gained.values()),
            "y": list(gained),
        }
        if len(others) == 1:
            # of whom not all seeds have, nothing is sure
            unsure = dict.fromkeys(gained.keys() - luck.keys(), math.inf) if luck else {}
            bars["marker"] = {"color": gain_colours(gained, luck | unsure)}
        if luck:
            bars["error_x"] = error_bars([luck.get(name) for name in gained])
        data.append(bars)
    if names:
        layout = axes(f"gain in {first.shown.title} over {first.name}", "", barmode="group")
        names_on(layout["yaxis"], names)
        layout["yaxis"] |= {"categoryorder": "array", "categoryarray": layout["yaxis"]["tickvals"]}
        caption = "Held-out, each client's mean over seeds; to the left it is worse off."
        if "error_x" in data[0]:
            caption += " Thin lines: two standard errors, over seeds"
            pale = "; pale where that is more than the gain, or a seed has no figure."
            caption += pale if len(others) == 1 else "."
        yield Chart(f"Who gains over {first.name}, and who loses", caption, data, layout)


def _luck(first: Group, group: Group) -> dict[str, float]:
    """Return two standard errors over seeds of each client's gain; empty for a single seed."""
    if len(group.lines) != len(first.lines) or len(group.lines) < 2:
        return {}
    seeds = [
        {name: (line.last[name], row) for name, row in base.last.items() if name in line.last}
        for base, line in zip(first.lines, group.lines, strict=True)
    ]
    metric, scale = group.metric, group.shown.scale
    apart = {
        name: [scale * (of_seed[name][0][metric] - of_seed[name][1][metric]) for of_seed in seeds]
        for name in set.intersection(*(set(of_seed) for of_seed in seeds))
    }
    return {
        name: 2 * float(np.std(some, ddof=1)) / len(some) ** 0.5 for name, some in apart.items()
    }


def by_client(groups: Sequence[Group]) -> Iterator[Chart]:
    """Yield a chart of every client in every group."""
    values = [group.clients() for group in groups]
    names = sorted({name for some in values for name in some})
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": group.name,
            "marker": filled(number),
            "x": [some.get(name) for name in names],
            "y": names,
        }
        for number, (group, some) in enumerate(zip(groups, values, strict=True))
    ]
    shown = groups[0].shown
    layout = axes(shown.caption, "", barmode="group")
    names_on(layout["yaxis"], names)
    layout["yaxis"] |= {"autorange": "reversed"}
    yield Chart(f"Held-out {shown.title} of each client", "Means over seeds.", data, layout)
