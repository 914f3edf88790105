"""Clients that come to a finished run with data of their own: they take what is shared, and make what is private to them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedpref import seeds
from fedpref.data import IID, Files, Natural, Opinions
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.errors import UserError
from fedpref.rundirectory import CLIENTS, NEWCOMERS
from fedpref.running import evaluate, existing_directory, export, read_experiment

FOLDER = "newcomers"


@dataclass(frozen=True)
class Newcomer:
    """One of them: its pairs, its held-out metrics with the model as it finds it and after its own steps, and its exported model."""

    train: int
    test: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    path: Path


def personalise(
    run: str | Path, data: Files, *, column: str | None = None, name: str | None = None, steps: int | None = None
) -> dict[str, Newcomer]:
    """Let the clients in `data` join a run: one for each value of a column, or a single one, by default named after the file.

    Where the run's data are opinions, these are read as its are. They take `steps` local steps (by default the run's
    `federation.join_steps`) and their models go to RUN/newcomers/NAME. What is shared stays as it is. Raises UserError, before anything
    is computed, if the run is not finished or a name is taken.
    """
    if column and name:
        raise UserError(f"--name {name!r}: newcomers are named by the column {column!r}. Leave one of the two out.")
    folder = existing_directory(run)
    if not folder.done:
        raise UserError(f"{run}: the run is not finished. `fedpref resume {run}` finishes it.")
    experiment = read_experiment(folder)
    source = replace(experiment.data, path=data.path, groups="all") if isinstance(experiment.data, Opinions) else data
    spec = replace(experiment, data=source, partition=Natural(column=column) if column else IID(clients=1))
    clients, _ = spec.clients()
    if not column:
        clients = (replace(clients[0], name=name or Path(data.path).name.split(".")[0]),)
    known = json.loads((folder.path / CLIENTS).read_text())
    if taken := [client.name for client in clients if client.name in known]:
        raise UserError(f"{run}: {taken[:5]} took part in the run. Give another name.")
    places = {client.name: folder.path / FOLDER / quote(client.name, safe=" ") for client in clients}
    if taken := [client for client, place in places.items() if place.exists()]:
        raise UserError(f"{run}: {taken[:5]} joined already. Give another name, or remove {places[taken[0]]}.")
    keep_freed_memory()
    with one_thread(), tempfile.TemporaryDirectory() as cache:
        task: Any = spec.task.build()
        shards = [task.prepare(task.encode(client), Path(cache)) for client in clients]
        with closing(Simulation(task, shards, seed=spec.seed, rounds=1, folder=folder.path)) as engine:
            algorithm: Any = spec.algorithm
            state = algorithm.init(engine, task.init(seeds.generator(spec.seed, "init")))
            state = folder.restore_shared(state)
            before = engine.disclose(engine.each(evaluate, *algorithm.model(state)))
            engine.begin(0, engine.clients, "join")
            state = algorithm.join(engine, state, steps or spec.federation.join_steps)
            after = engine.disclose(engine.each(evaluate, *algorithm.model(state)))
            engine.each(export, FOLDER, *algorithm.model(state))
    found = {}
    for i, (client, place) in enumerate(places.items()):
        found[client] = one = Newcomer(len(shards[i].train), len(shards[i].test), before[i], after[i], place)
        row = {"client": client, "train": one.train, "test": one.test, "before": one.before, "after": one.after}
        folder.append(NEWCOMERS, row)
    return found
