"""The simulation's per-client values: in memory up to a limit, beyond it in temporary files."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from fedpref.federation.verbs import PerClient
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree

T = TypeVar("T")


class StoredValues(Generic[T]):
    """The simulation's `PerClient`: one value for each client, which only the engine looks into.

    Args:
        room: Bytes of trees that stay in memory; the rest goes to temporary files.
        values: Clients and their values.
    """

    def __init__(self, room: int, values: Iterable[tuple[int, Any]] = ()) -> None:
        self._values: dict[int, Any] = {}
        self._room = self._left = room
        for client, value in values:
            self.put(client, value)

    def put(self, client: int, value: Any) -> None:
        """Keep the value of a client that has none yet: in memory if there is room, in a file
        otherwise.
        """
        size = (
            trees.size(value)
            if isinstance(value, Mapping)
            and all(isinstance(part, Tensor) for part in value.values())
            else 0
        )
        self._values[client] = value if size <= self._left else _File(value)
        self._left -= size if size <= self._left else 0

    def __or__(self, newer: PerClient[T]) -> StoredValues[T]:
        return StoredValues(self._room, (self._values | stored(newer)._values).items())

    def __getitem__(self, client: int) -> T:
        value: Any = self._values[client]
        return cast(T, value.read() if isinstance(value, _File) else value)

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)


def stored(value: PerClient[T]) -> StoredValues[T]:
    """Return the value, to be looked into; raises TypeError for one that another engine holds."""
    if not isinstance(value, StoredValues):
        raise TypeError(f"{type(value).__name__} is a value of another engine")
    return value


def gather(results: Iterable[tuple[int, Any]], room: int) -> Any:
    """Return what clients return, as it comes in.

    It is a `StoredValues`, or a tuple of them where clients return tuples, each with `room` bytes
    in memory.
    """
    columns: list[StoredValues[Any]] = []
    is_tuple = False
    for client, result in results:
        is_tuple = isinstance(result, tuple)
        parts = result if is_tuple else (result,)
        columns = columns or [StoredValues(room) for _ in parts]
        for column, part in zip(columns, parts, strict=True):
            column.put(client, part)
    return tuple(columns) if is_tuple else columns[0]


class _File:
    """A tree in a file, which goes when nothing refers to it."""

    def __init__(self, tree: Tree) -> None:
        handle, name = tempfile.mkstemp(".safetensors", "fedpref-")
        os.close(handle)
        self._path = Path(name)
        weakref.finalize(self, _remove, self._path, os.getpid())
        trees.save(tree, self._path)

    def read(self) -> Tree:
        return trees.load(self._path)


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked from it
        path.unlink(missing_ok=True)
