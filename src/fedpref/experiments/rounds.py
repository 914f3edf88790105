"""Running an experiment: from data to adapters, round by round, into a run directory."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from fedpref import config
from fedpref.engines import Engine, Transport
from fedpref.engines.timing import Clock
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.errors import UserError
from fedpref.experiments.clients import About, AtSites, ClientSource, InProcess
from fedpref.experiments.environment import described
from fedpref.experiments.experiment import FEWEST, Experiment, lines, with_whole_paths
from fedpref.experiments.run_directory import (
    CONFIG,
    OUTCOMES,
    SAMPLES,
    RunDirectory,
    client_folder,
    file_name,
)
from fedpref.experiments.run_files import CLIENTS, ENVIRONMENT, EVALUATION, METRICS
from fedpref.federation.algorithm import Algorithm
from fedpref.federation.diagnostics import diagnose
from fedpref.federation.verbs import ANYTHING, Client, work
from fedpref.models.named import about as about_model
from fedpref.models.trunk import remove_states
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import HEADLINES, headline, low_is_good, over_clients
from fedpref.numerics.trees import Tree
from fedpref.tasks import Task


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


def new_directory(experiment: Experiment, output: str | Path | None) -> RunDirectory:
    """Return the directory of a new run; nothing is written before the first event."""
    return RunDirectory(Path(output or f"runs/{experiment.name}-{datetime.now():%Y%m%d-%H%M%S}"))


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
    experiment = with_whole_paths(experiment)
    with one_thread():
        task = experiment.build_task()
        with folder.alone():
            source: ClientSource = (
                InProcess(experiment, task)
                if transport is None
                else AtSites(experiment, transport, folder.path)
            )
            about_text = json.dumps(source.about, indent=1) + "\n"
            experiment.check_clients({name: about["train"] for name, about in source.about.items()})
            planned = lines(experiment, len(source.about))
            if not folder.has_begun:
                folder.create(
                    {
                        CONFIG: config.to_yaml(experiment),
                        CLIENTS: about_text,
                        ENVIRONMENT: described(about_model(experiment.task.model.path)),
                        **source.files,
                    }
                )
            else:
                folder.refuse_other_format()
            if (folder.path / CLIENTS).read_text() != about_text:
                raise UserError(
                    f"{folder.path}: the data is not what the run began with; its clients, sizes "
                    f"and digests stand in {CLIENTS}."
                )
            note = f"{task.description}\n{_data(source.about)}{source.note}"
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


def _data(about: About) -> str:
    """Return the sizes of the data, in words."""
    train, test, cut = (
        sum(sizes[name] for sizes in about.values()) for name in ("train", "test", "truncated")
    )
    return (
        f"{len(about)} clients, {train} training and {test} held-out examples, {cut} rows "
        f"truncated ({cut / (train + test):.1%})"
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
    state = algorithm.init(engine, start)
    state, first = folder.restore(state, engine)
    folder.cut_rows_after(first)
    names = list(sizes)
    newcomers = experiment.federation.joining(names, experiment.seed)
    weights = experiment.federation.weights(sizes, experiment.seed)
    trained = [i for i in engine.clients if i not in newcomers]
    if experiment.evaluate_on_start and not folder.read_rows(EVALUATION):
        few = experiment.evaluate_pairs
        row = {"round": 0, **_evaluate(engine, algorithm.model(state), names, trained, few)}
        folder.append(EVALUATION, row)
        yield evaluated(name, experiment.rounds, row)
    for round in range(first, experiment.rounds):
        cohort, late = experiment.federation.cohort(weights, experiment.seed, round)
        engine.begin(round, cohort)
        begun, clock = time.perf_counter(), Clock(engine)
        state, metrics = algorithm.step(clock, state)
        parts = {f"seconds/{verb}": seconds for verb, seconds in clock.seconds.items() if seconds}
        figures = {
            **metrics,
            **engine.traffic.metrics(),
            **_lengths(engine.lengths, experiment.federation.clip),
            "seconds": time.perf_counter() - begun,
            **parts,
        }
        _refuse_divergence(name, round, experiment, folder, {**metrics, **_norms(state)})
        folder.append(
            METRICS,
            {
                **figures,
                "round": round + 1,
                "clients": len(engine.active),
                "late": late + len(engine.left_out),
            },
        )
        told = [Event(name, "round", round + 1, experiment.rounds, figures)]
        last = round + 1 == experiment.rounds
        if last or (experiment.evaluate_every and (round + 1) % experiment.evaluate_every == 0):
            model, few = algorithm.model(state), None if last else experiment.evaluate_pairs
            row = {"round": round + 1, **_evaluate(engine, model, names, trained, few, last)}
            if experiment.diagnostics:
                engine.begin(round, [i for i in trained if weights[i]], "evaluate")
                row["diagnostics"] = diagnose(
                    engine, algorithm.model(state), tuple(start), experiment.diagnostics
                )
            if last and newcomers:
                row["newcomers_before"] = _evaluate(
                    engine, algorithm.model(state), names, newcomers
                )["clients"]
                engine.begin(round, newcomers, "join")
                state = algorithm.join(engine, state, experiment.federation.join_steps)
                row["newcomers"] = _evaluate(engine, algorithm.model(state), names, newcomers)[
                    "clients"
                ]
            for measured in (*row["clients"].values(), *row.get("newcomers", {}).values()):
                _refuse_divergence(name, round, experiment, folder, measured)
            folder.append(EVALUATION, row)
            told.append(evaluated(name, experiment.rounds, row))
        if last or (round + 1) % experiment.checkpoint_every == 0:
            folder.checkpoint(round + 1, state, engine)
        yield from told
    _export(experiment, engine, algorithm.model(state), task, folder, names)
    folder.finish(has_own=not all(isinstance(part, Mapping) for part in algorithm.model(state)))


def _lengths(lengths: Mapping[int, float], clip: float | None) -> dict[str, float]:
    """Return the longest update of a round, and the share of those that were clipped."""
    if clip is None or not lengths:
        return {}
    over = sum(length > clip for length in lengths.values())
    return {"update_norm_max": max(lengths.values()), "clipped": over / len(lengths)}


def evaluated(line: str, total: int, row: Mapping[str, Any]) -> Event:
    """Return the event that a row of an evaluation is."""
    metric = headline(row["summary"])
    return Event(
        line,
        "evaluate",
        row["round"],
        total,
        {**row["summary"][metric], **row.get("diagnostics", {})},
        HEADLINES[metric].title,
    )


def _norms(state: Any) -> dict[str, float]:
    """Return the norms of the trees that a state shares."""
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
            f"{experiment.algorithm.local.learning_rate}."
        )


def _evaluate(
    engine: Engine,
    model: Sequence[Any],
    names: Sequence[str],
    clients: Sequence[int],
    few: int | None = None,
    is_last: bool = False,
) -> dict[str, Any]:
    """Return some clients' held-out metrics, and each metric's summary over them.

    Args:
        engine: Whose clients they are.
        model: What they evaluate.
        names: Of all clients.
        clients: Which of them.
        few: Of how many held-out pairs; None for all.
        is_last: Let clients also keep what came of each of their pairs.
    """
    engine.begin(engine.round, clients, "evaluate")
    work = conclude if is_last else evaluate
    measured = engine.each(work, *model) if few is None else engine.each(glance, few, *model)
    rows = {
        names[i]: dict(metrics)
        for i, metrics in engine.disclose(measured, NEEDED, HEADLINES).items()
    }
    counts = {name: int(row["num_examples"]) for name, row in rows.items()}
    columns: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        for metric, value in row.items():
            if not metric.startswith("num_"):
                columns.setdefault(metric, {})[name] = value
    return {
        "clients": rows,
        "summary": {
            m: over_clients(values, counts, low_is_good=low_is_good(m))
            for m, values in columns.items()
        },
    }


def _export(
    experiment: Experiment,
    engine: Engine,
    model: Sequence[Any],
    task: Task,
    folder: RunDirectory,
    names: Sequence[str],
) -> None:
    """Write the shared model, clients' own, and the answers that are kept to be read."""
    shared = trees.merge(*(part for part in model if isinstance(part, Mapping)))
    if shared:
        task.export(shared, folder.path / "adapter")
    if not all(isinstance(part, Mapping) for part in model):
        engine.begin(engine.round, engine.clients, "evaluate")
        engine.each(export, "clients", *model)
    if any(map(experiment.task.asks, names)):
        engine.begin(engine.round, engine.clients, "evaluate")
        engine.each(sample, *model)


