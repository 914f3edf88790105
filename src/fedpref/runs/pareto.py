"""The trade-off between objectives: one experiment under many preferences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpref.engines import Simulation
from fedpref.engines.workers import one_thread
from fedpref.errors import UserError, require
from fedpref.experiments.evaluations import evaluate
from fedpref.experiments.experiment import Experiment, encoded
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.frozen import refuse_apart
from fedpref.federation.aggregation import Product
from fedpref.models.loading import exported_parameters
from fedpref.numerics import trees
from fedpref.numerics.metrics import ACCURACY, REWARD, of_objectives
from fedpref.runs.sweep import plan

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """What a preference came to.

    Attributes:
        preference: Shares of the objectives.
        values: Each objective's held-out metric, a mean over clients and seeds.
        beside: What was measured besides.
        is_trained: Whether it was trained; otherwise it is a mean of its neighbours' adapters.
    """

    preference: tuple[float, ...]
    values: tuple[float, ...]
    beside: Mapping[str, float] = field(default_factory=dict)
    is_trained: bool = True
    """Not the mean of its neighbours' adapters."""


def preferences(objectives: int, points: int) -> list[tuple[float, ...]]:
    """Return preferences in equal steps over the simplex; the first objective's share rises.

    Args:
        objectives: How many there are.
        points: Preferences along each edge.
    """
    steps = points - 1
    directions = []
    for cuts in combinations_with_replacement(range(steps + 1), objectives - 1):
        edges = (0, *cuts, steps)
        directions.append(tuple((b - a) / steps for a, b in pairwise(edges)))
    return directions


def plan_front(
    config: Path,
    points: int,
    seeds: Sequence[int],
    overrides: Sequence[str],
    output: Path,
    *,
    interpolates: bool = False,
) -> tuple[tuple[str, ...], dict[tuple[float, ...], Mapping[Path, Experiment]]]:
    """Return the objectives, and for each preference the runs under it.

    Raises:
        UserError: The experiment has no objectives to choose between.
    """
    require("a front", "firm", "scipy", "moocore", "matplotlib")
    experiment = Experiment.load(config, overrides)
    objectives = experiment.task.objectives
    if len(objectives) < 2:
        raise UserError(
            f"{config}: the task has one objective, there is nothing to trade. Give "
            "it several, as `fedpref run firm` has."
        )
    if experiment.algorithm.preference is None:
        raise UserError(
            f"{config}: {experiment.algorithm.name} knows no preference over "
            "objectives. Take firm, scalarized or fsmgda."
        )
    if interpolates and len(objectives) != 2:
        raise UserError("--interpolate: adapters are interpolated between two objectives only.")
    if interpolates and isinstance(experiment.algorithm.aggregate, Product):
        raise UserError(
            "--interpolate: with algorithm.aggregate: product, adapters of two runs "
            "have no common factors. Take factors."
        )
    runs = {}
    for preference in preferences(len(objectives), points):
        shares = ",".join(f"{share:.4g}" for share in preference)
        runs[preference] = plan(
            config,
            [f"{shares}: algorithm.preference=[{shares}]"],
            seeds,
            overrides,
            output,
            redraws=False,
        )
    return objectives, runs


def measured(
    objectives: Sequence[str], runs: Mapping[tuple[float, ...], Sequence[Path]]
) -> list[Point]:
    """Return the points of finished runs.

    Raises:
        UserError: Some were made with other data, or another model of the same name.
    """
    every = [FinishedRun.at(path) for paths in runs.values() for path in paths]
    refuse_apart((run.folder, run.experiment) for run in every)
    for run in every:
        first = next(one for one in every if one.experiment.seed == run.experiment.seed)
        if _data(run) != _data(first):
            raise UserError(
                f"{run.path} and {first.path}: the data have changed between these runs, which are "
                "then no points of one front. Give another --output."
            )
    points = []
    for preference, paths in runs.items():
        rows = [FinishedRun.at(path).last_evaluation["summary"] for path in paths]
        points.append(
            _point(
                preference,
                objectives,
                [{name: summary["mean"] for name, summary in row.items()} for row in rows],
            )
        )
    return points


def _data(run: FinishedRun) -> dict[str, str]:
    return {client: str(about["digest"]) for client, about in run.clients.items()}


