"""Running an experiment: from data to aligned adapters, round by round, into a run directory."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from fedpref import config, seeds, trees
from fedpref.data import Opinions
from fedpref.diagnostics import diagnose, merge
from fedpref.engines import Engine, Transport
from fedpref.engines.clock import Clock
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.environment import described
from fedpref.errors import UserError
from fedpref.experiment import Experiment, lines, with_whole_paths
from fedpref.federation import Client, work
from fedpref.places import About, Elsewhere, Here, Place
from fedpref.rundirectory import CLIENTS, CONFIG, ENVIRONMENT, EVALUATION, METRICS, SAMPLES, RunDirectory
from fedpref.summary import HEADLINES, ClientMetrics, headline, over_clients
from fedpref.tasks import Task
from fedpref.trees import Tree


@dataclass(frozen=True)
class Event:
    """Something to show: what the run works on, a client prepared, a round done, an evaluation made."""

    line: str  # the algorithm's name, or a reference line's
    kind: Literal["begin", "prepare", "round", "evaluate"]
    done: int
    total: int
    figures: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Result:
    """Where the run lies, and its last evaluation: for each line, each client's held-out metrics.

    `newcomers` joined after training: for each line, their metrics with the model as they find it, and after their own steps.
    """

    path: Path
    evaluations: Mapping[str, ClientMetrics]
    newcomers: Mapping[str, tuple[ClientMetrics, ClientMetrics]]


def new_directory(experiment: Experiment, output: str | Path | None) -> RunDirectory:
    """The directory of a new run; nothing is written before the first event."""
    return RunDirectory(Path(output or f"runs/{experiment.name}-{datetime.now():%Y%m%d-%H%M%S}"))


def existing_directory(path: str | Path) -> RunDirectory:
    """The directory of a run that was begun."""
    if not (Path(path) / CONFIG).is_file():
        raise UserError(f"{path}: there is no run here (no {CONFIG}). Give the directory that `fedpref run` printed.")
    return RunDirectory(Path(path))


def read_experiment(folder: RunDirectory) -> Experiment:
    """The experiment of a run directory, as it was resolved when the run began."""
    return Experiment.load(folder.path / CONFIG)


def is_finished(folder: RunDirectory) -> bool:
    """Whether the algorithm's own line and all reference lines are done."""
    return all(RunDirectory(folder.path / sub).done for sub, _ in lines(read_experiment(folder), 1).values())


def refuse_opinions(folder: RunDirectory) -> None:
    """Raise UserError where a run has trained no language model."""
    if isinstance(read_experiment(folder).data, Opinions):
        raise UserError(f"{folder.path}: the run has trained a predictor of opinions; `fedpref reward` scores answers with it.")


def learned_from_conversations(folder: RunDirectory) -> bool:
    """Whether training prompts were conversations, laid out by the chat template, and not plain text."""
    return any(about.get("conversations") for about in json.loads((folder.path / CLIENTS).read_text()).values())


def result(folder: RunDirectory) -> Result:
    """What a finished run came to, from its directory."""
    names = list(lines(read_experiment(folder), 1).items())
    rows = {name: RunDirectory(folder.path / sub).read_rows(EVALUATION)[-1] for name, (sub, _) in names}
    newcomers = {name: (row["newcomers_before"], row["newcomers"]) for name, row in rows.items() if "newcomers" in row}
    return Result(folder.path, {name: row["clients"] for name, row in rows.items()}, newcomers)


def exported(path: str | Path, client: str | None = None) -> Path:
    """The folder of a finished run's shared model or of a client's own; raises UserError where there is none."""
    place = existing_directory(path).path
    own, later = ({unquote(folder.name): folder for folder in sorted(place.glob(f"{sub}/*"))} for sub in ("clients", "newcomers"))
    if not own and RunDirectory(place).has_own:
        raise UserError(f"{path}: every client has a model of its own, which has stayed at its site: SITE'S FOLDER/RUN/clients.")
    if client is not None:
        if client in own | later:
            return (own | later)[client]
        known = json.loads((place / CLIENTS).read_text())
        if client not in known:
            raise UserError(f"{path}: there is no client {client!r}; the clients are {[*known, *later][:12]}.")
        if not own and (place / "adapter").exists():
            return place / "adapter"  # the shared model is this client's model
    elif (place / "adapter").exists() and not own:
        return place / "adapter"
    elif own:
        raise UserError(f"{path}: every client has a model of its own; choose one with --client: {list(own)[:12]}.")
    raise UserError(f"{path}: the run is not finished, it has exported no model yet. `fedpref resume {path}` finishes it.")


