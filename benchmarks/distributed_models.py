"""Language models on real pairs over servers and graphs: the comparisons of the paper, each against
the others on one split.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import EVALUATION, METRICS
from fedpref.numerics.metrics import ACCURACY
from fedpref.reports.progress import show
from fedpref.runs.sweep import plan, sweep

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CLIENTS = 8
COMMON = (
    "rounds=10",
    "task.max_length=128",
    "federation={}",
    "diagnostics=[pooled-gradient,disagreement]",
    "algorithm.local={steps: 3, batch_size: 4, learning_rate: 2.0e-3}",
)
DATASETS: Mapping[str, tuple[str, ...]] = {
    "hh-at-random": ("hh", "data.max_rows=500", f"partition={{name: iid, clients: {CLIENTS}}}"),
    "hh-by-objective": ("hh", "data.max_rows=500", f"partition.clients_per_value={CLIENTS // 2}"),
    "ukpconvarg-at-random": (
        "ukpconvarg",
        f"partition={{name: iid, clients: {CLIENTS}, max_rows: 150}}",
    ),
    "ukpconvarg-by-worker": (
        "ukpconvarg",
        f"partition.max_clients={CLIENTS}",
        "partition.max_rows=150",
    ),
}
MAIN = {
    "pooled": f"algorithm.name=pooled algorithm.local.gradient_accumulation_steps={CLIENTS}",
    "feddpo": "algorithm.name=feddpo",
    "S=3": "federation.clients_per_round=3",
    "ring": "algorithm.name=decdpo network.topology=ring",
    "complete": "algorithm.name=decdpo network.topology=complete",
}
REST = {
    "S=1": "federation.clients_per_round=1",
    "S=5": "federation.clients_per_round=5",
    "E=1": "algorithm.local.steps=1",
    "E=6": "algorithm.local.steps=6",
    "S=3, q=2": "algorithm.name=feddpo-stale algorithm.staleness=2 federation.clients_per_round=3",
    "S=3, q=5": "algorithm.name=feddpo-stale algorithm.staleness=5 federation.clients_per_round=3",
    "path": "algorithm.name=decdpo network.topology=path",
    "torus": "algorithm.name=decdpo network.topology=torus",
    "exponential": "algorithm.name=decdpo network.topology=exponential",
    "ring, E=1": "algorithm.name=decdpo network.topology=ring algorithm.local.steps=1",
    "ring, E=6": "algorithm.name=decdpo network.topology=ring algorithm.local.steps=6",
    "ring, q=2": "algorithm.name=decdpo-stale algorithm.staleness=2 network.topology=ring",
    "ring, q=5": "algorithm.name=decdpo-stale algorithm.staleness=5 network.topology=ring",
}


@dataclass(frozen=True)
class Outcome:
    """A line's rounds, one list of rows for each seed, and its last evaluations."""

    rounds: Sequence[Sequence[Mapping[str, float]]]
    evaluations: Sequence[Mapping[str, Any]]

    def curve(self, figure: str) -> list[float]:
        """A figure of each round, the mean over seeds."""
        return [
            statistics.fmean(row[figure] for row in rows) for rows in zip(*self.rounds, strict=True)
        ]

    def last(self, figure: str) -> float:
        """A figure of the last rounds, the mean over five of them and over seeds."""
        return statistics.fmean(self.curve(figure)[-5:])

    @property
    def clients(self) -> float:
        """How many took part in a round."""
        return statistics.fmean(self.curve("clients"))

    @property
    def accuracy(self) -> float:
        return statistics.fmean(row["summary"][ACCURACY]["mean"] for row in self.evaluations)

    def diagnostic(self, name: str) -> float:
        """At the end, the mean over seeds."""
        return statistics.fmean(row["diagnostics"][name] for row in self.evaluations)

    @property
    def bytes(self) -> float:
        """Of the whole run."""
        return sum(
            a + b for a, b in zip(self.curve("bytes_up"), self.curve("bytes_down"), strict=True)
        )


def train(
    name: str, data: str, seeds: Sequence[int], output: Path, console: Console
) -> dict[str, Outcome]:
    """All lines on a dataset; where clients are alike, the main ones."""
    config, *settings = DATASETS[name]
    lines = MAIN if name.endswith("at-random") else {**MAIN, **REST}
    variants = [f"{line}: {overrides}" for line, overrides in lines.items()]
    runs = plan(
        CONFIGS / f"{config}.yaml",
        variants,
        seeds,
        [f"data.path={data}", *settings, *COMMON],
        output / name,
    )
    for path, happenings in sweep(runs, output / name / "cache"):
        console.print(str(path), highlight=False)
        show(happenings, console)
    folders = {
        line: [RunDirectory(path) for path in runs if path.parent.name == line] for line in lines
    }
    return {
        line: Outcome(
            [f.read_rows(METRICS) for f in found], [f.read_rows(EVALUATION)[-1] for f in found]
        )
        for line, found in folders.items()
    }
