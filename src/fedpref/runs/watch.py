"""A run that goes on elsewhere, watched through its directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedpref.errors import UserError, command
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.free_baselines import FREE_LINES
from fedpref.experiments.rounds import Event, evaluated
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import EVALUATION, METRICS

PATIENCE = 60  # looks


def await_begin(path: Path, wait: Callable[[], None] = lambda: time.sleep(1.0)) -> None:
    """Wait until a run of a sweep has begun, for each begins when one before has ended.

    Raises:
        UserError: It does not begin.
    """
    for _ in range(PATIENCE):
        if RunDirectory(path).has_begun:
            return
        wait()
    raise UserError(
        f"{path}: the run has not begun for a minute after the one before. If no process is at "
        f"work on the sweep, `{command('resume', path.parents[1])}` takes it up."
    )


def watched(path: Path, wait: Callable[[], None] = lambda: time.sleep(1.0)) -> Iterator[Event]:
    """Yield what has happened in a run and what happens, until it is done.

    Args:
        path: The run directory.
        wait: Called between looks.
    """
    run = FinishedRun.at(path)
    experiment = run.experiment
    told = False
    yield Event(
        experiment.algorithm.name, "begin", 0, experiment.rounds, {}, f"{path}: {experiment.name}"
    )
    for name, under in run.lines.items():
        seen = {EVALUATION: 0} if name in FREE_LINES else {METRICS: 0, EVALUATION: 0}
        while True:
            is_done = under.done
            rows = {kind: under.read_rows(kind)[count:] for kind, count in seen.items()}
            events = [
                _event(name, kind, row, experiment.rounds)
                for kind, some in rows.items()
                for row in some
            ]
            yield from sorted(events, key=lambda event: event.done)  # a round before its evaluation
            seen = {kind: count + len(rows[kind]) for kind, count in seen.items()}
            if is_done:
                break
            if not told and not run.folder.is_held:
                told = True
                note = (
                    "no process on this machine is at work on it; if none is elsewhere, "
                    f"`{command('resume', path)}` takes it up"
                )
                yield Event(name, "begin", 0, experiment.rounds, {}, note)
            wait()


def _event(line: str, kind: str, row: dict[str, Any], rounds: int) -> Event:
    return (
        Event(line, "round", row["round"], rounds, row)
        if kind == METRICS
        else evaluated(line, rounds, row)
    )
