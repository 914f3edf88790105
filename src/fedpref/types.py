"""Bounds of settings, once for all dataclasses that are read from a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
"""A whole number, one or more."""

WholeNumber = Annotated[int, Field(ge=0)]
"""A whole number, zero or more."""

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

Text = str | Sequence[Mapping[str, str]]
"""Plain text, or a conversation: messages with a `role` and a `content`."""
