"""Lines that differ by their seed alone, as figures and pages of sweeps show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpref.errors import UserError
from fedpref.experiments.run_directory import RunDirectory
from fedpref.numerics.metrics import HEADLINES, Headline
from fedpref.reports.comparison import grouped, not_each
from fedpref.reports.run import Line, Run, read
from fedpref.runs.sweep import is_sweep, members

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """A line of a run, or a variant of a sweep with all its seeds.

    Attributes:
        name: The line's or the variant's.
        lines: One for each seed.
        metric: By which clients are compared.
        run: The first of the runs.
    """

    name: str
    lines: Sequence[Line]
    metric: str
    run: Run

    @property
    def shown(self) -> Headline:
        """How the metric is written."""
        return HEADLINES[self.metric]

    def course(self) -> tuple[list[int], Matrix]:
        """Return the rounds that all seeds were evaluated after, and each seed's mean [seeds, r].

        Means are over clients, in the metric's unit.
        """
        tables = [
            {
                int(row["round"]): np.mean([one[self.metric] for one in row["clients"].values()])
                for row in line.course
            }
            for line in self.lines
        ]
        rounds = sorted(set.intersection(*(set(table) for table in tables)))
        values = [[self.shown.scale * float(table[r]) for r in rounds] for table in tables]
        return rounds, np.array(values)

    def training(self, name: str) -> tuple[list[int], Matrix]:
        """Return the rounds in which all seeds have a metric of training, and it [seeds, r]."""
        tables = [
            {int(row["round"]): row[name] for row in line.metrics if name in row}
            for line in self.lines
        ]
        rounds = sorted(set.intersection(*(set(table) for table in tables)))
        return rounds, np.array([[table[r] for r in rounds] for table in tables])

    def clients(self) -> dict[str, float]:
        """Return each client's last value, a mean over the seeds that have the client."""
        seen: dict[str, list[float]] = {}
        for line in self.lines:
            for client, row in line.last.items():
                seen.setdefault(client, []).append(self.shown.scale * row[self.metric])
        return {client: sum(values) / len(values) for client, values in seen.items()}


def groups_of(paths: Sequence[Path]) -> list[Group]:
    """Return the lines of one run, or several runs grouped by their name, each with its seeds.

    Args:
        paths: Run directories, and folders of sweeps.

    Raises:
        UserError: A run has not been evaluated, or runs are compared by different metrics.
    """
    runs = [run for path in paths for run in members(path)]
    if any(map(is_sweep, paths)):  # whose runs may be still to come
        runs = [run for run in runs if RunDirectory(run).has_begun]
    if len(runs) == 1:
        run = read(runs[0])
        lines = [line for line in (run.line, *run.baselines.values()) if line.last]
        groups = [Group(line.name, [line], run.metric, run) for line in lines] if lines else []
    else:
        groups = []
        for name, some in grouped(runs).items():
            read_ones = [read(run.path) for run in some.values()]
            if any(run.is_summed for run in read_ones):
                raise not_each(read_ones[0].path)
            if all(run.line.last for run in read_ones):
                lines = [run.line for run in read_ones]
                groups.append(Group(name, lines, read_ones[0].metric, read_ones[0]))
    if len(runs) == 1 and run.is_summed:
        raise not_each(run.path)
    if not groups:
        raise UserError(f"{paths[0]}: nothing has been evaluated yet.")
    if len({group.metric for group in groups}) > 1:
        raise UserError("runs of different tasks are compared by different metrics.")
    return groups
