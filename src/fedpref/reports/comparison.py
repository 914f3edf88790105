"""Runs side by side: paired differences over clients and seeds, from run directories."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedpref.errors import UserError, command
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.free_baselines import FREE_LINES
from fedpref.experiments.frozen import deciding, refuse_apart
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import METRICS
from fedpref.numerics.fairness import Fairness, fairness
from fedpref.numerics.intervals import Matrix, interval
from fedpref.numerics.metrics import ACCURACY, COMBINED, HEADLINES, headline, over_clients
from fedpref.reports.equal_terms import Course, at, cost_of, course, parse, scaled, seen
from fedpref.reports.paired import Outcomes, errors, gain, outcomes
from fedpref.reports.run import Line
from fedpref.runs.sweep import is_sweep, members


@dataclass(frozen=True)
class Row:
    """One line of the comparison: runs that differ by their seed alone.

    Means and gains are in the metric's unit, intervals of 95 %.
    """

    name: str
    metric: str
    """By which clients are compared."""
    seeds: int
    values: Matrix
    """[seeds, clients], by clients' names."""
    over: str
    """What intervals are over: who or what would be drawn anew."""
    mean: float
    interval: tuple[float, float]
    gain: tuple[float, float, float] | None
    """Over the first line: mean and interval; None for the first itself."""
    worst: float
    worst_decile: float
    jain: float
    bytes_per_round: float
    """Up and down, over all clients."""
    seconds_per_round: float
    newcomers: tuple[float, float] | None
    """Clients that never trained: mean as they came, and after they joined."""
    combined: float | None = None
    """The mean with clients' reward heads beside their policies, where there are any."""
    std: float = math.nan
    """The standard deviation over clients."""
    even: Fairness | None = None
    """Intervals of the worst client, the worst decile and the standard deviation, where pairs were
    kept."""
    harmed: tuple[float, float] | None = None
    """The interval of the share of clients that lose against the first line, luck taken out."""
    seen: float = math.nan
    """Examples that all clients were trained on, a mean over seeds; nan where none are counted."""
    steps: float = math.nan
    """Local steps of a client that trains in every round."""
    is_chosen_by: bool = False
    """Its figures are of rows that are set aside to choose by, and not of the test's."""
    differs: tuple[str, ...] = ()
    """Settings, beside seeds, by which its runs differ."""
    cost: Mapping[str, float] | None = None
    """What it took to reach the figure that was asked for: `rounds`, `seconds`, `mb`, `pairs`; nan
    where a run never did."""


@dataclass(frozen=True)
class Terms:
    """On what terms lines are compared: by default as each ended.

    Attributes:
        at: What is made equal, as in `kl=2`: values are those where its mean was first there.
        to: A figure of the table; rows say what it took to reach it.
    """

    at: str | None = None
    to: str | None = None


AS_ENDED = Terms()
SEEDS = frozenset({"seed", "data.split_seed"})
NEVER = dict.fromkeys(("rounds", "seconds", "mb", "pairs"), math.nan)  # what no line came to


def compare(paths: Sequence[Path], terms: Terms = AS_ENDED) -> list[Row]:
    """Compare runs, grouped by their name.

    Groups come in the order in which names first appear; the others are compared with the first.
    Where two runs have one name and one seed, or one name is of several algorithms, runs go by the
    names of their directories. For each seed, all groups must have the same clients with the same
    data. Between seeds other rows may be held out; where clients are cut at random, a client of one
    seed is nobody in another.

    Args:
        paths: Run directories, and folders of sweeps for all of their runs.
        terms: On what terms.

    Raises:
        UserError: Runs are unfinished, were not made on the same seeds and data, or cannot be
            compared on these terms.
    """
    paths = [run for path in paths for run in members(path)]
    if unfinished := [path for path in paths if not RunDirectory(path).done]:
        raise UserError(
            f"{unfinished[0]}: the run is not finished, or there is none. `fedpref resume "
            f"{unfinished[0]}` finishes it."
        )
    return _compared(
        [
            _line(name, {seed: _Member(run) for seed, run in runs.items()}, terms)
            for name, runs in grouped(paths).items()
        ],
        terms,
    )


def compare_all(paths: Sequence[Path], terms: Terms = AS_ENDED) -> list[Row]:
    """Compare runs as `compare` does, or a run alone with its own baselines; raises UserError."""
    if len(paths) > 1 or is_sweep(paths[0]):
        return compare(paths, terms)
    run = FinishedRun.at(paths[0]).require_done()
    trained = [name for name in run.lines if terms == AS_ENDED or name not in FREE_LINES]
    done = [name for name in trained if run.lines[name].done]
    return _compared(
        [_line(name, {run.experiment.seed: _Member(run, name)}, terms) for name in done], terms
    )


