"""Rows that are read once and kept: in memory up to a limit, beyond it in a file of TMPDIR."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from operator import attrgetter
from typing import Any, get_args, overload

from fedpref.data.preferences import Row, key
from fedpref.errors import UserError

ROW_BYTES = 400  # of a row in memory beside its texts
BUFFER = 2**20  # bytes that are written at once
KINDS: tuple[type, ...] = get_args(Row)
FIELDS = {kind: attrgetter(*(field.name for field in fields(kind))) for kind in KINDS}


class RowStore(Sequence[Row]):
    """Rows by their number, all in memory or all in a file that has no name and goes with the run.

    Args:
        room: Bytes of rows that stay in memory; of more, all go to the file. None keeps them there.
    """

    def __init__(self, room: int | None = None) -> None:
        self._left = room
        self._rows: list[Row] = []
        self._file: _RowFile | None = None

    def append(self, row: Row) -> None:
        """Keep a row."""
        if self._file is not None:
            self._file.append(row)
            return
        self._rows.append(row)
        if self._left is None:
            return
        said = (key(row.prompt), *row.said, *row.columns.values())
        self._left -= ROW_BYTES + sum(map(_size, said))
        if self._left < 0:
            self._file = _RowFile()
            for kept in self._rows:
                self._file.append(kept)
            self._rows.clear()

    def some(self, numbers: Iterable[int]) -> Sequence[Row]:
        """Return the rows of these numbers: a tuple, or a sequence that reads them when asked."""
        if self._file is None:
            return tuple(self._rows[number] for number in numbers)
        self._file.flush()
        return _FiledRows(self._file, array("Q", numbers))

    def __len__(self) -> int:
        return len(self._rows) if self._file is None else len(self._file)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | Sequence[Row]:
        if isinstance(number, slice):
            return self.some(range(*number.indices(len(self))))
        return self._rows[number] if self._file is None else self._file[number]


def _size(value: Any) -> int:
    """Return about the bytes that a column's value takes in memory."""
    if isinstance(value, Mapping):
        return sys.getsizeof(value) + sum(map(_size, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple):
        return sys.getsizeof(value) + sum(map(_size, value))
    return sys.getsizeof(value)


class _RowFile:
    """Rows one after the other in a file without a name, which this process and its forks read."""

    def __init__(self) -> None:
        with _room_needed():  # it is gone from the folder as soon as it is open
            self._file = tempfile.TemporaryFile(prefix="fedpref-rows-", buffering=BUFFER)
        self._ends = array("Q", [0])
        self._is_written = True

    def append(self, row: Row) -> None:
        kind = type(row)
        # a dataclass by its fields is packed and read again in half of the time
        packed = (KINDS.index(kind), *FIELDS[kind](row)) if kind in FIELDS else row
        try:
            content = pickle.dumps(packed, protocol=pickle.HIGHEST_PROTOCOL)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise UserError(
                f"{row.where}: it holds what no file can hold ({error}), and rows beyond "
                "spill_above_mb lie in one. Leave that column out, or raise spill_above_mb."
            ) from error
        with _room_needed():
            self._ends.append(self._ends[-1] + self._file.write(content))
        self._is_written = False

    def flush(self) -> None:
        """Write what is not written, before forks have it too."""
        if not self._is_written:
            with _room_needed():
                self._file.flush()
            self._is_written = True

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> Row:
        number = range(len(self))[number]
        self.flush()
        begin = self._ends[number]
        # from a place that is said: forked processes have one position in a file together
        content = os.pread(self._file.fileno(), self._ends[number + 1] - begin, begin)
        packed = pickle.loads(content)  # what this process wrote
        row: Row = KINDS[packed[0]](*packed[1:]) if type(packed) is tuple else packed
        return row


@contextmanager
def _room_needed() -> Iterator[None]:
    """Say what is written where, within a `with`, if the system does not write it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{tempfile.gettempdir()}: rows beyond spill_above_mb lie here, and cannot be "
            f"written: {error.strerror}. Make room, set TMPDIR to another folder, or raise "
            "spill_above_mb."
        ) from error


class _FiledRows(Sequence[Row]):
    """Some rows of a file, read when they are asked for and not kept."""

    __slots__ = ("_file", "_numbers")

    def __init__(self, file: _RowFile, numbers: array[int]) -> None:
        self._file, self._numbers = file, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | Sequence[Row]:
        if isinstance(number, slice):
            return _FiledRows(self._file, self._numbers[number])
        return self._file[self._numbers[number]]

    def __iter__(self) -> Iterator[Row]:
        return map(self._file.__getitem__, self._numbers)

    def __reduce__(self) -> Any:  # another process than a fork has no such file
        return tuple, (tuple(self),)

    def filtered(self, is_wanted: Callable[[Row], bool]) -> Sequence[Row]:
        wanted = array("Q", (n for n in self._numbers if is_wanted(self._file[n])))
        return _FiledRows(self._file, wanted)


def filtered(rows: Sequence[Row], is_wanted: Callable[[Row], bool]) -> Sequence[Row]:
    """Return the rows of which something is so; those in a file stay there."""
    if isinstance(rows, _FiledRows):
        return rows.filtered(is_wanted)
    return tuple(filter(is_wanted, rows))