def events(
    experiment: Experiment, folder: RunDirectory, cache: Path | None = None, transport: Transport | None = None
) -> Generator[Event, None, None]:
    """Run the experiment into its directory, or what is left of it, and tell of every step. Bad input raises before anything is written.

    Reference scores are kept in `cache`, by default a folder of the run's own; several runs may share one. With a `transport` the clients
    are those of its sites, otherwise those of the experiment's own data.
    """
    keep_freed_memory()
    experiment = with_whole_paths(experiment)
    with one_thread():
        task = experiment.build_task()
        with folder.alone():
            place: Place = Here(experiment, task) if transport is None else Elsewhere(experiment, transport, folder.path)
            about_text = json.dumps(place.about, indent=1) + "\n"
            experiment.check_clients({name: about["train"] for name, about in place.about.items()})
            planned = lines(experiment, len(place.about))
            if not folder.path.exists():
                folder.create({CONFIG: config.to_yaml(experiment), CLIENTS: about_text, ENVIRONMENT: described()})
            elif (folder.path / CLIENTS).read_text() != about_text:
                raise UserError(
                    f"{folder.path}: the data is not what the run began with; its clients, sizes and digests stand in {CLIENTS}."
                )
            note = f"{task.description}\n{_data(place.about)}{place.note}"
            yield Event(experiment.algorithm.name, "begin", 0, experiment.rounds, {}, note)
            for done in place.prepare(cache or folder.path / "cache"):
                if task.prepares:
                    yield Event(experiment.algorithm.name, "prepare", done, len(place.about), {}, task.prepares)
            for name, (sub, line) in planned.items():
                under = RunDirectory(folder.path / sub)
                if sub and not under.path.exists():
                    under.create({CONFIG: config.to_yaml(line)})
                if not under.done:
                    with closing(place.engine(line, under.path)) as engine:
                        yield from _line(name, line, under, task, place.sizes(line), engine)


def _data(about: About) -> str:
    train, test, cut = (sum(sizes[name] for sizes in about.values()) for name in ("train", "test", "truncated"))
    return f"{len(about)} clients, {train} training and {test} held-out examples, {cut} rows truncated ({cut / (train + test):.1%})"


def _line(name: str, experiment: Experiment, folder: RunDirectory, task: Task, sizes: Mapping[str, int], engine: Engine) -> Iterator[Event]:
    algorithm: Any = experiment.algorithm
    start = task.init(seeds.generator(experiment.seed, "init"))
    state = algorithm.init(engine, start)
    state, first = folder.restore(state, engine)
    folder.cut_rows_after(first)
    names = list(sizes)
    newcomers = experiment.federation.joining(names, experiment.seed)
    weights = experiment.federation.weights(sizes, experiment.seed)
    trained = [i for i in engine.clients if i not in newcomers]
    if experiment.evaluate_on_start and not folder.read_rows(EVALUATION):
        row = {"round": 0, **_evaluate(engine, algorithm.model(state), names, trained)}
        folder.append(EVALUATION, row)
        yield evaluated(name, experiment.rounds, row)
    for round in range(first, experiment.rounds):
        cohort, late = experiment.federation.cohort(weights, experiment.seed, round)
        engine.begin(round, cohort)
        begun, clock = time.perf_counter(), Clock(engine)
        state, metrics = algorithm.step(clock, state)
        parts = {f"seconds/{verb}": seconds for verb, seconds in clock.seconds.items() if seconds}
        figures = {**metrics, **engine.traffic.figures(), "seconds": time.perf_counter() - begun, **parts}
        _refuse_divergence(name, round, experiment, folder, {**metrics, **_norms(state)})
        folder.append(METRICS, {"round": round + 1, "clients": len(engine.active), "late": late + len(engine.left_out), **figures})
        told = [Event(name, "round", round + 1, experiment.rounds, figures)]
        last = round + 1 == experiment.rounds
        if last or (experiment.evaluate_every and (round + 1) % experiment.evaluate_every == 0):
            row = {"round": round + 1, **_evaluate(engine, algorithm.model(state), names, trained)}
            if experiment.diagnostics:
                engine.begin(round, [i for i in trained if weights[i]], "evaluate")
                row["diagnostics"] = diagnose(engine, algorithm.model(state), tuple(start), experiment.diagnostics)
            if last and newcomers:
                row["newcomers_before"] = _evaluate(engine, algorithm.model(state), names, newcomers)["clients"]
                engine.begin(round, newcomers, "join")
                state = algorithm.join(engine, state, experiment.federation.join_steps)
                row["newcomers"] = _evaluate(engine, algorithm.model(state), names, newcomers)["clients"]
            for measured in (*row["clients"].values(), *row.get("newcomers", {}).values()):
                _refuse_divergence(name, round, experiment, folder, measured)
            folder.append(EVALUATION, row)
            told.append(evaluated(name, experiment.rounds, row))
        if last or (round + 1) % experiment.checkpoint_every == 0:
            folder.checkpoint(round + 1, state, engine)
        yield from told
    _export(experiment, engine, algorithm.model(state), task, folder)
    folder.finish(has_own=not all(isinstance(part, Mapping) for part in algorithm.model(state)))


