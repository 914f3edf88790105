"""What is computed once and kept: bytes by key, in memory or in a file that processes share."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

LOG = logging.getLogger(__name__)
WAITS = 60.0  # seconds for another process that writes


class Kept:
    """Bytes by key, in a SQLite file or, without one, in this process.

    A file saves work and nothing else: where it cannot be read or written, what would be kept is
    kept in memory.

    Args:
        limit: Bytes above which nothing more is kept; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit, self._size = limit, 0
        self._memory: dict[bytes, bytes] = {}
        self._file: Path | None = None
        self._connection: sqlite3.Connection | None = None
        self._owner = 0

    def keep_in(self, file: Path | None) -> None:
        """Keep in a file from now on, or in memory; what was kept elsewhere is forgotten."""
        if file != self._file:
            self._close()
            self._file, self._memory, self._size = file, {}, 0

    def find(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return what is kept under keys, as far as it is."""
        wanted = list(keys)
        if connection := self._open():
            try:
                found = {}
                for key in wanted:
                    rows = connection.execute("SELECT value FROM kept WHERE key = ?", (key,))
                    if row := rows.fetchone():
                        found[key] = bytes(row[0])
            except sqlite3.Error as error:
                self._give_up(error)
            else:
                return found
        return {key: self._memory[key] for key in wanted if key in self._memory}

    def add(self, values: Mapping[bytes, bytes]) -> None:
        """Keep values, unless that would be more than the limit."""
        connection = self._open()
        size = sum(map(len, values.values()))
        if connection and self._file:
            try:
                if self._limit is not None and self._file.stat().st_size + size > self._limit:
                    return
                with connection:
                    connection.executemany(
                        "INSERT OR IGNORE INTO kept VALUES (?, ?)", list(values.items())
                    )
            except (OSError, sqlite3.Error) as error:
                self._give_up(error)
            else:
                return
        if self._limit is None or self._size + size <= self._limit:
            self._memory.update(values)
            self._size += size

    def _open(self) -> sqlite3.Connection | None:
        # a connection of the process that this one was forked from is not this one's, and a file
        # may have been removed, to be made anew
        is_own = self._connection is not None and self._owner == os.getpid()
        if self._file is None or (is_own and self._file.exists()):
            return self._connection
        self._close()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch(mode=0o600)  # it tells of a client's own texts
            # a site answers each message in a thread of its own, one after the other
            self._connection = sqlite3.connect(self._file, WAITS, check_same_thread=False)
            self._owner = os.getpid()
            # a power cut may cost the file, and with it work, but nothing that counts
            self._connection.execute("PRAGMA synchronous = OFF")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS kept (key BLOB PRIMARY KEY, value BLOB)"
            )
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)
        return self._connection

    def _close(self) -> None:
        if self._connection is not None and self._owner == os.getpid():
            self._connection.close()
        self._connection = None

    def _give_up(self, error: Exception) -> None:
        LOG.warning("%s cannot be used (%s); its content is kept in memory", self._file, error)
        self._close()
        self._file = None
