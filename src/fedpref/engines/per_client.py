"""The simulation's per-client values: in memory up to a limit, beyond it in temporary files."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from filelock import FileLock, Timeout
from torch import Tensor

from fedpref.engines.values import Kept
from fedpref.federation.leaving import Audience, Label
from fedpref.federation.verbs import PerClient
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree

T = TypeVar("T")
SPILLED, LOCK = "fedpref-spilled-", "lock"  # a folder of the machine's temporary ones


@dataclass(frozen=True)
class Others:
    """Values that are what they always were, so that they need not be kept.

    Attributes:
        clients: Who has one.
        of: Returns a client's, the same each time.
    """

    clients: Sequence[int]
    of: Callable[[int], Kept]


class StoredValues(Generic[T]):
    """The simulation's `PerClient`: one value for each client, which only the engine looks into.

    Args:
        room: Bytes of trees that stay in memory; the rest goes to temporary files.
        values: Clients and their values.
        others: What those have that are not among them, which is made when it is asked for and
            not kept.
    """

    def __init__(
        self,
        room: int,
        values: Iterable[tuple[int, Kept]] = (),
        others: Others | None = None,
    ) -> None:
        self._values: dict[int, Kept] = {}
        self._room = self._left = room
        self.others = others
        for client, kept in values:
            self.put(client, kept)

    def put(self, client: int, kept: Kept) -> None:
        """Keep the value of a client that has none yet: in memory if there is room, in a file
        otherwise.
        """
        value = kept.value
        size = (
            trees.size(value)
            if isinstance(value, Mapping)
            and all(isinstance(part, Tensor) for part in value.values())
            else 0
        )
        if size > self._left:
            kept.value, size = _File(value), 0
        self._values[client] = kept
        self._left -= size

    def __or__(self, newer: PerClient[T]) -> StoredValues[T]:
        both = (self._values | stored(newer)._values).items()
        return StoredValues(self._room, both, self.others)

    def _of(self, client: int) -> Kept:
        if self.others is not None and client not in self._values:
            return self.others.of(client)
        return self._values[client]

    def __getitem__(self, client: int) -> T:
        value: Any = self._of(client).value
        return cast(T, value.read() if isinstance(value, _File) else value)

    def __iter__(self) -> Iterator[int]:
        if self.others is None:
            return iter(self._values)
        return iter(sorted({*self.others.clients, *self._values}))

    def label(self, client: int) -> Label:
        """Return what is said of a client's value."""
        return self._of(client).label

    def leaving(self, client: int, audience: Audience) -> T:
        """Return a value that somebody is to get.

        Raises:
            WithheldError: It is not for them.
        """
        kept = self._of(client)
        kept.label.refuse(audience, client)
        value: Any = kept.value
        return cast(T, value.read() if isinstance(value, _File) else value)

    @property
    def kept(self) -> Mapping[int, Kept]:
        """The values as they are kept, by client; a spilled one is a file that reads itself. What
        is made when it is asked for is not among them.
        """
        return self._values


def stored(value: PerClient[T]) -> StoredValues[T]:
    """Return the value, to be looked into; raises TypeError for one that another engine holds."""
    if not isinstance(value, StoredValues):
        raise TypeError(f"{type(value).__name__} is a value of another engine")
    return value


def gather(
    results: Iterable[tuple[int, Any]],
    room: int,
    label: Callable[[int, Sequence[Any]], Sequence[Label]],
    declared: int | None = None,
) -> Any:
    """Return what clients return, as it comes in.

    It is a `StoredValues`, or a tuple of them where clients return tuples, each with `room` bytes
    in memory.

    Args:
        results: Clients, and what they returned.
        room: Bytes of each result that stay in memory.
        label: Returns the labels of what a client returned.
        declared: How many values each returns, if that is known, for the case that nobody does.
    """
    columns: list[StoredValues[Any]] = []
    is_tuple = (declared or 1) > 1
    for client, result in results:
        is_tuple = isinstance(result, tuple)
        parts = result if is_tuple else (result,)
        columns = columns or [StoredValues(room) for _ in parts]
        for column, part, said in zip(columns, parts, label(client, parts), strict=True):
            column.put(client, Kept(part, said))
    columns = columns or [StoredValues(room) for _ in range(declared or 1)]
    return tuple(columns) if is_tuple else columns[0]


class _File:
    """A tree in a file, which goes when nothing refers to it, at the latest with the process."""

    def __init__(self, tree: Tree) -> None:
        handle, name = tempfile.mkstemp(".safetensors", dir=_spilled(os.getpid()))
        os.close(handle)
        self._path = Path(name)
        weakref.finalize(self, _remove, self._path, os.getpid())
        trees.save(tree, self._path)

    def read(self) -> Tree:
        return trees.load(self._path)


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked from it
        path.unlink(missing_ok=True)


@cache
def _spilled(owner: int) -> Path:
    """Return the folder of a process's spilled trees; those of processes that died are removed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SPILLED}*"):
        if (folder / LOCK).exists():
            with suppress(Timeout, OSError), FileLock(folder / LOCK, blocking=False):
                shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=SPILLED))
    lock = FileLock(folder / LOCK, blocking=False)
    lock.acquire()  # until the process is gone, however it goes

    def clear() -> None:
        if os.getpid() == owner:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clear)
    return folder
