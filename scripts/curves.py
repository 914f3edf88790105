"""Draw what the documents call expected curves: run a config of each paper's algorithm, and draw
its report's charts as figures.

python scripts/curves.py docs/figures --data FOLDER   # of a survey's rows, for PluralLLM; the
others need none
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from fedpref import Experiment, run
from fedpref.reports import charts
from fedpref.reports import method_charts as methods
from fedpref.reports.figures import draw_lines
from fedpref.reports.run import Run, read

WANTED: dict[str, tuple[list[str], list[Any]]] = {  # a config: overrides, charts
    "feddpo": (
        ["rounds=10", "evaluate_every=1", "baselines=[alone,pooled]"],
        [charts.learning, charts.held_out],
    ),
    "decdpo": (["evaluate_every=1"], [methods.consensus, charts.held_out]),
    "fedpdpo": (
        ["evaluate_every=1", "federation.newcomers=0", "baselines=[alone]"],
        [charts.learning, charts.held_out],
    ),
    "firm": (["evaluate_every=1"], [methods.objectives]),
    "pluralllm": ([], [charts.learning, charts.held_out]),
}


def drawn(chart: charts.Chart, axes: Any) -> None:
    """One chart, its lines and bands."""
    draw_lines(chart, axes)
    axes.set(
        title=chart.title,
        xlabel=chart.layout["xaxis"]["title"]["text"],
        ylabel=chart.layout["yaxis"]["title"]["text"],
    )
    axes.set_yscale(chart.layout["yaxis"].get("type", "linear"))
    axes.legend(frameon=False)


def figure(one: Run, wanted: Sequence[Any], file: Path) -> None:
    """Two charts side by side: the first of each kind, or the first two of one."""
    found = [chart for kind in wanted for chart in [*kind([one])][: 2 // len(wanted)]]
    mpl.rcParams.update(
        {
            "svg.hashsalt": "fedpref",
            "font.size": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    drawing, places = plt.subplots(
        1, len(found), figsize=(4.4 * len(found), 3.0), layout="constrained"
    )
    for chart, axes in zip(found, places, strict=True):
        drawn(chart, axes)
    drawing.savefig(file, metadata={"Date": None}, transparent=False)
    plt.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--data",
        type=Path,
        help="where a survey's rows are, for PluralLLM; without it that is left out",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=WANTED,
        default=list(WANTED),
        help="the configs to draw; all by default",
    )
    arguments = parser.parse_args()
    for name in arguments.only:
        overrides, wanted = WANTED[name]
        here = [f"data.path={arguments.data}"] if name == "pluralllm" else []
        if name == "pluralllm" and arguments.data is None:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            result = run(
                Experiment.load(f"configs/{name}.yaml", [*overrides, *here]), Path(scratch) / name
            )
            figure(read(result.path), wanted, arguments.output / f"curves-{name}.svg")
        print(arguments.output / f"curves-{name}.svg", flush=True)


if __name__ == "__main__":
    main()