def interpolated(
    objectives: Sequence[str],
    runs: Mapping[tuple[float, ...], Mapping[Path, Experiment]],
    between: int,
    cache: Path,
) -> Iterator[Point]:
    """Yield points between neighbouring preferences of two objectives, without training.

    They are weighted means of the neighbours' adapters (rewarded soups, Ramé et al. 2023).
    """
    seeds = range(len(next(iter(runs.values()))))
    with one_thread(), ExitStack() as stack:
        made = [_engine(experiment, cache) for experiment in next(iter(runs.values())).values()]
        engines = [stack.enter_context(closing(engine)) for engine, _ in made]
        language = made[0][1].language
        adapters = {
            path: exported_parameters(language, FinishedRun.at(path).model_folder())
            for paths in runs.values()
            for path in paths
        }
        for (first, starts), (second, ends) in pairwise(
            (preference, list(paths)) for preference, paths in runs.items()
        ):
            for k in range(1, between + 1):
                share = k / (between + 1)
                rows = []
                for i in seeds:
                    mixed = trees.add(
                        trees.scale(adapters[starts[i]], 1 - share),
                        trees.scale(adapters[ends[i]], share),
                    )
                    of_clients = list(
                        engines[i].disclose(engines[i].each(evaluate, mixed)).values()
                    )
                    rows.append(
                        {
                            name: statistics.fmean(row[name] for row in of_clients)
                            for name in of_clients[0]
                        }
                    )
                preference = tuple(
                    (1 - share) * a + share * b for a, b in zip(first, second, strict=True)
                )
                yield _point(preference, objectives, rows, is_trained=False)


def _engine(experiment: Experiment, cache: Path) -> tuple[Simulation, Any]:
    """Return an engine over the clients that an experiment trains with, to evaluate on, and its
    task.
    """
    task = experiment.build_task()
    shards = [task.prepare(shard, cache) for shard in encoded(experiment, task)[1]]
    engine = Simulation(task, shards, seed=experiment.seed, rounds=1)
    names = [shard.name for shard in shards]
    newcomers = experiment.federation.joining(names, experiment.seed)
    trained = [i for i in engine.clients if i not in newcomers]
    # those of whom the trained points' last evaluation is
    engine.begin(0, experiment.evaluated(names, trained, True), "evaluate")
    return engine, task


def _point(
    preference: tuple[float, ...],
    objectives: Sequence[str],
    rows: Sequence[Mapping[str, float]],
    *,
    is_trained: bool = True,
) -> Point:
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    start = "rewards/" if REWARD in means else f"{ACCURACY}/"
    names = [start + objective for objective in objectives]
    beside = {name: means[name] for name in of_objectives(means) if name not in names}
    return Point(preference, tuple(means[name] for name in names), beside, is_trained)


# ---- figures


def best(values: Values) -> NDArray[np.bool_]:
    """Return which points no other point dominates.

    A point is dominated by one that is at least as good in every objective and better in one.
    """
    import moocore

    on_front: NDArray[np.bool_] = moocore.is_nondominated(values, maximise=True, keep_weakly=True)
    return on_front


def hypervolume(values: Values, reference: Sequence[float]) -> float:
    """Return what the points dominate above a reference point; more is better."""
    import moocore

    return float(moocore.hypervolume(values, ref=np.asarray(reference), maximise=True))


def spacing(values: Values) -> float:
    """Return how unevenly the best points lie (Schott 1995).

    It is the deviation of their distances to the nearest other.
    """
    front = values[best(values)]
    if len(front) < 2:
        return 0.0
    apart = np.abs(front[:, None] - front[None]).sum(2)
    np.fill_diagonal(apart, np.inf)
    return float(apart.min(1).std(ddof=1))


def follows(points: Sequence[Point]) -> float:
    """Return how far objectives follow their preferences; 1 is all the way.

    It is Spearman's correlation of the two, the mean over objectives. An objective that is the same
    everywhere follows nothing.
    """
    from scipy.stats import spearmanr

    shares, values = (
        np.array([getattr(point, name) for point in points]) for name in ("preference", "values")
    )
    spacings = [
        float(spearmanr(shares[:, m], values[:, m]).statistic) if np.ptp(values[:, m]) else 0.0
        for m in range(shares.shape[1])
    ]
    return statistics.fmean(spacings)


def parse_reference(text: str, objectives: Sequence[str]) -> tuple[float, ...]:
    """Return a number for each objective; raises UserError for anything else."""
    try:
        point = tuple(float(part) for part in text.split(","))
    except ValueError:
        point = ()
    if len(point) != len(objectives) or not all(map(math.isfinite, point)):
        raise UserError(
            f"--reference {text!r}: expected {len(objectives)} numbers with commas "
            f"between, for {', '.join(objectives)}."
        )
    return point


def reference_of(points: Sequence[Point]) -> tuple[float, ...]:
    """Return a reference point: a tenth of each range below the worst trained value.

    It is good for one front, not to compare two.
    """
    values = np.array([point.values for point in points if point.is_trained])
    return tuple((values.min(0) - 0.1 * np.ptp(values, axis=0)).tolist())


def front_metrics(points: Sequence[Point], reference: Sequence[float]) -> dict[str, float]:
    """Return metrics of the trained points; the hypervolume is above a reference point."""
    trained = [point for point in points if point.is_trained]
    values = np.array([point.values for point in trained])
    metrics = {
        "hypervolume": hypervolume(values, reference),
        "spacing": spacing(values),
        "follows": follows(trained),
    }
    if len(trained) < len(points):
        metrics["hypervolume_interpolated"] = hypervolume(
            np.array([point.values for point in points]), reference
        )
    return metrics
