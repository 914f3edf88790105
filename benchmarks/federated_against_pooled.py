"""What federation costs and what it brings: one adapter for all clients against pooled data and
against each client alone.

    python benchmarks/federated_against_pooled.py
    python benchmarks/federated_against_pooled.py --data FOLDER --configs hh hh-iid --seeds 0 1 2

Without --data it measures the shipped clients; with it the public sets of configs/, from a local
folder (docs/data.md). Figures are held-out pair accuracies averaged over clients, with their
standard error, and over the half of the clients with least data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedpref import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import events, new_directory
from fedpref.numerics.metrics import ACCURACY, standard_error
from fedpref.reports.progress import show

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUICK = ["rounds=2", "algorithm.local.steps=2", "algorithm.local.batch_size=4"]


def measure(
    name: str, seed: int, data: str | None, quick: bool, console: Console
) -> dict[str, float]:
    """One run with both baselines: figures by name."""
    overrides = [
        f"seed={seed}",
        "baselines=[alone,pooled]",
        *([f"data.path={data}"] if data else []),
        *(QUICK if quick else []),
    ]
    experiment = Experiment.load(CONFIGS / f"{name}.yaml", overrides)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = new_directory(experiment, Path(scratch) / "run")
        show(events(experiment, folder), console)
        run = FinishedRun(folder)
        lines, sizes = run.result().evaluations, run.clients
    smaller = sorted(sizes, key=lambda client: (sizes[client]["train"], client))[: len(sizes) // 2]
    figures = {"seconds": time.perf_counter() - begun, "clients": float(len(sizes))}
    for line, clients in lines.items():
        accuracies = {client: row[ACCURACY] for client, row in clients.items()}
        figures[line] = statistics.fmean(accuracies.values())
        figures[f"{line}_standard_error"] = standard_error(
            accuracies, {c: int(row["num_examples"]) for c, row in clients.items()}
        )
        figures[f"{line}_least_data"] = statistics.fmean(accuracies[client] for client in smaller)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="a folder with the public sets; without it the shipped clients are measured"
    )
    parser.add_argument(
        "--configs", nargs="+", help="names in configs/; by default all that the data allows"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few rounds and steps, under a minute; the figures mean little",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    names = arguments.configs or (
        ["hh", "hh-iid", "persona", "movie-reviews", "movie-reviews-10"]
        if arguments.data
        else ["demo"]
    )

    table = Table(
        title="held-out pair accuracy (%), mean over clients and seeds ± standard error of a run",
        title_justify="left",
    )
    for title in (
        "config",
        "clients",
        "federated",
        "pooled",
        "alone",
        "least data: federated",
        "least data: alone",
        "seconds",
    ):
        table.add_column(title, justify="left" if title == "config" else "right")
    flat: dict[str, float] = {}
    for name in names:
        runs = [
            measure(name, seed, arguments.data, arguments.quick, Console(stderr=True))
            for seed in arguments.seeds
        ]
        mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        flat |= {f"{name}/{key}": value for key, value in mean.items()}
        both = [
            f"{100 * mean[line]:.1f} ± {100 * mean[f'{line}_standard_error']:.1f}"
            for line in ("feddpo", "pooled", "alone")
        ]
        least = [f"{100 * mean[f'{line}_least_data']:.1f}" for line in ("feddpo", "alone")]
        table.add_row(name, f"{mean['clients']:.0f}", *both, *least, f"{mean['seconds']:.0f}")
    Console(width=140).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(flat, indent=1) + "\n")


if __name__ == "__main__":
    main()
