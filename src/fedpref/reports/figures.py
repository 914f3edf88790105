"""Figures and tables for a paper: charts as SVG and PDF, the comparison as LaTeX and CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpref.errors import UserError, require
from fedpref.reports import group_charts
from fedpref.reports.charts import Chart
from fedpref.reports.comparison import compare_all
from fedpref.reports.comparison_tables import csv_text, latex
from fedpref.reports.groups import groups_of

FORMATS = ("svg", "pdf")
DASHES = {"dot": ":", "dash": "--"}
INCHES = 3.4  # a column of a paper with two
MOST_NAMES = 60  # clients beside bars; of more there is no such figure


def write_figures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write figures of runs and sweeps, `table.tex` and `table.csv`, and return the files.

    Args:
        paths: Run directories, and folders of sweeps. Of one run alone, its baselines are beside
            it.
        folder: Where they go; files of the same names are replaced.

    Raises:
        UserError: Runs are unfinished, or cannot be compared; matplotlib is not installed.
    """
    require("a figure", "figures", "matplotlib")
    rows, groups = compare_all(paths), groups_of(paths)
    drawn = {
        "held-out": group_charts.held_out(groups),
        "training": group_charts.learning(groups),
        "gains": group_charts.gains(groups),
        "clients": group_charts.by_client(groups),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"--to {folder}: this is a file. Name a folder.") from error
    made = []
    for name, charts in drawn.items():
        for number, chart in enumerate(charts):
            for suffix in FORMATS:
                file = folder / f"{name}{f'-{number + 1}' * bool(number)}.{suffix}"
                if draw(chart, file):
                    made.append(file)
    for name, text in (("table.tex", latex(rows)), ("table.csv", csv_text(rows))):
        (folder / name).write_text(text, encoding="utf-8")
        made.append(folder / name)
    return made


def draw(chart: Chart, file: Path) -> bool:
    """Write a chart by matplotlib; return whether it could be, by its number of names."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    bars = [trace for trace in chart.data if trace["type"] == "bar"]
    names = list(dict.fromkeys(name for trace in bars for name in trace["y"]))
    if len(names) > MOST_NAMES:
        return False
    height = max(2.4, 0.13 * len(names) * len(bars) + 1.0) if bars else 2.4
    # text stays text; nothing of the day or the machine, so that a figure is the same again
    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "fedpref", "pdf.fonttype": 42, "font.size": 8}
    ):
        figure, axes = pyplot.subplots(figsize=(INCHES, height), layout="constrained")
        if bars:
            draw_bars(bars, names, axes)
        else:
            draw_lines(chart, axes)
        axes.set(xlabel=_title(chart, "xaxis"), ylabel=_title(chart, "yaxis"))
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside upper center", ncols=3, frameon=False)
        none: dict[str, Any] = {"Date": None} if file.suffix == ".svg" else {"CreationDate": None}
        figure.savefig(file, metadata=none)
        pyplot.close(figure)
    return True


def _title(chart: Chart, axis: str) -> str:
    title = str(chart.layout[axis].get("title", {}).get("text", ""))
    return re.sub(r"([$])", r"\\\1", title)


def draw_lines(chart: Chart, axes: Any) -> None:
    """Draw a chart's lines and bands, and names beside their ends."""
    low: Sequence[float] = ()
    for trace in chart.data:
        line = trace.get("line", {})
        if trace.get("mode") == "text":
            for x, y, name in zip(trace["x"], trace["y"], trace["text"], strict=True):
                axes.annotate(
                    _plain(name),
                    (x, y),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=5,
                )
        elif "fill" in trace:
            # with its share of opacity, in the last two digits
            axes.fill_between(trace["x"], trace["y"], low, color=trace["fillcolor"], linewidth=0)
        elif line.get("width") == 0:
            low = trace["y"]
        else:
            faint = trace.get("opacity", 1.0)
            axes.plot(
                trace["x"],
                trace["y"],
                DASHES.get(line.get("dash"), "-"),
                color=line["color"],
                alpha=faint,
                label=_plain(trace["name"]) if trace.get("showlegend", True) else None,
                lw=0.7 if faint < 1 else 1.4,
                marker="o" if len(trace["x"]) <= 12 else None,
                markersize=3,
            )


def draw_bars(bars: Sequence[Any], names: Sequence[str], axes: Any) -> None:
    """Draw horizontal bars of several groups, side by side."""
    width = 0.8 / len(bars)
    place = {name: number for number, name in enumerate(names)}
    for number, trace in enumerate(bars):
        known = [(y, x) for y, x in zip(trace["y"], trace["x"], strict=True) if x is not None]
        axes.barh(
            [place[y] + (number - (len(bars) - 1) / 2) * width for y, _ in known],
            [x for _, x in known],
            width,
            color=trace["marker"]["color"],
            label=_plain(trace["name"]),
        )
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.axvline(0, color="#888888", lw=0.6)


def _plain(text: str) -> str:
    """Return a name as matplotlib prints it: dollars are no mathematics, no line is hidden."""
    return text.replace("$", r"\$").lstrip("_")
