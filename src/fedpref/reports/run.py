"""What a run directory says, read once for what shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpref.errors import UserError
from fedpref.experiments.attack import groups
from fedpref.experiments.choosing import is_for_choosing
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.frozen import draws_of_all
from fedpref.experiments.run_directory import SAMPLES, RunDirectory, client_path
from fedpref.experiments.run_files import (
    AGREEMENT,
    CLIENTS,
    ENVIRONMENT,
    EVALUATION,
    METRICS,
    NEWCOMERS,
    REVIEWS,
    read_json,
    read_rows,
)
from fedpref.numerics.metrics import (
    ACCURACY,
    HEADLINES,
    ClientMetrics,
    Headline,
    headline,
    standard_error,
)
from fedpref.reports.paired import Gain, errors, gains, known_accuracies, outcomes

# client -> its value of the metric by which clients are compared, in that metric's unit
Values = dict[str, float]


@dataclass(frozen=True)
class Line:
    """One line of a run, the algorithm's own or a baseline's.

    Attributes:
        name: The line's.
        metrics: A row for each round.
        evaluations: A row for each evaluation.
    """

    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def chooses(self) -> bool:
        """Whether evaluations before the last are on other rows than it, to choose by."""
        return any(map(is_for_choosing, self.evaluations))

    @property
    def course(self) -> list[dict[str, Any]]:
        """Evaluations on the same rows, round after round: those to choose by, where there are.

        The last one, of more rows than those before (`evaluate_pairs`), is then none of them.
        """
        rows = [row for row in self.evaluations if is_for_choosing(row)] or self.evaluations
        return [row for row in rows if _are_alike(rows[0], row)]

    def column(self, name: str) -> list[float]:
        """Return a metric of every round that has it."""
        return [row[name] for row in self.metrics if name in row]

    @property
    def rounds(self) -> int:
        """The round after which the last evaluation was made."""
        return int(self.evaluations[-1]["round"]) if self.evaluations else 0

    def is_beside(self, other: Line) -> bool:
        """Return whether both have ended, each as it should, or been evaluated after as many
        rounds.
        """
        both = [line.evaluations[-1] for line in (self, other) if line.evaluations]
        if len(both) < 2:
            return False
        return all(row.get("final") for row in both) or self.rounds == other.rounds

    @property
    def last(self) -> ClientMetrics:
        """Metrics at the last evaluation, of each client that takes part in training."""
        clients: ClientMetrics = self.evaluations[-1]["clients"] if self.evaluations else {}
        return clients


def _are_alike(first: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Return whether two evaluations are of as many examples of whoever is in both."""
    if first.get("evaluate_pairs") != row.get("evaluate_pairs"):
        return False
    here, there = first["clients"], row["clients"]
    return all(
        here[name]["num_examples"] == there[name]["num_examples"]
        for name in here.keys() & there.keys()
    )


