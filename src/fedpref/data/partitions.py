"""How rows come to clients: by a column, or cut at random as the literature does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpref.data.placed import Placed, label, placed
from fedpref.data.preferences import SIDES, ClientData, Opinion, Row, Side
from fedpref.data.splits import identity
from fedpref.errors import UserError
from fedpref.types import Count, NonNegative, Open, Positive, WholeNumber

# what the rows of a side are called, and how there may be some
_REMEDIES = {
    "train": ("training", "lower test_fraction or data.validation_fraction"),
    "test": ("held-out", "raise test_fraction"),
    "validation": ("validation", "raise data.validation_fraction"),
}


Pairs = Sequence[tuple[Side, Row]]


class Partitioning(ABC):
    """How rows come to clients: a frozen dataclass of settings."""

    name: str

    @property
    def keeps_clients(self) -> bool:
        """Whether a name is the same client with every seed, whichever rows are held out."""
        return False

    @abstractmethod
    def assign(
        self, rows: Pairs, rng: np.random.Generator
    ) -> Mapping[str, Iterable[tuple[Side, Row]]]:
        """Return each client's rows, by the client's name.

        Args:
            rows: All rows, each behind its side: `train`, `test` or `validation`. They are a
                `Placed`, of which `take` reads nothing; who goes through it reads each row, and
                what is returned of such pairs stays in memory.
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
    only: tuple[str | int, ...] = ()
    """The values that become clients; by default all."""
    clients_per_value: Count = 1
    """Clients that share out the rows of each value at random."""
    min_rows: Count = 1
    """Clients with fewer rows, both sides together, are left out."""
    min_test_rows: WholeNumber = 0
    """Clients with fewer held-out rows are left out, and with one or more those who are left
    without training rows."""
    max_clients: Count | None = None
    """Keep only the first so many clients, by number of rows, then by name."""
    max_rows: Count | None = None
    """Rows of each client at most, evenly spread, of both sides in their proportion."""

    @property
    def keeps_clients(self) -> bool:
        return self.clients_per_value == 1

    def assign(self, rows: Pairs, rng: np.random.Generator) -> dict[str, Placed]:
        rows = placed(rows, self.column)
        places = rows.groups(self.column)
        only = {label(value) for value in self.only}
        if unknown := sorted(str(value) for value in only if value not in places):
            raise UserError(
                f"partition.only: there is no row with {self.column} {unknown[0]!r}; there are "
                f"{sorted(places)[:8]}."
            )
        groups = {
            value: rows.take(some)
            for value, some in sorted(places.items())
            if not only or value in only
        }
        if self.clients_per_value > 1:
            shares = np.full((2, self.clients_per_value), 1 / self.clients_per_value)
            groups = {
                f"{value}-{number}": group.take(part)
                for value, group in groups.items()
                for number, part in zip(
                    _numbers(self.clients_per_value), _cut(group, shares, rng), strict=True
                )
            }
        return self._select(
            {name: _thinned(group, self.max_rows) for name, group in groups.items()}
        )

    def _select(self, groups: dict[str, Placed]) -> dict[str, Placed]:
        kept = {
            name: group
            for name, group in groups.items()
            if len(group) >= self.min_rows
            and len(group.places("test")) >= self.min_test_rows
            and (not self.min_test_rows or len(group.places("train")))
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

    def assign(self, rows: Pairs, rng: np.random.Generator) -> dict[str, Placed]:
        rows = placed(rows)
        _refuse_more(self.clients, rows)
        parts = _cut(rows, np.full((2, self.clients), 1 / self.clients), rng)
        return {
            name: _thinned(rows.take(part), self.max_rows)
            for name, part in zip(_names(self.clients), parts, strict=True)
        }


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

    def assign(self, rows: Pairs, rng: np.random.Generator) -> dict[str, Placed]:
        rows = placed(rows, self.column)
        _refuse_more(self.clients, rows)
        merged: list[list[NDArray[np.int64]]] = [[] for _ in range(self.clients)]
        for _, places in sorted(rows.groups(self.column).items()):
            # more is as even as it gets, and beyond what numpy can draw
            shares = rng.dirichlet(np.full(self.clients, min(self.alpha, 1e12)))
            parts = _cut(rows.take(places), np.stack([shares, shares]), rng)
            for some, part in zip(merged, parts, strict=True):
                some.append(places[part])
        return {
            name: rows.take(np.concatenate([np.arange(0), *some]))
            for name, some in zip(_names(self.clients), merged, strict=True)
        }


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

    def assign(self, rows: Pairs, rng: np.random.Generator) -> dict[str, Placed]:
        rows = placed(rows)
        _refuse_more(self.clients, rows)
        shares = np.arange(1, self.clients + 1, dtype=float) ** -self.exponent
        equal = np.full(self.clients, 1 / self.clients)
        parts = _cut(rows, np.stack([shares / shares.sum(), equal]), rng)
        return {
            name: rows.take(part) for name, part in zip(_names(self.clients), parts, strict=True)
        }


Partition = Annotated[
    Natural | IID | Dirichlet | BySize,
    Field(discriminator="name"),
    Open("fedpref.partitions", Partitioning),
]


def partition(
    rows: Iterable[tuple[Side, Row]], how: Partition, seed: int
) -> tuple[ClientData, ...]:
    """Give rows to clients.

    Args:
        rows: Rows with the side of the split on which each stands.
        how: The partition.
        seed: Of its random draws.

    Raises:
        UserError: A client is left without training or without held-out rows.
    """
    rows = placed(rows, how.column if isinstance(how, Natural | Dirichlet) else None)
    groups = how.assign(rows, np.random.default_rng(seed))
    clients = [ClientData(name, *map(placed(group).rows, SIDES)) for name, group in groups.items()]
    validates = len(rows.places("validation")) > 0
    for side, (lacking, remedy) in _REMEDIES.items():
        poor = [c.name for c in clients if not getattr(c, side)]
        if poor and (side != "validation" or validates):
            leaving = (
                "set partition.min_rows and partition.min_test_rows"
                if isinstance(how, Natural)
                else "take fewer clients"
            )
            if most := how.max_rows if isinstance(how, Natural | IID) else None:
                remedy += f", raise partition.max_rows ({most} rows, of all sides in proportion)"
            if side == "test" and _ask_one_thing(rows):
                remedy += ", let data.split_by=prompt tell prompts apart by all of their turns"
            raise UserError(
                f"partition: {len(poor)} of {len(clients)} clients have no {lacking} rows "
                f"({', '.join(poor[:5])}"
                f"{', ...' if len(poor) > 5 else ''}). Give them more, {remedy}, "
                f"or, to leave them out, {leaving}."
            )
    return tuple(clients)


def _ask_one_thing(rows: Placed) -> bool:
    """Return whether all prompts, which are several, end in one question."""
    asked = {
        (identity(row.prompt, "prompt"), identity(row.prompt, "question"))
        for _, row in rows
        if not isinstance(row, Opinion)
    }
    return len(asked) > 1 == len({question for _, question in asked})


def _thinned(rows: Placed, count: int | None) -> Placed:
    """Return `count` rows at most, evenly spread over each side, in the sides' proportion."""
    if count is None or count >= len(rows):
        return rows
    sides = list(map(rows.places, SIDES))
    held_out = [round(count * len(side) / len(rows)) for side in sides[1:]]
    kept = [
        # rounding may leave more for a side than it has
        part[np.arange(min(size, len(part))) * len(part) // max(size, 1)]
        for part, size in zip(sides, (count - sum(held_out), *held_out), strict=True)
    ]
    return rows.take(np.concatenate(kept))


def _refuse_more(clients: int, rows: Placed) -> None:
    if clients > len(rows):
        raise UserError(
            f"partition.clients: {clients:,} clients cannot share {len(rows):,} rows. Take fewer."
        )


def _cut(
    rows: Placed, shares: NDArray[np.float64], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Share rows out at random, and return where each client's stand.

    Args:
        rows: With their sides.
        shares: For training and for held-out rows, each client's share [2, clients]; rows sum to
            one.
        rng: Random numbers.
    """
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(shares.shape[1])]
    for side, proportions in zip(SIDES, (*shares, shares[1]), strict=True):
        members = rows.places(side)
        order = rng.permutation(len(members))
        bounds = np.round(np.cumsum(proportions) * len(members)).astype(int)
        for part, chosen in zip(parts, np.split(order, bounds[:-1]), strict=True):
            part.append(members[chosen])
    return [np.concatenate(part) for part in parts]


def _names(clients: int) -> list[str]:
    return [f"client-{number}" for number in _numbers(clients)]


def _numbers(clients: int) -> list[str]:
    return [f"{number:0{len(str(clients))}d}" for number in range(1, clients + 1)]
