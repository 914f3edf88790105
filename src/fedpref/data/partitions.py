"""How rows come to clients: by a column, or cut at random as the literature does."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpref.data.preferences import ClientData, Row, Side
from fedpref.data.splits import spelled
from fedpref.data.unusable import Unusable
from fedpref.errors import UserError
from fedpref.types import Count, NonNegative, Open, Positive, WholeNumber

# how tables write a missing value as text: what pandas reads so but NA, which may be a country (and
# Nan and Null may be people), and what other programs write
MISSING = frozenset(
    {"None", "none", "nan", "NaN", "-nan", "-NaN", "null", "NULL", "n/a", "N/A", "#N/A", "#NA"}
    | {"<NA>", "NaT", "\\N"}
)
Placed = Sequence[tuple[Side, Row]]
SIDES: tuple[Side, ...] = ("train", "test", "validation")
# what the rows of a side are called, and how there may be some
_REMEDIES = {
    "train": ("training", "lower test_fraction or data.validation_fraction"),
    "test": ("held-out", "raise test_fraction"),
    "validation": ("validation", "raise data.validation_fraction"),
}


class Partitioning(ABC):
    """How rows come to clients: a frozen dataclass of settings."""

    name: str

    @abstractmethod
    def assign(self, rows: Placed, rng: np.random.Generator) -> dict[str, Placed]:
        """Return each client's rows, by the client's name.

        Args:
            rows: All rows, each with its side: `train`, `test` or `validation`.
            rng: Random numbers of the experiment's seed.

        Raises:
            UserError: The rows cannot be shared out so.
        """


@dataclass(frozen=True, kw_only=True)
class Natural(Partitioning):
    """One client for each value of a column, or several that share its rows out at random."""

    name: Literal["natural"] = "natural"
    column: str = "client"
    """The column whose values become clients."""
    only: tuple[str, ...] = ()
    """The values that become clients; by default all."""
    clients_per_value: Count = 1
    """Clients that share out the rows of each value at random."""
    min_rows: Count = 1
    """Clients with fewer rows, both sides together, are left out."""
    min_test_rows: WholeNumber = 0
    """Clients with fewer held-out rows are left out."""
    max_clients: Count | None = None
    """Keep only the first so many clients, by number of rows, then by name."""
    max_rows: Count | None = None
    """Rows of each client at most, evenly spread, of both sides in their proportion."""

    def assign(self, rows: Placed, rng: np.random.Generator) -> dict[str, Placed]:
        groups = _by_column(rows, self.column)
        only = {label(value) for value in self.only}
        if unknown := sorted(str(value) for value in only if value not in groups):
            raise UserError(
                f"partition.only: there is no row with {self.column} {unknown[0]!r}; there are "
                f"{sorted(groups)[:8]}."
            )
        groups = {value: group for value, group in groups.items() if not only or value in only}
        if self.clients_per_value > 1:
            shares = np.full((2, self.clients_per_value), 1 / self.clients_per_value)
            cut = {value: _cut(group, shares, rng) for value, group in sorted(groups.items())}
            groups = {
                f"{value}-{name.removeprefix('client-')}": part
                for value, parts in cut.items()
                for name, part in parts.items()
            }
        return self._select(
            {name: _thinned(group, self.max_rows) for name, group in groups.items()}
        )

    def _select(self, groups: dict[str, Placed]) -> dict[str, Placed]:
        kept = {
            name: group
            for name, group in groups.items()
            if len(group) >= self.min_rows
            and sum(side == "test" for side, _ in group) >= self.min_test_rows
        }
        if not kept:
            raise UserError(
                f"partition: no client has {self.min_rows} rows with {self.min_test_rows} held "
                "out; lower min_rows or min_test_rows."
            )
        ranked = sorted(kept, key=lambda name: (-len(kept[name]), name))[: self.max_clients]
        return {name: kept[name] for name in sorted(ranked)}


@dataclass(frozen=True, kw_only=True)
class IID(Partitioning):
    """Equal shares at random, the same number of rows for each client."""

    name: Literal["iid"] = "iid"
    clients: Count = 10
    """How many clients there are."""
    max_rows: Count | None = None
    """Rows of each client at most, of both sides in their proportion."""

    def assign(self, rows: Placed, rng: np.random.Generator) -> dict[str, Placed]:
        groups = _cut(rows, np.full((2, self.clients), 1 / self.clients), rng)
        return {name: _thinned(group, self.max_rows) for name, group in groups.items()}


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partitioning):
    """Each value of a label column is shared out by a symmetric Dirichlet draw (Hsu et al. 2019).

    A small `alpha` gives clients of few labels, a large one IID clients. Held-out rows follow the
    same proportions.
    """

    name: Literal["dirichlet"] = "dirichlet"
    column: str = "label"
    """The column of labels."""
    clients: Count = 10
    """How many clients there are."""
    alpha: Positive = 0.3
    """The distribution's concentration: small gives clients of few labels, large IID ones."""

    def assign(self, rows: Placed, rng: np.random.Generator) -> dict[str, Placed]:
        merged: dict[str, list[tuple[Side, Row]]] = defaultdict(list)
        for _, group in sorted(_by_column(rows, self.column).items()):
            shares = rng.dirichlet(np.full(self.clients, self.alpha))
            for name, part in _cut(group, np.stack([shares, shares]), rng).items():
                merged[name].extend(part)
        return {name: merged[name] for name in _names(self.clients)}