@dataclass(frozen=True)
class Run:
    """A run directory, finished or not."""

    path: Path
    experiment: Experiment
    clients: Mapping[str, Mapping[str, Any]]
    line: Line
    baselines: Mapping[str, Line]
    environment: Mapping[str, Any]
    done: bool
    title: str = field(default="", compare=False)
    """By which it is told from others beside it."""
    data: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """How many rows were read, left out, and could not be used."""

    @cached_property
    def metric(self) -> str:
        """The metric by which clients are compared; empty where nothing is told of them."""
        if self.is_summed:
            summary = self.line.evaluations[-1]["summary"]
            return headline(summary) if summary else ""
        return headline(next(iter(self.line.last.values())))

    @property
    def is_summed(self) -> bool:
        """Whether evaluations have no rows of single clients."""
        return bool(self.line.evaluations) and not self.line.last

    @property
    def shown(self) -> Headline:
        """How that metric is written."""
        return HEADLINES[self.metric] if self.metric else Headline("figure")

    def values(self, line: Line | None = None) -> Values:
        """Return each client's last value of that metric, under a line."""
        return {
            client: self.shown.scale * row[self.metric]
            for client, row in (line or self.line).last.items()
        }

    def gains(self, baseline: str) -> Values:
        """Return each client's value less what it has under a baseline.

        There is nothing where the baseline has not been evaluated after as many rounds.
        """
        mine, theirs = self._beside(baseline)
        return {
            name: self.shown.scale * (row[self.metric] - theirs[name][self.metric])
            for name, row in mine.items()
        }

    def noise(self, baseline: str) -> Values:
        """Return two standard errors of each gain, of the held-out pairs that measure it: of both
        lines' answers to the same prompts where they were kept.

        There is nothing for metrics that are no accuracy.
        """
        if self.metric != ACCURACY:
            return {}
        mine, theirs = self._beside(baseline)
        if (one := self.paired.get(baseline)) and one.errors.keys() == mine.keys():
            return {name: 2 * one.errors[name] for name in mine}
        return {
            name: 2 * self.shown.scale * math.hypot(_error(row), _error(theirs[name]))
            for name, row in mine.items()
        }

    @cached_property
    def paired(self) -> Mapping[str, Gain]:
        """What the line has over each baseline on the same held-out pairs, if kept."""
        return gains(self.path) if self.done and self.metric == ACCURACY else {}

    def errors(self, line: Line) -> Mapping[str, float]:
        """Return standard errors of clients' accuracies under a line, where pairs were kept."""
        return errors(outcomes(self.path, line.name)) if self.metric == ACCURACY else {}

    @cached_property
    def known_accuracies(self) -> Mapping[str, float]:
        """What the tastes reach by which clients' held-out pairs were drawn, where it is known."""
        evaluated = {name: self.clients[name] for name in self.line.last}
        return known_accuracies(self.experiment, evaluated)

    @cached_property
    def of_attack(self) -> Mapping[str, list[str]]:
        """Clients by what they are in a run that tries an attack; empty without one."""
        spec = self.experiment
        if spec.attack is None:
            return {}
        names, tastes = list(self.clients), spec.data.known_tastes
        late = spec.federation.joining(names, spec.seed)
        if draws_of_all(self.path):
            late = ()
        found = groups(spec.attack, names, spec.seed, tastes, late)
        known = {kind: [n for n in some if n in self.line.last] for kind, some in found.items()}
        return {kind: some for kind, some in known.items() if some}

    @cached_property
    def trained(self) -> Sequence[str]:
        """Clients that could take part in training; where all of them are evaluated, these."""
        if self.experiment.evaluate_clients is None:
            return list(self.line.last)
        late = self.experiment.federation.joining(list(self.clients), self.experiment.seed)
        return [name for i, name in enumerate(self.clients) if i not in late]

    @property
    def population(self) -> int:
        """How many could take part."""
        return len(self.trained)

    @cached_property
    def agreement(self) -> Mapping[str, tuple[float, float]]:
        """How far each client's changes agree with gold pairs, in the first third of the rounds and
        in all; empty without gold pairs.
        """
        rows = RunDirectory(self.path).read_rows(AGREEMENT)
        early = [row for row in rows if row["round"] <= max(1, self.experiment.rounds // 3)]
        means = [_means(some) for some in (early, rows)]
        # whoever came later has no early rounds
        return {name: (means[0].get(name, math.nan), value) for name, value in means[1].items()}

    @cached_property
    def reviews(self) -> Mapping[str, Any]:
        """What people have judged blind, by whose model and beside what; empty without a review."""
        file = self.path / REVIEWS
        return read_json(file) if file.exists() else {}

    def _beside(self, baseline: str) -> tuple[ClientMetrics, ClientMetrics]:
        """Return this line's last metrics and a baseline's, of the clients that have both."""
        other = self.baselines.get(baseline)
        if other is None or not other.is_beside(self.line):
            return {}, {}
        both = [name for name in self.line.last if name in other.last]
        return {name: self.line.last[name] for name in both}, {
            name: other.last[name] for name in both
        }

    @cached_property
    def sizes(self) -> dict[str, Mapping[str, Any]]:
        """Numbers of examples of all clients, also of those that joined when the run was over."""
        return {**self.clients, **self.joined}

    @cached_property
    def joined(self) -> dict[str, dict[str, Any]]:
        """Clients that joined when the run was over."""
        return {row["client"]: row for row in RunDirectory(self.path).read_rows(NEWCOMERS)}

    @cached_property
    def newcomers(self) -> dict[str, tuple[Values, Values]]:
        """Values of clients that joined after training, by line.

        They are as the clients came, and after their own steps.
        """
        values = {}
        for line in (self.line, *self.baselines.values()):
            row = line.evaluations[-1] if line.evaluations else {}
            later = self.joined if line is self.line else {}
            before = row.get("newcomers_before", {}) | {
                client: one["before"] for client, one in later.items()
            }
            after = row.get("newcomers", {}) | {
                client: one["after"] for client, one in later.items()
            }
            if after:
                values[line.name] = (self._values(before), self._values(after))
        return values

    def _values(self, clients: ClientMetrics) -> Values:
        return {client: self.shown.scale * row[self.metric] for client, row in clients.items()}

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Answers before and after training, by client."""
        files = {
            name: client_path(self.path, SAMPLES, name, ".jsonl")
            for name in sorted(self.clients)
            if (self.path / SAMPLES).is_dir()
        }
        return {name: read_rows(file) for name, file in files.items() if file}


def _error(row: Mapping[str, float]) -> float:
    return standard_error({"": row[ACCURACY]}, {"": int(row["num_examples"])})


def read(path: Path) -> Run:
    """Read a run; raises UserError where there is none, or none that has begun."""
    run = FinishedRun.at(path)
    # evaluations first: of a run at work a round's metrics are there before its evaluation
    evaluations = {
        name: line.read_rows(EVALUATION) for name, line in run.lines.items() if line.path.exists()
    }
    drawn = {
        name: Line(name, run.lines[name].read_rows(METRICS), rows)
        for name, rows in evaluations.items()
    }
    environment = read_json(path / ENVIRONMENT) if (path / ENVIRONMENT).exists() else {}
    experiment = run.experiment
    for name, line in drawn.items():
        if run.lines[name].done and not (line.metrics and line.evaluations):
            lost = METRICS if not line.metrics else EVALUATION
            raise UserError(
                f"{run.lines[name].path / lost}: this file of a finished run has lost its rows."
            )
    for line in drawn.values():
        if line.evaluations and (unknown := line.last.keys() - run.clients.keys()):
            raise UserError(
                f"{path}: {CLIENTS} does not know {sorted(unknown)[0]!r}, who was evaluated; one "
                "of the run's files is damaged."
            )
    main = drawn.pop(experiment.algorithm.name)
    return Run(
        path,
        experiment,
        run.clients,
        main,
        drawn,
        environment,
        run.is_finished,
        experiment.name,
        run.data,
    )


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each client's mean over rows that have it."""
    known: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["clients"].items():
            known.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in known.items()}