def evaluated(line: str, total: int, row: Mapping[str, Any]) -> Event:
    """What a row of an evaluation tells."""
    metric = headline(row["summary"])
    return Event(line, "evaluate", row["round"], total, {**row["summary"][metric], **row.get("diagnostics", {})}, HEADLINES[metric].title)


def _norms(state: Any) -> dict[str, float]:
    """Of the trees that a state shares."""
    shared = {field.name: getattr(state, field.name) for field in fields(state)}
    return {f"norm of {name}": trees.norm(value) for name, value in shared.items() if isinstance(value, Mapping)}


def _refuse_divergence(name: str, round: int, experiment: Experiment, folder: RunDirectory, figures: Mapping[str, float]) -> None:
    broken = [figure for figure, value in figures.items() if not math.isfinite(value)]
    if broken:
        kept = folder.checkpoints()
        last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise UserError(
            f"{name}, round {round + 1}: training diverged, {', '.join(broken)} is not finite; {last}. "
            f"Start anew with algorithm.local.learning_rate below {experiment.algorithm.local.learning_rate}."
        )


def _evaluate(engine: Engine, model: Sequence[Any], names: Sequence[str], clients: Sequence[int]) -> dict[str, Any]:
    """These clients' held-out metrics, and each metric's summary over them."""
    engine.begin(engine.round, clients, "evaluate")
    rows = {names[i]: dict(metrics) for i, metrics in engine.disclose(engine.each(evaluate, *model)).items()}
    counts = {name: int(row["num_examples"]) for name, row in rows.items()}
    metrics = [metric for metric in next(iter(rows.values())) if not metric.startswith("num_")]
    columns = {metric: {name: row[metric] for name, row in rows.items()} for metric in metrics}
    return {"clients": rows, "summary": {m: over_clients(values, counts, low_is_good=m == "loss") for m, values in columns.items()}}


def _export(experiment: Experiment, engine: Engine, model: Sequence[Any], task: Task, folder: RunDirectory) -> None:
    shared = merge(*(part for part in model if isinstance(part, Mapping)))
    if shared:
        task.export(shared, folder.path / "adapter")
    if not all(isinstance(part, Mapping) for part in model):
        engine.begin(engine.round, engine.clients, "evaluate")
        engine.each(export, "clients", *model)
    if getattr(experiment.task, "samples", 0):
        engine.begin(engine.round, engine.clients, "evaluate")
        engine.each(sample, *model)


@work()
def evaluate(client: Client, *parts: Tree) -> Mapping[str, float]:
    return client.task.evaluate(merge(*parts), client.shard)


@work()
def export(client: Client, place: Literal["clients", "newcomers"], *parts: Tree) -> Tree:
    client.task.export(merge(*parts), client.folder / place / quote(client.shard.name, safe=" "))
    return {}


@work()
def sample(client: Client, *parts: Tree) -> Tree:
    rows = client.task.samples(merge(*parts), client.shard)  # type: ignore[attr-defined]  # the task has this if the work is asked for
    folder = client.folder / SAMPLES
    folder.mkdir(exist_ok=True)
    (folder / f"{quote(client.shard.name, safe=' ')}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}
