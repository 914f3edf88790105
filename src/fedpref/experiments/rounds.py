"""Running an experiment: from data to adapters, round by round, into a run directory."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fedpref import config
from fedpref.engines import Engine, Transport
from fedpref.engines.kept_sums import KeptSums
from fedpref.engines.private_sums import PrivateSums
from fedpref.engines.timing import Clock
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.errors import UserError
from fedpref.experiments.choosing import VALIDATION, standing
from fedpref.experiments.clients import About, AtSites, ClientSource, InProcess
from fedpref.experiments.environment import described
from fedpref.experiments.evaluations import Look, export_models, measured
from fedpref.experiments.experiment import Experiment, with_whole_paths
from fedpref.experiments.frozen import as_text, decided, frozen, refuse_other
from fedpref.experiments.lines import lines
from fedpref.experiments.private import FOLDER, refuse_lost
from fedpref.experiments.run_directory import CONFIG, RunDirectory, in_runs
from fedpref.experiments.run_files import (
    AGREEMENT,
    CLIENTS,
    ENVIRONMENT,
    EVALUATION,
    FROZEN,
    METRICS,
)
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.diagnostics import diagnose
from fedpref.models.named import about as about_model
from fedpref.models.trunk import remove_states
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import HEADLINES, headline
from fedpref.privacy import Secret
from fedpref.tasks import Task

Row = dict[str, Any]  # of an evaluation
# why a line ended before its last round, by what stands in the last row
ENDED = {"spent": "its budget is spent", "nobody": "nobody may take part any more"}


@dataclass(frozen=True)
class Event:
    """Something to show: a run begins, a client is prepared, a round is done, an evaluation is
    made.
    """

    line: str
    """The algorithm's name, or a baseline's."""
    kind: Literal["begin", "prepare", "round", "evaluate"]
    done: int
    total: int
    metrics: Mapping[str, float]
    note: str = ""
    chooses: bool = False
    """An evaluation of rows that are set aside to choose by."""


def new_directory(experiment: Experiment, output: str | Path | None) -> RunDirectory:
    """Return the directory of a new run; nothing is written before the first event."""
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    return RunDirectory(Path(output) if output else in_runs(experiment.name, now))


def events(
    experiment: Experiment,
    folder: RunDirectory,
    cache: Path | None = None,
    transport: Transport | None = None,
) -> Generator[Event, None, None]:
    """Run an experiment into its directory, or what is left of it, and yield what happens.

    Args:
        experiment: The experiment.
        folder: The run directory.
        cache: Where reference scores are kept; by default a folder of the run's own. Runs may share
            one.
        transport: The way to sites that hold the clients; without it clients are those of the
            experiment's own data.

    Raises:
        UserError: Bad input, before anything is written; training that diverges.
    """
    keep_freed_memory()
    experiment = with_whole_paths(experiment, has_data=transport is None)
    with one_thread():
        task = experiment.build_task()
        with folder.alone(), _undone(folder, here=transport is None):
            source: ClientSource = (
                InProcess(experiment, task)
                if transport is None
                else AtSites(experiment, transport, folder.path, task)
            )
            about_text = json.dumps(source.about, indent=1) + "\n"
            train = {name: about["train"] for name, about in source.about.items()}
            experiment.check_clients(train, begins=not folder.has_begun)
            planned = lines(experiment, len(source.about))
            if not folder.has_begun:
                folder.create(
                    {
                        CONFIG: config.to_yaml(experiment),
                        CLIENTS: about_text,
                        ENVIRONMENT: described(about_model(experiment.task.model.path)),
                        FROZEN: as_text(experiment, task),
                        **source.files,
                    }
                )
            else:
                folder.refuse_other_format()
                refuse_other(folder, {**decided(experiment), **frozen(task)})
            if (folder.path / CLIENTS).read_text() != about_text:
                raise UserError(
                    f"{folder.path}: the data is not what the run began with; its clients, sizes "
                    f"and digests stand in {CLIENTS}."
                )
            said = (
                task.description,
                _data(source.about) + source.note,
                experiment.reading,
                source.in_words(),
            )
            note = "\n".join(filter(None, said))
            yield Event(experiment.algorithm.name, "begin", 0, experiment.rounds, {}, note)
            for done in source.prepare(cache or folder.path / "cache"):
                if task.prepares:
                    yield Event(
                        experiment.algorithm.name,
                        "prepare",
                        done,
                        len(source.about),
                        {},
                        task.prepares,
                    )
            for name, (sub, line) in planned.items():
                under = RunDirectory(folder.path / sub)
                if sub and not under.path.exists():
                    under.create({CONFIG: config.to_yaml(line)})
                if not under.done:
                    with closing(source.engine(line, under.path)) as engine:
                        yield from _line(name, line, under, task, source.sizes(line), engine)
            for name, row in source.free(folder):
                yield evaluated(name, experiment.rounds, row)
            if cache is None:
                remove_states(folder.path / "cache")


@contextmanager
def _undone(folder: RunDirectory, *, here: bool) -> Iterator[None]:
    """Within it, a mistake that ends a run before anything is measured leaves no directory.

    It can then be begun under the same name. Of a run over sites the directory stays: they know it.
    """
    begins = not folder.has_begun
    try:
        yield
    except UserError:
        if begins and here and folder.has_begun and not folder.has_results:
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _data(about: About) -> str:
    """Return the sizes of the data, in words."""
    train, test, cut = (
        sum(sizes[name] for sizes in about.values()) for name in ("train", "test", "truncated")
    )
    chosen = sum(sizes.get("validation", 0) for sizes in about.values())
    apart = f", {chosen} to choose by" if chosen else ""
    return (
        f"{len(about)} clients, {train} training and {test} held-out examples{apart}, {cut} rows "
        f"truncated ({cut / (train + test + chosen):.1%})"
    )


def _line(
    name: str,
    experiment: Experiment,
    folder: RunDirectory,
    task: Task,
    sizes: Mapping[str, int],
    engine: Engine,
) -> Iterator[Event]:
    """Run one line of an experiment, or what is left of it, and yield what happens."""
    algorithm: Algorithm[Any] = experiment.algorithm
    start = task.init(seeds.generator(experiment.seed, "init"))
    fresh = algorithm.init(engine, start)
    state, first = folder.restore(fresh, engine)
    promises = [one for one in (engine.private, engine.examples) if one is not None]
    if promises:  # before rows go that say what later rounds have cost
        refuse_lost(promises, folder, first)
    folder.cut_rows_after(first)
    names = list(sizes)
    newcomers = experiment.federation.joining(names, experiment.seed)
    weights = experiment.federation.weights(sizes, experiment.seed)
    trained = [i for i in engine.clients if i not in newcomers]

    def looked(rounds: int, state: Any, purpose: Look) -> Row:
        row: Row = {"round": rounds, "on": experiment.evaluates_on(purpose)}
        if purpose == "conclude":
            row["final"] = True
        few, model = experiment.evaluate_pairs, algorithm.model(state)
        some = experiment.evaluated(names, trained, purpose == "conclude")
        row |= measured(engine, model, names, some, purpose, few, at_start=not rounds)
        if engine.private is not None and engine.private.evaluations is not None:
            row[engine.private.spends] = engine.private.epsilon  # the evaluation's part among it
        return row

    if experiment.evaluate_on_start and not folder.read_rows(EVALUATION):
        row = looked(0, state, experiment.looks)
        folder.append(EVALUATION, row)
        yield evaluated(name, experiment.rounds, row)
    metric = experiment.stop.metric if experiment.stop else None
    rows = folder.read_rows(EVALUATION)
    best: Any = None
    if experiment.keep == "best" and standing(rows, metric).best is not None:
        best = folder.restore_best(fresh, engine) if first else state
    last = first >= experiment.rounds or any(row.get("final") for row in rows)
    if any("unkept" in row for row in rows if row.get("final")):
        state = state if best is None else best
        if newcomers:
            state = _join(engine, algorithm, experiment, state, names, newcomers, {})
    round = first
    if not last and (short := [one for one in promises if not one.affords(first)]):
        if not first:
            raise UserError(
                f"{name}: the first round is not within the budget of privacy.epsilon, "
                f"{short[0].budget:g}; {short[0].epsilon:.3g} is spent."
            )
        state, last = state if best is None else best, True
        # the checkpoint's state is the last one, which neither is the best nor has newcomers
        row = looked(first, state, "conclude") | {"ended": "spent", "unkept": True}
        if best is not None:
            row["kept"] = standing(rows, metric).best
        if newcomers:
            state = _join(engine, algorithm, experiment, state, names, newcomers, row)
        folder.append(EVALUATION, row)
        yield evaluated(name, experiment.rounds, row)
    cohorts = Cohorts(experiment, weights, engine.private)
    while not last:
        cohort, late = cohorts.of(round)
        engine.begin(round, cohort)
        engine.ages, simulated = cohorts.ages(round)
        begun, clock = time.perf_counter(), Clock(engine)
        state, metrics = algorithm.step(clock, state)
        parts = {f"seconds/{verb}": seconds for verb, seconds in clock.seconds.items() if seconds}
        figures = {
            **metrics,
            **engine.traffic.metrics(),
            **_lengths(engine.lengths, experiment.federation.clip),
            **(engine.robust.figures if engine.robust else {}),
            **{figure: value for one in promises for figure, value in one.figures.items()},
            **simulated,
            "seconds": time.perf_counter() - begun,
            **parts,
        }
        # a private run may not stop for what one client has measured
        measures = {} if promises else metrics
        _refuse_divergence(name, round, experiment, folder, {**measures, **_norms(state)})
        folder.append(
            METRICS,
            {
                **figures,
                "round": round + 1,
                "clients": len(engine.active),
                "late": late + len(engine.left_out),
            },
        )
        if engine.robust and engine.robust.agreement:
            agreed = {names[i]: value for i, value in engine.robust.agreement.items()}
            folder.append(AGREEMENT, {"round": round + 1, "clients": agreed})
        told = [Event(name, "round", round + 1, experiment.rounds, figures)]
        last, ended = round + 1 >= experiment.rounds, ""
        if not last and not cohorts.able(round + 1):
            last, ended = True, "nobody"
        elif not last and not all(one.affords(round + 1) for one in promises):
            last, ended = True, "spent"
        looks: list[tuple[Row, Any]] = []
        if experiment.looks_after(round + 1):
            row = looked(round + 1, state, experiment.looks)
            looks.append((row, state))
            stands = standing([*folder.read_rows(EVALUATION), row], metric)
            if experiment.keep == "best" and stands.best == round + 1:
                best = state
            last = last or experiment.stops(stands)
        if last:
            state = state if best is None else best
            row = looked(round + 1, state, "conclude")
            if best is not None:
                seen_so_far = [*folder.read_rows(EVALUATION), *(one for one, _ in looks)]
                row["kept"] = standing(seen_so_far, metric).best
            if ended:
                row["ended"] = ended
            looks.append((row, state))
        for row, seen in looks:
            if experiment.diagnostics:
                engine.begin(round, [i for i in trained if weights[i]], "evaluate")
                row["diagnostics"] = diagnose(
                    engine, algorithm.model(seen), tuple(start), experiment.diagnostics
                )
            if row.get("final") and newcomers:
                state = _join(engine, algorithm, experiment, state, names, newcomers, row)
            for values in (*row["clients"].values(), *row.get("newcomers", {}).values()):
                _refuse_divergence(name, round, experiment, folder, {} if promises else values)
            folder.append(EVALUATION, row)
            told.append(evaluated(name, experiment.rounds, row))
        if last or (round + 1) % experiment.checkpoint_every == 0:
            folder.checkpoint(round + 1, state, engine, best)
        round += 1
        yield from told
    export_models(experiment, engine, algorithm.model(state), task, folder, names)
    if promises:
        Secret.forget(folder.path / FOLDER)
    KeptSums.forget_all(folder.path)
    folder.finish(has_own=not all(isinstance(part, Mapping) for part in algorithm.model(state)))


class Cohorts:
    """Who takes part in each round, nobody oftener than may be."""

    def __init__(
        self, experiment: Experiment, weights: Sequence[float], private: PrivateSums | None = None
    ) -> None:
        self._experiment, self._weights, self._private = experiment, weights, private
        self._taken: Counter[int] = Counter()
        self._known = 0  # rounds that are counted

    def able(self, round: int) -> list[int]:
        """Return the clients that can be drawn for a round."""
        most = self._experiment.federation.max_participations
        while most is not None and self._known < round:
            self._taken.update(self.of(self._known)[0])
            self._known += 1
        return [
            i
            for i, weight in enumerate(self._weights)
            if weight > 0 and (most is None or self._taken[i] < most)
        ]

    def ages(self, round: int) -> tuple[Mapping[int, int], Mapping[str, float]]:
        """Return how old what a round's clients started from is, and when it ends; nothing where
        clients wait for one another.
        """
        federation = self._experiment.federation
        if federation.concurrency is None:
            return {}, {}
        arrivals = federation.arrivals(self._weights, self._experiment.seed)
        return arrivals.ages_of(round), {"simulated_time": arrivals.time_of(round)}

    def of(self, round: int) -> tuple[tuple[int, ...], int]:
        """Return the clients of a round, and how many more were drawn but are late."""
        able = self.able(round)
        if self._private:  # its cohorts are nobody's to draw again
            return self._private.cohort(able, round), 0
        pool = set(able)
        weights = [weight if i in pool else 0.0 for i, weight in enumerate(self._weights)]
        return self._experiment.federation.cohort(weights, self._experiment.seed, round)


def _join(
    engine: Engine,
    algorithm: Algorithm[Any],
    experiment: Experiment,
    state: Any,
    names: Sequence[str],
    newcomers: Sequence[int],
    row: Row,
) -> Any:
    """Let newcomers join, and write into a row how they fare before and after.

    Returns:
        The state with them.
    """
    tells = engine.figures == "each"  # of a few newcomers sums would tell as much
    if tells:
        before = measured(engine, algorithm.model(state), names, newcomers)
        row["newcomers_before"] = before["clients"]
    engine.begin(engine.round, newcomers, "join")
    state = algorithm.join(engine, state, experiment.federation.join_steps)
    if tells:
        row["newcomers"] = measured(engine, algorithm.model(state), names, newcomers)["clients"]
    return state


def _lengths(lengths: Mapping[int, float], clip: float | None) -> dict[str, float]:
    """Return the longest update of a round, and the share of those that were clipped."""
    if clip is None or not lengths:
        return {}
    over = sum(length > clip for length in lengths.values())
    return {"update_norm_max": max(lengths.values()), "clipped": over / len(lengths)}


def evaluated(line: str, total: int, row: Mapping[str, Any]) -> Event:
    """Return the event that a row of an evaluation is."""
    if not row["summary"]:
        return Event(line, "evaluate", row["round"], total, {}, "no figures are told")
    metric = headline(row["summary"])
    title = HEADLINES[metric].title
    note = f"{title} on validation rows" if row.get("on") == VALIDATION else title
    if row.get("final") and row["round"] < total:
        why = ENDED.get(row.get("ended", ""), "no better on validation rows")
        note = f"{title} (stopped: {why})"
    if "kept" in row:
        note += f" of round {row['kept']}"
    return Event(
        line,
        "evaluate",
        row["round"],
        total,
        {**row["summary"][metric], **row.get("diagnostics", {})},
        note,
        row.get("on") == VALIDATION,
    )


def _norms(state: Any) -> dict[str, float]:
    """Return the norms of the trees that a state shares.

    Raises:
        TypeError: It is no state of an algorithm.
    """
    if not is_dataclass(state):
        raise TypeError(f"an algorithm's state must be a dataclass, not {type(state).__name__}")
    shared = {field.name: getattr(state, field.name) for field in fields(state)}
    return {
        f"norm of {name}": trees.norm(value)
        for name, value in shared.items()
        if isinstance(value, Mapping)
    }


def _refuse_divergence(
    name: str,
    round: int,
    experiment: Experiment,
    folder: RunDirectory,
    figures: Mapping[str, float],
) -> None:
    """Raise UserError where a metric is not finite."""
    broken = [figure for figure, value in figures.items() if not math.isfinite(value)]
    if broken:
        kept = folder.checkpoints()
        last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise UserError(
            f"{name}, round {round + 1}: training diverged, {', '.join(broken)} is not finite; "
            f"{last}. "
            "Start anew with algorithm.local.learning_rate below "
            f"{experiment.algorithm.local.learning_rate}, or with less extreme settings of the "
            "loss, the server, the clip or an attack, where these were changed."
        )
