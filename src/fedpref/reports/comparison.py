"""Runs side by side: paired differences over clients and seeds, from run directories alone."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich.table import Table

from fedpref.errors import UserError
from fedpref.reports.tables import bytes_text
from fedpref.rundirectory import CONFIG, EVALUATION, METRICS, RunDirectory
from fedpref.summary import ACCURACY, over_clients

RESAMPLES = 10_000
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One line of the comparison: runs that differ by their seed alone. Accuracies are in per cent, intervals of 95 %."""

    name: str
    seeds: int
    mean: float
    interval: tuple[float, float]
    gain: tuple[float, float, float] | None  # over the first line: mean and interval; None for the first itself
    worst: float
    worst_decile: float
    jain: float
    bytes_per_round: float  # up and down, over all clients
    seconds_per_round: float


def compare(paths: Sequence[Path]) -> list[Row]:
    """Runs grouped by their name, in the order in which names first appear; the first is what the others are compared with.

    Raises UserError when runs are unfinished or were not made on the same clients and seeds.
    """
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in paths:
        if not RunDirectory(path).done:
            raise UserError(f"{path}: the run is not finished, or there is none. `fedpref resume {path}` finishes it.")
        content = OmegaConf.load(path / CONFIG)
        runs = groups[str(content.name)]
        if content.seed in runs:
            raise UserError(
                f"{path} and {runs[content.seed]} have the same name {content.name!r} and seed {content.seed}. "
                "Runs of different settings need different names: set name=... when you run them."
            )
        runs[content.seed] = path
    lines = [(name, sorted(runs), [runs[seed] for seed in sorted(runs)]) for name, runs in groups.items()]
    matrices = [_matrix(name, ordered) for name, _, ordered in lines]
    rows: list[Row] = []
    for (name, seeds, ordered), (clients, values) in zip(lines, matrices, strict=True):
        if (seeds, clients) != (lines[0][1], matrices[0][0]):
            raise UserError(
                f"{name}: its seeds {seeds} or its {len(clients)} clients are not those of {lines[0][0]}; compare runs on one split."
            )
        rows.append(_row(name, ordered, clients, values, matrices[0][1] if rows else None))
    return rows


def _matrix(name: str, paths: Sequence[Path]) -> tuple[list[str], Matrix]:
    """Clients and their accuracies in per cent, [seeds, clients]."""
    tables = []
    for path in paths:
        last = RunDirectory(path).read_rows(EVALUATION)[-1]["clients"]
        tables.append({client: 100 * row[ACCURACY] for client, row in last.items()})
    clients = sorted(tables[0])
    if any(sorted(table) != clients for table in tables):
        raise UserError(f"{name}: its runs have different clients; compare runs on one split.")
    return clients, np.array([[table[client] for client in clients] for table in tables])


def bootstrap(values: Matrix, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of the mean of a [seeds, clients] matrix, both resampled with replacement, each by itself."""
    rng = np.random.default_rng(0)
    seeds, clients = values.shape
    rows, columns = rng.integers(seeds, size=(resamples, seeds)), rng.integers(clients, size=(resamples, clients))
    means = values[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _row(name: str, paths: Sequence[Path], clients: Sequence[str], values: Matrix, reference: Matrix | None) -> Row:
    metrics = [row for path in paths for row in RunDirectory(path).read_rows(METRICS)]
    over = [over_clients(dict(zip(clients, line.tolist(), strict=True)), dict.fromkeys(clients, 1)) for line in values]
    return Row(
        name,
        seeds=len(paths),
        mean=float(values.mean()),
        interval=bootstrap(values),
        gain=None if reference is None else (float((values - reference).mean()), *bootstrap(values - reference)),
        worst=float(np.mean([summary["worst"] for summary in over])),
        worst_decile=float(np.mean([summary["worst_decile"] for summary in over])),
        jain=float(np.mean([summary["jain"] for summary in over])),
        bytes_per_round=float(np.mean([row["bytes_up"] + row["bytes_down"] for row in metrics])),
        seconds_per_round=float(np.mean([row["seconds"] for row in metrics])),
    )


# ---- the table: on a terminal, as Markdown, as CSV

TITLES = ("", "seeds", "accuracy, % [95 %]", "gain [95 %]", "worst client", "worst decile", "Jain", "bytes a round", "s a round")


def cells(row: Row) -> tuple[str, ...]:
    """A row for people."""
    return (
        row.name,
        str(row.seeds),
        f"{row.mean:.1f} [{row.interval[0]:.1f}, {row.interval[1]:.1f}]",
        "" if row.gain is None else f"{row.gain[0]:+.1f} [{row.gain[1]:+.1f}, {row.gain[2]:+.1f}]",
        f"{row.worst:.1f}",
        f"{row.worst_decile:.1f}",
        f"{row.jain:.4f}",
        bytes_text(row.bytes_per_round),
        f"{row.seconds_per_round:.1f}",
    )


def table(rows: Sequence[Row]) -> Table:
    """For a terminal."""
    shown = Table(title=f"held-out pair accuracy; gains over {rows[0].name}", title_style="bold", title_justify="left")
    for title in TITLES:
        shown.add_column(title, justify="right" if title else "left", no_wrap=not title)
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def markdown(rows: Sequence[Row]) -> str:
    """For a document."""
    lines = [TITLES, ("---",) * len(TITLES), *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(rows: Sequence[Row]) -> str:
    """For other programs: plain numbers."""
    names = [
        "name",
        "seeds",
        "mean",
        "low",
        "high",
        "gain",
        "gain_low",
        "gain_high",
        "worst",
        "worst_decile",
        "jain",
        "bytes_per_round",
        "seconds_per_round",
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        rest = (row.worst, row.worst_decile, row.jain, row.bytes_per_round, row.seconds_per_round)
        writer.writerow([row.name, row.seeds, row.mean, *row.interval, *(row.gain or ("", "", "")), *rest])
    return out.getvalue()