@dataclass(frozen=True, kw_only=True)
class BySize(Partitioning):
    """Rows at random, in sizes that fall off as a power law: client k gets a share of k^-exponent.

    Clients are counted from 1. Held-out rows are shared equally, so that every client is measured
    alike.
    """

    name: Literal["by-size"] = "by-size"
    clients: Count = 10
    """How many clients there are."""
    exponent: NonNegative = 1.0
    """How fast sizes fall off; 0 makes all alike."""

    def assign(self, rows: Placed, rng: np.random.Generator) -> dict[str, Placed]:
        shares = np.arange(1, self.clients + 1, dtype=float) ** -self.exponent
        return _cut(
            rows, np.stack([shares / shares.sum(), np.full(self.clients, 1 / self.clients)]), rng
        )


Partition = Annotated[
    Natural | IID | Dirichlet | BySize,
    Field(discriminator="name"),
    Open("fedpref.partitions", Partitioning),
]


def partition(rows: Placed, how: Partition, seed: int) -> tuple[ClientData, ...]:
    """Give rows to clients.

    Args:
        rows: Rows with the side of the split on which each stands.
        how: The partition.
        seed: Of its random draws.

    Raises:
        UserError: A client is left without training or without held-out rows.
    """
    groups = how.assign(rows, np.random.default_rng(seed))
    clients = []
    for name, group in groups.items():
        sides = ([row for placed, row in group if placed == side] for side in SIDES)
        clients.append(ClientData(name, *map(tuple, sides)))
    validates = any(side == "validation" for side, _ in rows)
    for side, (lacking, remedy) in _REMEDIES.items():
        poor = [c.name for c in clients if not getattr(c, side)]
        if poor and (side != "validation" or validates):
            leaving = (
                "set partition.min_rows and partition.min_test_rows"
                if isinstance(how, Natural)
                else "take fewer clients"
            )
            raise UserError(
                f"partition: {len(poor)} of {len(clients)} clients have no {lacking} rows "
                f"({', '.join(poor[:5])}"
                f"{', ...' if len(poor) > 5 else ''}). Give them more, {remedy}, "
                f"or, to leave them out, {leaving}."
            )
    return tuple(clients)


def _thinned(rows: Placed, count: int | None) -> Placed:
    """Return `count` rows at most, evenly spread over each side, in the sides' proportion."""
    if count is None or count >= len(rows):
        return rows
    sides = [[row for row in rows if row[0] == side] for side in SIDES]
    held_out = [round(count * len(side) / len(rows)) for side in sides[1:]]
    return [
        part[i * len(part) // size]
        for part, size in zip(sides, (count - sum(held_out), *held_out), strict=True)
        for i in range(size)
    ]


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


def named(rows: Iterable[Row], column: str) -> tuple[list[Row], list[Unusable]]:
    """Return rows whose column names somebody, as `label` writes it, and those of nobody.

    Raises:
        UserError: No row has the column, or a value is no name.
    """
    kept: list[Row] = []
    lacking: list[Unusable] = []
    for row in rows:
        try:
            name = label(row.columns.get(column))
        except ValueError as error:
            raise UserError(f"{row.where}, column {column!r}: {error}.") from error
        if name is None:
            known = sorted(map(str, row.columns)) or "none besides the texts"
            reason = f"partition.column is {column!r}, which the row does not have or leaves empty"
            lacking.append(Unusable("no client", row.where, f"{reason}; its columns: {known}"))
        else:
            is_so = row.columns[column] == name and isinstance(row.columns[column], str)
            kept.append(row if is_so else replace(row, columns={**row.columns, column: name}))
    if lacking and not kept:
        raise UserError(
            f"{lacking[0]}. Name the column that says whose a row is by partition.column, or share "
            "rows out by partition: {name: iid, clients: 4}."
        )
    return kept, lacking


def _by_column(rows: Placed, column: str) -> dict[str, Placed]:
    groups: dict[str, list[tuple[Side, Row]]] = defaultdict(list)
    kept, lacking = named((row for _, row in rows), column)
    if lacking:
        raise lacking[0]
    for pair, row in zip(rows, kept, strict=True):
        groups[row.columns[column]].append(pair if pair[1] is row else (pair[0], row))
    return dict(groups)


def _cut(rows: Placed, shares: NDArray[np.float64], rng: np.random.Generator) -> dict[str, Placed]:
    """Share rows out at random.

    Args:
        rows: With their sides.
        shares: For training and for held-out rows, each client's share [2, clients]; rows sum to
            one.
        rng: Random numbers.
    """
    names = _names(shares.shape[1])
    parts: dict[str, list[tuple[Side, Row]]] = {name: [] for name in names}
    for side, proportions in zip(SIDES, (*shares, shares[1]), strict=True):
        members = [row for row in rows if row[0] == side]
        order = rng.permutation(len(members))
        bounds = np.round(np.cumsum(proportions) * len(members)).astype(int)
        for name, chosen in zip(names, np.split(order, bounds[:-1]), strict=True):
            parts[name].extend(members[i] for i in chosen)
    return dict(parts)


def _names(clients: int) -> list[str]:
    return [f"client-{number:0{len(str(clients))}d}" for number in range(1, clients + 1)]
