"""A run that goes on elsewhere, as its directory tells it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedpref.experiment import lines
from fedpref.rundirectory import EVALUATION, METRICS, RunDirectory
from fedpref.running import Event, existing_directory, read_experiment
from fedpref.summary import HEADLINES, headline


def watched(path: Path, wait: Callable[[], None] = lambda: time.sleep(1.0)) -> Iterator[Event]:
    """What has happened in a run and what happens, until it is done; between looks there is a `wait`."""
    folder = existing_directory(path)
    experiment = read_experiment(folder)
    yield Event(experiment.algorithm.name, "begin", 0, experiment.rounds, {}, f"{path}: {experiment.name}")
    for name, (sub, _) in lines(experiment, 1).items():
        under, seen = RunDirectory(folder.path / sub), {METRICS: 0, EVALUATION: 0}
        while True:
            is_done = under.done
            for kind in (METRICS, EVALUATION):
                rows = under.read_rows(kind)
                for row in rows[seen[kind] :]:
                    yield _event(name, kind, row, experiment.rounds)
                seen[kind] = len(rows)
            if is_done:
                break
            wait()


def _event(line: str, kind: str, row: dict[str, Any], rounds: int) -> Event:
    if kind == METRICS:
        return Event(line, "round", row["round"], rounds, row)
    metric = headline(row["summary"])
    return Event(line, "evaluate", row["round"], rounds, row["summary"][metric], HEADLINES[metric].title)
