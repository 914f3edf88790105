"""Rows with the side of the split on which each stands, and whose they are."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fedpref.data.preferences import SIDES, Row, Side
from fedpref.data.row_store import RowStore
from fedpref.data.splits import spelled
from fedpref.data.unusable import Unusable
from fedpref.errors import UserError

# how tables write a missing value as text: what pandas reads so but NA, which may be a country (and
# Nan and Null may be people), and what other programs write
MISSING = frozenset(
    {"None", "none", "nan", "NaN", "-nan", "-NaN", "null", "NULL", "n/a", "N/A", "#N/A", "#NA"}
    | {"<NA>", "NaT", "\\N"}
)


class Placed(Sequence[tuple[Side, Row]]):
    """Rows, each with the side of the split on which it stands; those in a file stay there.

    Args:
        rows: Many rows.
        numbers: Which of them these are.
        sides: Their sides, as numbers in `SIDES`.
        column: A column by which rows may be grouped, if it is known, of all of `rows`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        numbers: NDArray[np.int64],
        sides: NDArray[np.int8],
        column: Labels | None = None,
    ) -> None:
        self._rows, self._numbers, self._sides, self._column = rows, numbers, sides, column

    @classmethod
    def of(cls, pairs: Iterable[tuple[Side, Row]]) -> Placed:
        """Return rows that stand in memory, with their sides."""
        pairs = list(pairs)
        sides = np.array([SIDES.index(side) for side, _ in pairs], dtype=np.int8)
        return cls([row for _, row in pairs], np.arange(len(pairs)), sides)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> tuple[Side, Row]: ...
    @overload
    def __getitem__(self, place: slice) -> Placed: ...
    def __getitem__(self, place: int | slice) -> tuple[Side, Row] | Placed:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        return SIDES[self._sides[place]], self._rows[int(self._numbers[place])]

    def __add__(self, other: Placed) -> Placed:
        numbers = np.concatenate((self._numbers, other._numbers))
        sides = np.concatenate((self._sides, other._sides))
        return Placed(self._rows, numbers, sides, self._column)

    def take(self, places: NDArray[np.int64]) -> Placed:
        """Return the rows that stand at these places."""
        return Placed(self._rows, self._numbers[places], self._sides[places], self._column)

    def places(self, side: Side) -> NDArray[np.int64]:
        """Return where the rows of a side stand."""
        return np.flatnonzero(self._sides == SIDES.index(side))

    def rows(self, side: Side) -> Sequence[Row]:
        """Return the rows of a side."""
        numbers = self._numbers[self._sides == SIDES.index(side)].tolist()
        if isinstance(self._rows, RowStore):
            return self._rows.some(numbers)
        return tuple(self._rows[number] for number in numbers)

    def groups(self, column: str) -> dict[str, NDArray[np.int64]]:
        """Return where rows stand, by what they have in a column as `label` writes it.

        Raises:
            Unusable: A row has nothing there.
            UserError: No row has the column, or a value is no name.
        """
        if self._column is None or self._column.column != column:
            labels = Labels(column)
            for _, row in self:
                labels.append(row)
            numbers = labels.numbers
        else:
            labels = self._column
            numbers = labels.numbers[self._numbers]
        order = np.argsort(numbers, kind="stable")
        found, begins = np.unique(numbers[order], return_index=True)
        parts = np.split(order, begins[1:])
        return {labels.names[k]: part for k, part in zip(found, parts, strict=True)}


class Labels:
    """What rows have in a column: a number for each, and the names that these stand for.

    Args:
        column: The column.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self.names: list[str] = []
        self._numbers = array("q")
        self._known: dict[str, int] = {}

    def append(self, row: Row) -> Row:
        """Note what the next row has, and return the row with it as `label` writes it.

        Raises:
            Unusable: The row has nothing there.
            UserError: It is no name.
        """
        try:
            name = label(row.columns.get(self.column))
        except ValueError as error:
            raise UserError(f"{row.where}, column {self.column!r}: {error}.") from error
        if name is None:
            known = sorted(map(str, row.columns)) or "none besides the texts"
            raise Unusable(
                "no client",
                row.where,
                f"partition.column is {self.column!r}, which the row does not have or leaves "
                f"empty; its columns: {known}",
            )
        if name not in self._known:
            self._known[name] = len(self.names)
            self.names.append(name)
        self._numbers.append(self._known[name])
        is_so = row.columns[self.column] == name and isinstance(row.columns[self.column], str)
        return row if is_so else replace(row, columns={**row.columns, self.column: name})

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Of each row, the place of its name in `names`."""
        return np.array(self._numbers, dtype=np.int64)


def label(value: Any) -> str | None:
    """Return a client's name as it is said; None where it names nobody.

    1, 1.0 and "1 " are one client, and so is a name in two forms of Unicode.

    Raises:
        ValueError: It is no name.
    """
    return _label_of_text(value) if isinstance(value, str) else _label(value)


@lru_cache(maxsize=2**17)  # each client's rows have it again
def _label_of_text(value: str) -> str | None:
    return _label(value)


def _label(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"expected a name or a number, found {value!r}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise ValueError(f"expected a name or a number, found {value!r:.60}")
    name = spelled(str(value))
    name.encode()  # half a character (a lone surrogate) could be written nowhere
    if (number := re.fullmatch(r"(-?\d+)\.0+", name)) is not None:
        name = number[1]
    return name if name and name not in MISSING else None
