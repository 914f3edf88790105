"""What a finished run's models make of any other preferences."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpref import seeds
from fedpref.data import ClientData, Files, Opinions
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.errors import UserError
from fedpref.rundirectory import CLIENTS
from fedpref.running import evaluate, existing_directory, read_experiment

SHARED = "shared"


def judge(run: str | Path, data: Files, client: str | None = None) -> dict[str, Mapping[str, float]]:
    """Metrics of a run's models on all rows of `data`: of the model that all share, or of each client's own, or of `client`'s alone.

    Raises UserError where the run is not finished, or has no such client.
    """
    folder = existing_directory(run)
    if not folder.done:
        raise UserError(f"{run}: the run is not finished. `fedpref resume {run}` finishes it.")
    spec = read_experiment(folder)
    if isinstance(spec.data, Opinions):
        raise UserError(f"{run}: the run is about opinions; `fedpref reward` scores answers with it.")
    known = list(json.loads((folder.path / CLIENTS).read_text()))
    if client is not None and client not in known:
        raise UserError(f"{run}: there is no client {client!r}; the clients are {known[:12]}.")
    rows = tuple(replace(row, side="test") for row in data.read())
    if not rows:
        raise UserError(f"{data.path}: there are no rows.")
    keep_freed_memory()
    with one_thread(), tempfile.TemporaryDirectory() as cache:
        task: Any = spec.build_task()
        shard = task.prepare(task.encode(ClientData(SHARED, rows if len(spec.task.objectives) > 1 else (), rows)), Path(cache))
        with closing(Simulation(task, [shard] * len(known), seed=spec.seed, rounds=1, folder=folder.path)) as engine:
            algorithm: Any = spec.algorithm
            state, _ = folder.restore(algorithm.init(engine, task.init(seeds.generator(spec.seed, "init"))), engine)
            model = algorithm.model(state)
            is_shared = all(isinstance(part, Mapping) for part in model)
            asked = [known.index(client)] if client is not None else [0] if is_shared else list(engine.clients)
            engine.begin(0, asked, "evaluate")
            found = engine.disclose(engine.each(evaluate, *model))
    return {SHARED if is_shared and client is None else known[i]: metrics for i, metrics in found.items()}