def _compared(lines: Sequence[_Line], terms: Terms) -> list[Row]:
    first = lines[0]
    runs = [member.run for line in lines for member in line.members]
    refuse_apart((run.folder, run.experiment) for run in runs)
    for line in lines:
        if line.metric != first.metric:
            raise UserError(
                f"{line.name} and {first.name}: runs of different tasks are compared by different "
                f"metrics ({line.metric}, {first.metric})."
            )
        if line.seeds != first.seeds:
            raise UserError(
                f"{line.name}: its seeds {line.seeds} are not those of {first.name}, {first.seeds}."
            )
        if line.data != first.data:
            raise UserError(
                f"{line.name}: its clients or their data are not those of {first.name}; compare "
                "runs on one split."
            )
    return [_row(line, None if line is first else first, terms) for line in lines]


def not_each(path: Path) -> UserError:
    """Return what is said of a run whose clients' figures are told as sums, or not at all."""
    return UserError(
        f"{path}: its clients' figures are not told one by one, so that they cannot be compared. "
        f"`{command('report', path)}` shows what is told."
    )


def grouped(paths: Sequence[Path]) -> dict[str, dict[int, FinishedRun]]:
    """Return runs by their name and, in order, by their seed.

    Raises:
        UserError: Two runs cannot be told apart.
    """
    groups: dict[str, dict[int, FinishedRun]] = defaultdict(dict)
    runs = [FinishedRun.at(path) for path in paths]
    told = {(run.experiment.name, run.experiment.seed) for run in runs}
    kinds = {(run.experiment.name, run.experiment.algorithm.name) for run in runs}
    # runs of one name and seed, or of several algorithms under one name
    by_folder = len(told) < len(runs) or len(kinds) > len({name for name, _ in kinds})
    for run in runs:
        name = run.path.resolve().name if by_folder else run.experiment.name
        seed = run.experiment.seed
        if seed in groups[name]:
            raise UserError(
                f"{run.path} and {groups[name][seed].path} have the same name and seed, and their "
                "directories have too. Rename one."
            )
        groups[name][seed] = run
    return {name: {seed: some[seed] for seed in sorted(some)} for name, some in groups.items()}


@dataclass(frozen=True)
class _Member:
    """A run's own line, or one of its baselines."""

    run: FinishedRun
    line: str | None = None

    @property
    def last(self) -> Mapping[str, Any]:
        """The last evaluation."""
        return self.run.last_of(self.line or self.run.experiment.algorithm.name)

    @cached_property
    def outcomes(self) -> Outcomes:
        """What came of each held-out example, of the clients that trained."""
        found = outcomes(self.run.path, self.line or self.run.experiment.algorithm.name)
        return {name: found[name] for name in self.last["clients"] if name in found}

    @property
    def course(self) -> Course:
        """How the line went."""
        name = self.line or self.run.experiment.algorithm.name
        return course(Line(name, [], self.run.evaluations(name)).course, self.rounds)

    @property
    def steps(self) -> float:
        """Local steps of a client that trains in every round; nan where none are taken."""
        if self.line in FREE_LINES:
            return math.nan
        return float(self.run.experiment.algorithm.local.steps * len(self.rounds))

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """What was measured in each round."""
        folder = self.run.lines[self.line] if self.line else self.run.folder
        rows = folder.read_rows(METRICS)
        if not rows:
            raise UserError(
                f"{folder.path / METRICS}: this file of a finished run has lost its rows."
            )
        return rows


@dataclass(frozen=True)
class _Line:
    name: str
    metric: str
    seeds: list[int]
    members: list[_Member]
    data: list[dict[str, str]]
    """For each seed: client -> digest of its data, of the clients that trained."""
    values: Matrix
    """[seeds, clients], in the metric's unit."""

    @property
    def crossed(self) -> bool:
        """Whether the clients are the same with every seed, whatever it holds out."""
        if any(data.keys() != self.data[0].keys() for data in self.data):
            return False
        kept = all(member.run.experiment.partition.keeps_clients for member in self.members)
        return kept or all(data == self.data[0] for data in self.data)

    @property
    def over(self) -> str:
        """What its intervals are over."""
        if len(self.seeds) == 1:
            return "clients"
        return "clients and seeds" if self.crossed else "seeds, each with clients of its own"


def _line(name: str, runs: Mapping[int, _Member], terms: Terms) -> _Line:
    tables = [member.last["clients"] for member in runs.values()]
    if not all(tables):
        raise not_each(next(iter(runs.values())).run.path)
    if terms.at is not None:
        metric = headline(next(iter(tables[0].values())))
        made_equal = parse(terms.at)
        tables = [
            {
                client: {metric: value}
                for client, value in at(name, member.course, *made_equal, metric).items()
            }
            for member in runs.values()
        ]
    if len({len(metrics) for metrics in tables}) > 1:
        raise UserError(
            f"{name}: its runs have different numbers of clients; compare runs on one split."
        )
    data = [
        {client: member.run.clients[client]["digest"] for client in sorted(metrics)}
        for member, metrics in zip(runs.values(), tables, strict=True)
    ]
    metric = headline(next(iter(tables[0].values())))
    scale = HEADLINES[metric].scale
    values = np.array(
        [[scale * metrics[client][metric] for client in sorted(metrics)] for metrics in tables]
    )
    return _Line(name, metric, list(runs), list(runs.values()), data, values)


