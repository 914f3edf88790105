"""The lock of a run directory: one process at a time writes to a run."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from fedpref.errors import UserError


class RunLock:
    """A lock of the operating system on a hidden file beside the run directory.

    It is gone with its process, however that ends. It holds between machines that share the disk
    where the file system carries locks over (NFS 4, CephFS, GPFS, Lustre mounted with flock), and
    elsewhere between the processes of one machine. Containers hold it against one another where
    they share the folder that the run directory is in, and not where they mount that alone.
    """

    def __init__(self, run: Path) -> None:
        path = run.resolve()
        self._run, self._file = run, path.with_name(f".{path.name}.lock")
        self._descriptor: int | None = None
        self._made: list[Path] = []  # folders above, innermost first

    def acquire(self) -> None:
        """Take the lock; raises UserError while another process has it."""
        self._made = [folder for folder in self._file.parents if not folder.exists()]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for seconds in (0.0, 0.05, 0.2):  # who looks whether it is held has it for a moment
            time.sleep(seconds)
            if self._taken():
                return
        raise UserError(
            f"{self._run}: another process is at work on this run. Wait for it, or stop it."
        )

    def release(self) -> None:
        """Give the lock back."""
        assert self._descriptor is not None
        # while it is held: who opened the file before sees below that it is another
        self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        for folder in self._made:  # of a run that was refused before it had files
            with suppress(OSError):
                folder.rmdir()

    @property
    def is_held(self) -> bool:
        """Whether another process has the lock, of this user or another one."""
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except PermissionError:  # of somebody who alone can tell
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _taken(self) -> bool:
        """Try to take the lock; return whether that worked."""
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            try:
                is_the_one = self._file.stat().st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                is_the_one = False
            if is_the_one:
                self._descriptor = descriptor
                return True
            os.close(descriptor)  # of a file that the last holder has removed
