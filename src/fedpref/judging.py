"""What a finished run's models make of any other preferences."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpref import seeds
from fedpref.data import ClientData, Files, Natural
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.errors import UserError
from fedpref.rundirectory import CLIENTS
from fedpref.running import evaluate, existing_directory, read_experiment, refuse_opinions

SHARED = "shared"


def judge(run: str | Path, data: Files, client: str | None = None, column: str | None = None) -> dict[str, Mapping[str, float]]:
    """Metrics of a run's models on all rows of `data`: of the model that all share, or of each client's own, or of `client`'s alone.

    With `column`, which says whose a row is, each client's model is measured on the client's own rows. Nothing keeps rows out that the
    run has trained on. Raises UserError where the run is not finished, or has no such client.
    """
    folder = existing_directory(run)
    if not folder.done:
        raise UserError(f"{run}: the run is not finished. `fedpref resume {run}` finishes it.")
    if client is not None and column is not None:
        raise UserError("--client and --column: give one of them; with a column every client is asked about its own rows.")
    refuse_opinions(folder)
    if not folder.checkpoints():
        raise UserError(f"{run}: the run's last checkpoint, from which models are read, is no longer there.")
    spec = read_experiment(folder)
    known = list(json.loads((folder.path / CLIENTS).read_text()))
    rows = tuple(replace(row, side="test") for row in data.read())
    if not rows:
        raise UserError(f"{data.path}: there are no rows.")
    groups = {SHARED: rows}
    if column:
        placed = Natural(column=column).assign([("test", row) for row in rows], np.random.default_rng(0))  # which draws nothing here
        groups = {name: tuple(row for _, row in some) for name, some in placed.items()}
    whose = list(groups) if column else known if client is None else [client]
    if unknown := [name for name in whose if name not in known]:
        raise UserError(
            f"{run}: there is no client {unknown[0]!r}; the clients are {known[:12]}. Those that joined later were measured then."
        )
    if hasattr(spec.task, "evaluation_prompts"):
        asked: Any = spec.task
        spec = replace(spec, task=replace(asked, evaluation_prompts=len(rows)))
    keep_freed_memory()
    with one_thread(), tempfile.TemporaryDirectory() as cache:
        task: Any = spec.build_task()
        both = len(spec.task.objectives) > 1  # for examples of each objective are looked for among the training rows too
        encoded = {name: task.encode(ClientData(name, some if both else (), some)) for name, some in groups.items()}
        shards = {name: task.prepare(shard, Path(cache)) for name, shard in encoded.items()}
        held = [shards.get(name, next(iter(shards.values()))) for name in known]
        with closing(Simulation(task, held, seed=spec.seed, rounds=1, folder=folder.path)) as engine:
            algorithm: Any = spec.algorithm
            state, _ = folder.restore(algorithm.init(engine, task.init(seeds.generator(spec.seed, "init"))), engine)
            model = algorithm.model(state)
            is_one = all(isinstance(part, Mapping) for part in model) and client is None and column is None
            engine.begin(0, [0] if is_one else sorted(known.index(name) for name in whose), "evaluate")
            found = engine.disclose(engine.each(evaluate, *model))
    return {SHARED if is_one else known[i]: metrics for i, metrics in found.items()}
