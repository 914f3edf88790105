"""Rows with the side of the split on which each stands, and whose they are."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from decimal import Decimal
from functools import lru_cache
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fedpref.data.parsing import shared
from fedpref.data.preferences import SIDES, Row, Side
from fedpref.data.row_store import RowStore
from fedpref.data.splits import spelled
from fedpref.data.unusable import MISSING, Unusable
from fedpref.errors import UserError

# of no width, by which two names would look alike: soft hyphens, marks of direction, joiners
_UNSEEN = dict.fromkeys(
    [
        *(0xAD, 0x34F, 0x61C, 0x180E, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F)),
        *(*range(0x2060, 0x2065), *range(0x2066, 0x2070)),
    ]
)


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

    def append(self, row: Row) -> Row | Unusable:
        """Note what the next row has.

        Returns:
            The row with it as `label` writes it, or what is wrong where there is nothing.

        Raises:
            UserError: It is no name.
        """
        try:
            name = label(row.columns.get(self.column))
        except ValueError as error:
            raise UserError(f"{row.where}, column {self.column!r}: {error}.") from error
        if name is None:
            known = sorted(map(str, row.columns)) or "none besides the texts"
            return Unusable(
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
        return row if is_so else replace(row, columns=shared({**row.columns, self.column: name}))

    def numbers(self) -> NDArray[np.int64]:
        """Return of each row the place of its name in `names`."""
        return np.array(self._numbers, dtype=np.int64)


def nobodys(row: Unusable) -> UserError:
    """Return the error of rows of which none has the column that says whose it is.

    Args:
        row: One of them.
    """
    return UserError(
        f"{row}. Name the column that says whose a row is by partition.column, or share rows out "
        "by partition: {name: iid, clients: 4}."
    )


class Placed(Sequence[tuple[Side, Row]]):
    """Rows, each with the side of the split on which it stands; those in a file stay there.

    Args:
        rows: Many rows.
        numbers: Which of them these are.
        sides: Their sides, as numbers in `SIDES`.
        labels: What all of `rows` have in a column, if it is known.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        numbers: NDArray[np.int64],
        sides: NDArray[np.int8],
        labels: Labels | None = None,
    ) -> None:
        self._rows, self._numbers, self._sides, self._labels = rows, numbers, sides, labels

    @classmethod
    def of(cls, pairs: Iterable[tuple[Side, Row]], column: str | None = None) -> Placed:
        """Return rows with their sides, in memory.

        Args:
            pairs: The rows, each behind its side.
            column: A column by which they are to be grouped; they then have it as `label` writes
                it.

        Raises:
            Unusable: A row has nothing in the column.
            UserError: No row has, or a value is no name.
        """
        sides, rows, lacking = array("b"), list[Row](), list[Unusable]()
        labels = None if column is None else Labels(column)
        for side, row in pairs:
            noted = row if labels is None else labels.append(row)
            if isinstance(noted, Unusable):
                lacking.append(noted)
            else:
                sides.append(SIDES.index(side))
                rows.append(noted)
        if lacking:
            raise lacking[0] if rows else nobodys(lacking[0])
        return cls(rows, np.arange(len(rows)), np.array(sides, dtype=np.int8), labels)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> tuple[Side, Row]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[Side, Row]]: ...
    def __getitem__(self, place: int | slice) -> tuple[Side, Row] | list[tuple[Side, Row]]:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(len(self)))]
        return SIDES[self._sides[place]], self._rows[int(self._numbers[place])]

    def __add__(self, other: Iterable[tuple[Side, Row]]) -> list[tuple[Side, Row]]:
        return [*self, *other]

    def __radd__(self, other: Iterable[tuple[Side, Row]]) -> list[tuple[Side, Row]]:
        return [*other, *self]

    def take(self, places: NDArray[np.int64]) -> Placed:
        """Return the rows that stand at these places, without reading them."""
        return Placed(self._rows, self._numbers[places], self._sides[places], self._labels)

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
            UserError: No row has, or a value is no name.
        """
        if self._labels is None or self._labels.column != column:
            return Placed.of(self, column).groups(column)
        if not len(self):
            return {}
        numbers = self._labels.numbers()[self._numbers]
        order = np.argsort(numbers, kind="stable")
        found, begins = np.unique(numbers[order], return_index=True)
        parts = np.split(order, begins[1:])
        names = self._labels.names
        return {names[k]: part for k, part in zip(found.tolist(), parts, strict=True)}


def placed(rows: Iterable[tuple[Side, Row]], column: str | None = None) -> Placed:
    """Return rows with their sides as they are, or out of pairs; raises as `Placed.of` does."""
    return rows if isinstance(rows, Placed) else Placed.of(rows, column)


def label(value: Any) -> str | None:
    """Return a client's name as it is said; None where it names nobody.

    1, 1.0 and "1 " are one client, and so is a name in two forms of Unicode. Dates and times are
    called as ISO 8601 writes them.

    Raises:
        ValueError: It is no name.
    """
    return _label_of_text(value) if isinstance(value, str) else _label(value)


@lru_cache(maxsize=2**17)  # each client's rows have it again
def _label_of_text(value: str) -> str | None:
    return _label(value)


def _label(value: Any) -> str | None:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Decimal):
        if value.is_nan():
            return None
        if value.is_finite():  # all of its digits; 7.50 is 7.5
            value = f"{value.normalize():f}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"expected a name or a number, found {value!r}")
    if isinstance(value, date):  # also a time
        value = value.isoformat()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise ValueError(f"expected a name or a number, found {value!r:.60}")
    name = spelled(str(value).translate(_UNSEEN))
    name.encode()  # half a character (a lone surrogate) could be written nowhere
    if (number := re.fullmatch(r"(-?\d+)\.0+", name)) is not None:
        name = number[1]
    return name if name and name not in MISSING else None
