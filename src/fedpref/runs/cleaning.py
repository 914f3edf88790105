"""What runs keep to save work, and what may go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpref.errors import UserError
from fedpref.experiments.run_directory import RunDirectory

CACHE = "cache"  # the folder's name, of a run, a sweep or a site


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
    caches: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder.")
        caches += sorted(found for found in folder.rglob(CACHE) if found.is_dir())
    for cache in caches:
        for run in (cache.parent, *cache.parent.iterdir()):
            if run.is_dir() and RunDirectory(run).is_held:
                raise UserError(
                    f"{run}: a process is at work on this run. Wait for it, or stop it."
                )
    freed = 0
    for cache in caches:
        for file in cache.rglob("*"):
            if file.is_file():
                freed += file.stat().st_size
                file.unlink()
    return freed
