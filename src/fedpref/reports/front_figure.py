"""A front of trade-offs, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedpref.reports.folded import FoldedTable
from fedpref.runs.pareto import Point, best


def front_table(
    objectives: Sequence[str], points: Sequence[Point], measures: Mapping[str, float]
) -> FoldedTable:
    """Return every point, marked where no other dominates it, and the front's metrics."""
    caption = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
    rows = []
    marks = best(np.array([point.values for point in points]))
    for point, mark in zip(points, marks, strict=True):
        shares = ", ".join(f"{share:.2f}" for share in point.preference)
        numbers = [
            f"{value:.3f}"
            for value in (
                *point.values,
                *(point.beside.get(name, float("nan")) for name in points[0].beside),
            )
        ]
        said = ("best" if mark else "") + ("" if point.is_trained else " interpolated")
        rows.append([shares, *numbers, said.strip()])
    titles = ["preference", *objectives, *points[0].beside, ""]
    return FoldedTable("preferences and what came of them", titles, rows, caption=caption)


def draw_front(objectives: Sequence[str], points: Sequence[Point], path: Path) -> None:
    """Write an SVG of the first two objectives, with preferences beside their points."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    for is_trained, marker, label in ((True, "o", "trained"), (False, "x", "interpolated")):
        some = [point for point in points if point.is_trained == is_trained]
        if some:
            axes.plot(*zip(*(point.values[:2] for point in some), strict=True), marker, label=label)
            for point in some if is_trained else ():
                text = "/".join(f"{share:.1f}" for share in point.preference)
                axes.annotate(
                    text,
                    (point.values[0], point.values[1]),
                    textcoords="offset points",
                    xytext=(5, 5),
                    fontsize=7,
                )
    values = np.array([point.values[:2] for point in points])
    front = values[best(values)]
    front = front[front[:, 0].argsort()]
    axes.step(front[:, 0], front[:, 1], where="pre", alpha=0.4)
    axes.set_xlabel(objectives[0])
    axes.set_ylabel(objectives[1])
    if any(not point.is_trained for point in points):
        axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
