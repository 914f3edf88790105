"""Rows that cannot be used: what is wrong with them, and what one may do about each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from fedpref.data.preferences import Side
from fedpref.errors import UserError

Kind = Literal["no preference", "empty", "too long", "alike", "no client"]
Policy = Literal["refuse", "skip"]
SHOWN = 3  # rows of each kind that a message names

# how tables write a missing value as text: what pandas reads so but NA, which may be a country (and
# Nan and Null may be people), and what other programs write
MISSING = frozenset(
    {"None", "none", "nan", "NaN", "-nan", "-NaN", "null", "NULL", "n/a", "N/A", "#N/A", "#NA"}
    | {"<NA>", "NaT", "\\N"}
)

# kind -> what such rows do or lack, and what mends them other than leaving them out
_SAID: Mapping[Kind, tuple[str, str]] = {
    "no preference": ("state no preference between two answers", ""),
    "empty": ("have an empty prompt or answer", ""),
    "too long": (
        "are longer than the model takes in training",
        "task.truncation_mode=keep_end (or keep_start) cuts them, task.max_length may be raised",
    ),
    "alike": ("have answers that are the same tokens to the model, after cutting if any", ""),
    "no client": ("belong to nobody", "partition.column names the column"),
}


class Unusable(UserError):  # noqa: N818  # it is also kept, as what a row is
    """A row that cannot be used, while others of its file can.

    It is raised where one row is read by itself, and kept where all are.

    Args:
        kind: What kind of row it is.
        where: File and row.
        reason: What is wrong with it, in words.
    """

    def __init__(self, kind: Kind, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.kind, self.where, self.reason = kind, where, reason

    def __reduce__(self) -> tuple[type[Unusable], tuple[Kind, str, str]]:
        return type(self), (self.kind, self.where, self.reason)


@contextmanager
def kept(rows: list[Unusable] | None) -> Iterator[None]:
    """Within it, a row that cannot be used is put into a list, or raised where there is none."""
    try:
        yield
    except Unusable as row:
        if rows is None:
            raise
        rows.append(row)


def refuse_empty(shards: Iterable[Any], sides: Sequence[Side] = ("train", "test")) -> None:
    """Raise UserError where a client has no row left on one of some sides, for none can be used."""
    called = {"train": "training", "test": "held-out", "validation": "validation"}
    for shard in shards:
        for side in sides:
            if not getattr(shard, side):
                raise UserError(
                    f"client {shard.name!r} has no {called[side]} rows left, for those that "
                    "it had cannot be used. Mend them, let "
                    "task.truncation_mode cut those that are too long, or leave the client out "
                    "(partition.only, or a file without it)."
                )


def counted(rows: Iterable[Unusable]) -> dict[str, int]:
    """Return how many rows there are of each kind."""
    return dict(Counter(row.kind for row in rows))


def summary(unusable: Sequence[Unusable], total: int) -> str:
    """Return one message on all rows that cannot be used.

    Args:
        unusable: These rows.
        total: How many rows were read.
    """
    lines = [f"data: {len(unusable)} of {total} rows cannot be used."]
    for kind, (what, remedy) in _SAID.items():
        some = [row for row in unusable if row.kind == kind]
        if some:
            rest = f"; and {len(some) - SHOWN} more" if len(some) > SHOWN else ""
            if len({row.reason for row in some}) == 1:
                named = f"{some[0].reason}: " + "; ".join(row.where for row in some[:SHOWN])
            else:
                named = "; ".join(f"{row.where}: {row.reason}" for row in some[:SHOWN])
            lines.append(f"  {len(some)} {what} ({named}{rest})." + (f" {remedy}." * bool(remedy)))
    return "\n".join([*lines, "data.unusable=skip leaves them all out, and counts them."])