def _row(line: _Line, against: _Line | None, terms: Terms) -> Row:
    metrics = [row for member in line.members for row in member.rounds]
    values, crossed = line.values, line.crossed
    first = None if against is None else against.values
    names = [str(i) for i in range(values.shape[1])]
    over = [
        over_clients(dict(zip(names, of_seed.tolist(), strict=True)), dict.fromkeys(names, 1))
        for of_seed in values
    ]
    return Row(
        line.name,
        line.metric,
        seeds=len(line.seeds),
        values=values,
        over=line.over,
        mean=float(values.mean()),
        interval=HEADLINES[line.metric].within(*interval(values, crossed=crossed)),
        gain=None
        if first is None
        else (float((values - first).mean()), *interval(values - first, crossed=crossed)),
        worst=float(np.mean([summary["worst"] for summary in over])),
        worst_decile=float(np.mean([summary["worst_decile"] for summary in over])),
        jain=float(np.mean([summary.get("jain", math.nan) for summary in over])),
        bytes_per_round=float(np.mean([row["bytes_up"] + row["bytes_down"] for row in metrics])),
        seconds_per_round=float(np.mean([row["seconds"] for row in metrics])),
        newcomers=_newcomers(line.members),
        combined=None if terms.at else _combined(line.members),
        std=float(np.mean([summary["std"] for summary in over])),
        # pairs were kept of the end alone
        even=None if terms.at else _even(line),
        harmed=None if terms.at or against is None else _harmed(line, against),
        seen=float(np.mean([seen(member.rounds) for member in line.members])),
        steps=float(np.mean([member.steps for member in line.members])),
        cost=None if terms.to is None else _cost(line, terms.to),
        is_chosen_by=any(member.run.experiment.evaluate_on != "test" for member in line.members),
        differs=_differing([member.run.experiment for member in line.members]),
    )


def _differing(experiments: Sequence[Experiment]) -> tuple[str, ...]:
    """Return the settings that decide something and are not the same, as keys with points."""
    said = [dict(_keyed(deciding(one))) for one in experiments]
    return tuple(
        sorted(
            key
            for key in {key for one in said for key in one}
            if key not in SEEDS and len({one.get(key) for one in said}) > 1
        )
    )


def _keyed(content: Any, *above: str) -> Iterator[tuple[str, str]]:
    """Yield what stands at the end of each way through plain data, as text."""
    if isinstance(content, Mapping) and content:
        for name, part in content.items():
            yield from _keyed(part, *above, str(name))
    else:
        yield ".".join(above), str(content)


def _cost(line: _Line, figure: str) -> dict[str, float]:
    """Return the means over seeds of what it took to reach a figure."""
    value = scaled(line.metric, figure)
    found = [cost_of(member.course, line.metric, value) or NEVER for member in line.members]
    return {name: float(np.mean([one[name] for one in found])) for name in NEVER}


def _even(line: _Line) -> Fairness | None:
    """Return how evenly clients fare; None unless they are the same with every seed.

    Seeds are not taken as more examples: under each most held-out prompts are the same.
    """
    known = [errors(member.outcomes) for member in line.members]
    if line.metric != ACCURACY or not line.crossed or not all(known):
        return None
    squares = np.array([[of_seed[name] ** 2 for name in sorted(of_seed)] for of_seed in known])
    return fairness(line.values.mean(0).tolist(), np.sqrt(squares.mean(0)).tolist())


def _harmed(line: _Line, against: _Line) -> tuple[float, float] | None:
    """Return the share of clients that lose against another line, as `Gain.harmed` does."""
    if line.metric != ACCURACY or not line.crossed:
        return None
    pairs = zip(line.members, against.members, strict=True)
    found = [gain(ours.outcomes, theirs.outcomes) for ours, theirs in pairs]
    gains = [one for one in found if one]
    if len(gains) < len(found):
        return None
    names = sorted(gains[0].clients)
    values = np.array([[one.clients[name] for name in names] for one in gains])
    squares = np.array([[one.errors[name] ** 2 for name in names] for one in gains])
    even = fairness(values.mean(0).tolist(), np.sqrt(squares.mean(0)).tolist())
    return even.harmed if even else None


def _combined(members: Sequence[_Member]) -> float | None:
    """Return the mean with clients' reward heads beside their policies; None without any."""
    last = [member.last["clients"] for member in members]
    values = [metrics.get(COMBINED) for clients in last for metrics in clients.values()]
    if not values or None in values:
        return None
    return float(HEADLINES[ACCURACY].scale * np.mean(values))


def _newcomers(members: Sequence[_Member]) -> tuple[float, float] | None:
    """Return mean values of clients that never trained, as they came and after they joined.

    None where there are no such clients.
    """
    last = [member.last for member in members]
    if not all("newcomers" in row for row in last):
        return None
    metric = headline(next(iter(last[0]["newcomers"].values())))
    scale = HEADLINES[metric].scale
    before, after = (
        [scale * one[metric] for row in last for one in row[when].values()]
        for when in ("newcomers_before", "newcomers")
    )
    return float(np.mean(before)), float(np.mean(after))