@work("evaluation.evaluate", reads={"parts": ANYTHING})
def evaluate(client: Client, *parts: Tree) -> Mapping[str, float]:
    """Return the held-out metrics of the client's model."""
    return client.task.evaluate(trees.merge(*parts), client.shard)


@work("evaluation.conclude", reads={"parts": ANYTHING})
def conclude(client: Client, *parts: Tree) -> Mapping[str, float]:
    """Return the held-out metrics of the client's model, and keep what came of each example.

    That is written to the client's own folder, from which models are compared pair by pair.
    """
    params = trees.merge(*parts)
    if outcomes := client.task.outcomes(params, client.shard):
        folder = client.folder / OUTCOMES
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{file_name(client.shard.name)}.json"
        file.write_text(json.dumps(outcomes) + "\n")
    return client.task.evaluate(params, client.shard)


@work("evaluation.glance", reads={"parts": ANYTHING})
def glance(client: Client, few: int, *parts: Tree) -> Mapping[str, float]:
    """Return metrics of the client's model on a few held-out examples, the same ones each time.

    They are never so few that a figure is one example's own, and those of one number are not among
    those of the next, or the difference would be.
    """
    shard: Any = client.shard  # of any task: its held-out side is `test`
    few = max(few, FEWEST, client.least_evaluated)
    rng = seeds.generator(0, f"glance/{few}/{shard.name}")
    drawn = sorted(torch.randperm(len(shard.test), generator=rng)[:few].tolist())
    thinned = replace(shard, test=tuple(shard.test[i] for i in drawn))
    return client.task.evaluate(trees.merge(*parts), thinned)


@work("evaluation.export", sends=())
def export(client: Client, kind: Literal["clients", "newcomers"], *parts: Tree) -> Tree:
    """Write the client's model to its folder in the run."""
    client.task.export(trees.merge(*parts), client_folder(client.folder, kind, client.shard.name))
    return {}


@work("evaluation.sample", sends=())
def sample(client: Client, *parts: Tree) -> Tree:
    """Write answers to the client's held-out prompts, to be read, if they are asked for."""
    rows = client.task.samples(trees.merge(*parts), client.shard)
    if not rows:
        return {}
    folder = client.folder / SAMPLES
    folder.mkdir(exist_ok=True)
    (folder / f"{file_name(client.shard.name)}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    return {}


NEEDED = ("num_examples",)  # of every evaluation
WORKS = (evaluate, conclude, glance, export, sample)
"""What an experiment runs on clients beside its algorithm."""
