"""Work of one process, shared out among forks of it that live for that work alone."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from fedpref.engines.workers import pack
from fedpref.errors import UserError

T = TypeVar("T")
WAVE = 8  # jobs of a process, whose results it has in memory at once


DIED = (
    "a worker process has died, perhaps for want of memory. Take fewer `workers`, or smaller "
    "batches, and resume the run."
)


def forked(processes: int, jobs: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Yield what each of some jobs returns, in their order.

    This process does its share of them, and forks do the others'. A fork has what this process has
    in memory; of what it changes there, nothing comes back but what a job returns.

    Args:
        processes: How many, this one among them.
        jobs: Functions without arguments, of about equal cost.

    Raises:
        UserError: A job has raised it, or its process has died.
        RuntimeError: A job has failed otherwise.
    """
    size = processes * WAVE
    for first in range(0, len(jobs), size):
        yield from _wave(processes, jobs[first : first + size])


def _wave(processes: int, jobs: Sequence[Callable[[], T]]) -> list[T]:
    count = min(processes, len(jobs))
    forks = [_fork(jobs[share::count]) for share in range(1, count)]
    results: list[Any] = [None] * len(jobs)
    failure: Exception | None = None
    try:
        results[0::count] = [job() for job in jobs[0::count]]
    finally:
        for share, (child, end) in enumerate(forks, 1):
            with os.fdopen(end, "rb") as pipe:
                content = pipe.read()
            os.waitpid(child, 0)
            kind, value = pickle.loads(content) if content else ("refused", DIED)
            if kind == "results":
                results[share::count] = value
            else:
                failure = UserError(value) if kind == "refused" else RuntimeError(value)
    if failure:
        raise failure
    return results


def _fork(jobs: Sequence[Callable[[], Any]]) -> tuple[int, int]:
    """Return the process that does jobs, and where their results are read."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        return child, ours
    os.close(ours)
    _answer(jobs, theirs)


def _answer(jobs: Sequence[Callable[[], Any]], end: int) -> NoReturn:
    try:
        answer: tuple[str, Any]
        try:
            answer = ("results", [job() for job in jobs])
        except UserError as error:
            answer = ("refused", str(error))
        except Exception:
            answer = ("failed", traceback.format_exc())
        with os.fdopen(end, "wb") as pipe:
            pipe.write(pack(answer))
    finally:
        # not sys.exit: what this process was forked from is not this one's to clean up
        os._exit(0)
