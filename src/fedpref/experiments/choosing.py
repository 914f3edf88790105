"""What evaluations on validation rows decide: when a line stops, and which round's model stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedpref.errors import UserError
from fedpref.numerics.metrics import headline, low_is_good
from fedpref.types import Count

Keep = Literal["last", "best"]
VALIDATION = "validation"  # what a row of an evaluation says that it is on


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A line stops when evaluations on validation rows get no better."""

    metric: str | None = None
    """The metric that is looked at, as a mean over clients; null takes the one by which clients are
    compared."""
    patience: Count = 3
    """Evaluations in a row that are no better than the best before them, after which it stops."""


@dataclass(frozen=True)
class Standing:
    """Where a line's evaluations on validation rows stand.

    Attributes:
        best: The round of the best of them, the earliest of equals; None before the first.
        since: How many came after it.
    """

    best: int | None = None
    since: int = 0


def standing(rows: Sequence[Mapping[str, Any]], metric: str | None) -> Standing:
    """Return where a line's evaluations stand.

    Args:
        rows: All evaluations of a line, of which those on validation rows count.
        metric: By which they are told; None for the one by which clients are compared.

    Raises:
        UserError: They do not measure it.
    """
    # where figures come as sums, one may have been lost
    rows = [row for row in rows if is_for_choosing(row) and row["summary"]]
    if not rows:
        return Standing()
    named = metric or headline(rows[0]["summary"])
    if named not in rows[0]["summary"]:
        raise UserError(
            f"stop.metric: evaluations do not measure {named!r}; they measure "
            f"{', '.join(rows[0]['summary'])}."
        )
    sign = -1 if low_is_good(named) else 1
    values = [sign * row["summary"][named]["mean"] for row in rows]
    best = values.index(max(values))
    return Standing(int(rows[best]["round"]), len(values) - 1 - best)


def is_for_choosing(row: Mapping[str, Any]) -> bool:
    """Return whether an evaluation is one that may decide something, not what came of a line."""
    return row.get("on") == VALIDATION and not row.get("final")
