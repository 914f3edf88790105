"""The folder of a run at a site: what it is bound to, how often it was opened, and its room."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedpref.engines.messages import RefusedError
from fedpref.numerics import files

EXPERIMENT = "experiment.sha256"  # of the run's settings
STORE = "checkpoints"  # a folder of what clients keep; NAME.1 and so on are set aside
CLIENTS = "numbers.json"  # which client has which number
OPENINGS = "openings"  # how often it was opened
ASIDE = 3  # former states of a run that are kept when it is begun anew
CHECKPOINTS = 2  # that are kept


def digest(experiment: Mapping[str, Any]) -> str:
    """Return a digest of an experiment, to which a run is bound.

    What its clients keep must not be worked on under the settings of another.
    """
    said = {key: value for key, value in experiment.items() if key != "patience"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def count_opening(folder: Path, most: int | None) -> None:
    """Count how often a run was opened; raises RefusedError above a number."""
    file = folder / OPENINGS
    try:
        count = int(file.read_text()) + 1
    except (OSError, ValueError):
        count = 1
    if most is not None and count > most:
        raise RefusedError(f"the run was opened {most} times, which is what this site consents to")
    files.write(file, str(count))


@contextmanager
def without(file: Path) -> Iterator[None]:
    """Let a file be away, within a `with`; for good, unless an error ends it."""
    aside = file.with_name(f".{file.name}.before")
    if file.exists():
        file.replace(aside)
    try:
        yield
    except BaseException:
        if aside.exists():
            aside.replace(file)
        raise
    aside.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let no other process, or thread, be within the same file's `with`; who comes later waits.

    Args:
        path: A file that is made for this, and stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def set_aside(folder: Path) -> None:
    """Keep what the clients of a run had beside it, where the run is begun anew.

    Raises:
        RefusedError: There are so many that somebody at the site should look.
    """
    if not (folder / STORE).exists():
        return
    for number in range(1, ASIDE + 1):
        if not (beside := folder / f"{STORE}.{number}").exists():
            if (record := folder / CLIENTS).exists():  # whose values these are
                files.write(folder / STORE / CLIENTS, record.read_text())
            (folder / STORE).replace(beside)
            return
    raise RefusedError(
        f"the run was begun anew {ASIDE} times, and what its clients had is kept beside it; "
        "somebody at the site must remove that first"
    )


def refuse_full(folder: Path, more: int, room: int | None) -> None:
    """Raise RefusedError where the site's runs would take more room than it lends.

    Args:
        folder: Of all runs.
        more: Bytes that are to be written.
        room: Bytes that are lent; None is no bound.
    """
    if room is None:
        return
    taken = sum(
        file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink()
    )
    if taken + more > room:
        raise RefusedError(
            f"the site's runs take {taken / 1e6:,.0f} MB of the {room / 1e6:,.0f} MB that it lends"
        )


def replace_checkpoint(unfinished: Path, place: Path) -> None:
    """Put a checkpoint that is whole where it belongs.

    Those of earlier rounds go but for the last, and those of later ones, which a coordinator that
    is here no longer has.
    """
    # the same round once more, for a coordinator that was killed before it had its own
    shutil.rmtree(place, ignore_errors=True)
    unfinished.replace(place)
    files.sync(place.parent)
    others = [old for old in place.parent.glob("round-*") if old.name != place.name]
    earlier = sorted(old for old in others if old.name < place.name)
    for old in set(others) - set(earlier[1 - CHECKPOINTS :]):
        shutil.rmtree(old)
