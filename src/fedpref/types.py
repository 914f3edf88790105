"""Bounds of settings, once for all dataclasses that are read from a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, Field


def _fits(number: int) -> int:
    """Return a number that tensors and generators can hold; raises ValueError for others."""
    if number >= 2**63:
        raise ValueError("the number has more than 63 bits")
    return number


Count = Annotated[int, Field(ge=1), AfterValidator(_fits)]
"""A whole number, one or more."""

WholeNumber = Annotated[int, Field(ge=0), AfterValidator(_fits)]
"""A whole number, zero or more."""

Width = Annotated[int, Field(ge=1, le=2**16)]
"""The width or number of a small network's layers."""

Positive = Annotated[float, Field(gt=0)]
"""A number above zero."""

NonNegative = Annotated[float, Field(ge=0)]
"""A number that is zero or more."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A share: zero or more, below one."""

OpenFraction = Annotated[float, Field(gt=0, lt=1)]
"""A share between zero and one, without either."""

Portion = Annotated[float, Field(gt=0, le=1)]
"""A share above zero, one at most."""

Probability = Annotated[float, Field(ge=0, le=1)]
"""A share from zero to one, with both."""


def _day(text: str) -> str:
    date.fromisoformat(text)
    return text


Date = Annotated[str, AfterValidator(_day)]
"""A day, as 2024-07-26."""

Last = Annotated[str, Field(pattern=r"^last-[1-9]\d*$")]
"""So many at the end, as `last-8`."""

Text = str | Sequence[Mapping[str, Any]]
"""Plain text, or a conversation: messages with a `role` and a `content`."""
