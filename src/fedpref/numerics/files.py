"""Files that are whole on the disk, or not there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fedpref.errors import UserError


def write(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all, also if the machine stops.

    Raises:
        UserError: It cannot be written, as on a full disk; nothing is left of it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise unwritten(path, error) from error


def whole_path(path: str) -> str:
    """Return a path that is the same from every folder, where something is there; or as it is."""
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


def refuse_unwritable(path: Path) -> None:
    """Raise UserError where no file could be written; its folder is made."""
    if path.is_dir():
        raise UserError(f"{path}: this is a folder. Name a file.")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise unwritten(path, error) from error


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before what follows."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:  # a file system that has no such thing for folders
        if path.is_file():
            raise
    finally:
        os.close(number)


def unwritten(path: Path, error: Exception) -> UserError:
    """Return what is said of a file that cannot be written."""
    reason = str(error).strip() or type(error).__name__
    return UserError(
        f"{path}: this file cannot be written: {reason}. Make room, or see to the folder. A run "
        "that this ends has its last checkpoint, from which `fedpref resume` goes on."
    )
