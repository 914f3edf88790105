"""What a run directory says, read once for what shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fedpref.errors import UserError
from fedpref.experiment import Experiment, lines
from fedpref.rundirectory import CLIENTS, CONFIG, ENVIRONMENT, EVALUATION, METRICS, SAMPLES, RunDirectory
from fedpref.summary import HEADLINES, Headline, headline


@dataclass(frozen=True)
class Line:
    """One line of a run, the algorithm's or a reference's: a row of figures for each round, a row for each evaluation."""

    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    def column(self, name: str) -> list[float]:
        """A figure of every round that has it."""
        return [row[name] for row in self.metrics if name in row]

    @property
    def last(self) -> Mapping[str, Mapping[str, float]]:
        """Each client's metrics at the last evaluation."""
        found: Mapping[str, Mapping[str, float]] = self.evaluations[-1]["clients"] if self.evaluations else {}
        return found


@dataclass(frozen=True)
class Run:
    """A run directory, finished or not."""

    path: Path
    experiment: Experiment
    clients: Mapping[str, Mapping[str, Any]]
    line: Line
    references: Mapping[str, Line]
    environment: Mapping[str, Any]
    done: bool
    title: str = field(default="", compare=False)  # by which it is told from others beside it

    @cached_property
    def metric(self) -> str:
        """By which clients are compared."""
        return headline(next(iter(self.line.last.values())))

    @property
    def shown(self) -> Headline:
        return HEADLINES[self.metric]

    def values(self, line: Line | None = None) -> dict[str, float]:
        """Each client's last value of that metric, in its unit."""
        return {client: self.shown.scale * row[self.metric] for client, row in (line or self.line).last.items()}

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Answers before and after, by client."""
        files = sorted((self.path / SAMPLES).glob("*.jsonl"))
        return {unquote(file.stem): [json.loads(row) for row in file.read_text().splitlines()] for file in files}


def read(path: Path) -> Run:
    """Read a run; raises UserError where there is none."""
    folder = RunDirectory(path)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: there is no run here (no {CONFIG}). Give the directory that `fedpref run` printed.")
    experiment = Experiment.load(path / CONFIG)
    known = json.loads((path / CLIENTS).read_text()) if (path / CLIENTS).exists() else {}
    found = {
        name: Line(name, under.read_rows(METRICS), under.read_rows(EVALUATION))
        for name, (sub, _) in lines(experiment, max(1, len(known))).items()
        if (under := RunDirectory(path / sub)).path.exists()
    }
    environment = json.loads((path / ENVIRONMENT).read_text()) if (path / ENVIRONMENT).exists() else {}
    main = found.pop(experiment.algorithm.name)
    return Run(path, experiment, known, main, found, environment, folder.done, experiment.name)
