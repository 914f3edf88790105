"""What runs keep to save work, and what may go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpref.errors import UserError
from fedpref.experiments.run_directory import VERSION, RunDirectory
from fedpref.models.trunk import SUFFIX
from fedpref.tasks.offline import SCORES
from fedpref.tasks.opinion import EMBEDDINGS

CACHE = "cache"  # the folder's name, of a run, a sweep or a site
# files in it, by what their names end with; a file of one's own that lies there stays
KEPT = (f"*{SUFFIX}*", f"*{SCORES}*", f"{EMBEDDINGS}*/*")


def clean(folders: Sequence[Path]) -> int:
    """Remove what can be computed again: reference scores, embeddings, states of the trunk.

    Args:
        folders: Runs, sweeps, or folders of sites; all that lies below them.

    Returns:
        How many bytes were freed.

    Raises:
        UserError: A folder is not there, or a process is at work on a run in it; nothing is
            removed.
    """
    files: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder.")
        # neither walk follows a link to a folder
        for cache in sorted(folder.rglob(CACHE)):
            if cache.is_dir() and not cache.is_symlink():
                _refuse_running(cache.parent)
                files += [
                    file
                    for pattern in KEPT
                    for file in cache.glob(pattern)
                    if file.is_file() and not file.is_symlink()
                ]
    freed = 0
    for file in files:
        freed += file.stat().st_size
        file.unlink()
    return freed


def _refuse_running(folder: Path) -> None:
    """Raise UserError where a process is at work on a run in a folder."""
    for version in folder.rglob(VERSION):
        if RunDirectory(version.parent).is_held:
            raise UserError(
                f"{version.parent}: a process is at work on this run. Wait for it, or stop it."
            )
