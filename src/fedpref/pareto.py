"""The trade-off between objectives: one experiment under many preferences, and what its runs come to."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from fedpref import trees
from fedpref.engines import Simulation
from fedpref.engines.workers import one_thread
from fedpref.errors import UserError
from fedpref.experiment import Experiment
from fedpref.rundirectory import EVALUATION, RunDirectory
from fedpref.running import evaluate, exported
from fedpref.summary import of_objectives
from fedpref.sweep import plan

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """What a preference came to: each objective's held-out metric, a mean over clients and seeds, and what was measured beside."""

    preference: tuple[float, ...]
    values: tuple[float, ...]
    beside: Mapping[str, float] = field(default_factory=dict)
    is_trained: bool = True  # not the mean of its neighbours' adapters


def preferences(objectives: int, points: int) -> list[tuple[float, ...]]:
    """Preferences in equal steps over the simplex, so many along each of its edges; the first objective's share rises."""
    steps = points - 1
    found = []
    for cuts in combinations_with_replacement(range(steps + 1), objectives - 1):
        edges = (0, *cuts, steps)
        found.append(tuple((b - a) / steps for a, b in pairwise(edges)))
    return found


def plan_front(
    config: Path, points: int, seeds: Sequence[int], overrides: Sequence[str], output: Path
) -> tuple[tuple[str, ...], dict[tuple[float, ...], Mapping[Path, Experiment]]]:
    """The objectives, and for each preference the runs under it; raises UserError where the experiment has none to choose between."""
    experiment = Experiment.load(config, overrides)
    objectives = experiment.task.objectives
    if len(objectives) < 2:
        raise UserError(f"{config}: the task has one objective, there is nothing to trade. Give it several (docs/algorithms.md, firm).")
    if not hasattr(experiment.algorithm, "preference"):
        raise UserError(f"{config}: {experiment.algorithm.name} knows no preference over objectives. Take firm, scalarised or fsmgda.")
    runs = {}
    for preference in preferences(len(objectives), points):
        shares = ",".join(f"{share:.4g}" for share in preference)
        runs[preference] = plan(config, [f"{shares}: algorithm.preference=[{shares}]"], seeds, overrides, output)
    return objectives, runs


def measured(objectives: Sequence[str], runs: Mapping[tuple[float, ...], Sequence[Path]]) -> list[Point]:
    """Points of finished runs."""
    found = []
    for preference, paths in runs.items():
        rows = [RunDirectory(path).read_rows(EVALUATION)[-1]["summary"] for path in paths]
        found.append(_point(preference, objectives, [{name: summary["mean"] for name, summary in row.items()} for row in rows]))
    return found


def interpolated(
    objectives: Sequence[str], runs: Mapping[tuple[float, ...], Mapping[Path, Experiment]], between: int, cache: Path
) -> Iterator[Point]:
    """Between each two neighbouring preferences of two objectives so many points by weighted means of their adapters, without training
    (rewarded soups, Ramé et al. 2023); raises UserError for more objectives.
    """
    if len(objectives) != 2:
        raise UserError("--interpolate: adapters are interpolated between two objectives only.")
    seeds = range(len(next(iter(runs.values()))))
    with one_thread(), ExitStack() as stack:
        engines = [stack.enter_context(closing(_engine(experiment, cache))) for experiment in next(iter(runs.values())).values()]
        adapters = {path: trees.load(exported(path) / "adapter_model.safetensors") for paths in runs.values() for path in paths}
        for (first, starts), (second, ends) in pairwise((preference, list(paths)) for preference, paths in runs.items()):
            for k in range(1, between + 1):
                share = k / (between + 1)
                rows = []
                for i in seeds:
                    mixed = trees.add(trees.scale(adapters[starts[i]], 1 - share), trees.scale(adapters[ends[i]], share))
                    of_clients = list(engines[i].disclose(engines[i].each(evaluate, mixed)).values())
                    rows.append({name: statistics.fmean(row[name] for row in of_clients) for name in of_clients[0]})
                preference = tuple((1 - share) * a + share * b for a, b in zip(first, second, strict=True))
                yield _point(preference, objectives, rows, is_trained=False)


def _engine(experiment: Experiment, cache: Path) -> Simulation:
    """All clients of an experiment, to evaluate on."""
    task = experiment.build_task()
    shards = [task.prepare(task.encode(client), cache) for client in experiment.clients()[0]]
    return Simulation(task, shards, seed=experiment.seed, rounds=1)


def _point(
    preference: tuple[float, ...], objectives: Sequence[str], rows: Sequence[Mapping[str, float]], *, is_trained: bool = True
) -> Point:
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    names = [next(name for name in of_objectives(means) if name.rsplit("/", 1)[-1] == objective) for objective in objectives]
    beside = {name: means[name] for name in of_objectives(means) if name not in names}
    return Point(preference, tuple(means[name] for name in names), beside, is_trained)


# ---- figures


def best(values: Values) -> NDArray[np.bool_]:
    """Which points no other point is at least as good as in every objective and better in one."""
    import moocore

    found: NDArray[np.bool_] = moocore.is_nondominated(values, maximise=True)
    return found


def hypervolume(values: Values, reference: Sequence[float]) -> float:
    """What the points dominate above a reference point; more is better."""
    import moocore

    return float(moocore.hypervolume(values, ref=np.asarray(reference), maximise=True))


def spacing(values: Values) -> float:
    """How unevenly the best points lie: the deviation of their distances to the nearest other (Schott 1995)."""
    front = values[best(values)]
    if len(front) < 2:
        return 0.0
    apart = np.abs(front[:, None] - front[None]).sum(2)
    np.fill_diagonal(apart, np.inf)
    return float(apart.min(1).std(ddof=1))


def follows(points: Sequence[Point]) -> float:
    """How far objectives follow their preferences: Spearman's correlation of the two, the mean over objectives; 1 is all the way.

    An objective that is the same everywhere follows nothing.
    """
    shares, values = (np.array([getattr(point, name) for point in points]) for name in ("preference", "values"))
    found = [float(spearmanr(shares[:, m], values[:, m]).statistic) if np.ptp(values[:, m]) else 0.0 for m in range(shares.shape[1])]
    return statistics.fmean(found)


def figures(points: Sequence[Point], reference: Sequence[float] | None = None) -> dict[str, float]:
    """Of the trained points; the reference point of the hypervolume is, if none is given, the worst value of each objective."""
    trained = [point for point in points if point.is_trained]
    values = np.array([point.values for point in trained])
    found = {"hypervolume": hypervolume(values, reference or values.min(0)), "spacing": spacing(values), "follows": follows(trained)}
    if len(trained) < len(points):
        whole = np.array([point.values for point in points])
        found["hypervolume_interpolated"] = hypervolume(whole, reference or values.min(0))
    return found
