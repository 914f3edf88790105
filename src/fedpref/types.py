"""Bounds of settings, once for all dataclasses that are read from a config; open choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
)
from pydantic_core import CoreSchema, core_schema


def _number(value: Any) -> Any:
    """Return what is to be a number; raises ValueError for true and false, which YAML makes of yes.

    Python takes them for 1 and 0.
    """
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _fits(number: int) -> int:
    """Return a number that tensors and generators can hold; raises ValueError for others."""
    if number >= 2**63:
        raise ValueError("the number has more than 63 bits")
    return number


Count = Annotated[int, Field(ge=1), AfterValidator(_fits), BeforeValidator(_number)]
"""A whole number, one or more."""

WholeNumber = Annotated[int, Field(ge=0), AfterValidator(_fits), BeforeValidator(_number)]
"""A whole number, zero or more."""

Age = Annotated[int, Field(ge=0, le=64), BeforeValidator(_number)]
"""Rounds by which an adapter may be late, each of which is kept."""

Width = Annotated[int, Field(ge=1, le=2**16), BeforeValidator(_number)]
"""The width or number of a small network's layers."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
"""A number above zero."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
"""A number that is zero or more."""

Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(_number)]
"""A share: zero or more, below one."""

OpenFraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), BeforeValidator(_number)]
"""A share between zero and one, without either."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(_number)]
"""A share from nothing to all."""

Portion = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), BeforeValidator(_number)]
"""A share above zero, one at most."""


def _day(text: str) -> str:
    date.fromisoformat(text)
    return text


Date = Annotated[str, AfterValidator(_day)]
"""A day, as 2024-07-26."""


def _printable(text: str) -> str:
    # it is part of paths, and of what is drawn and printed
    if not text.isprintable() or not text.strip():
        raise ValueError("a name is of letters that can be printed")
    if len(text.encode()) > 200:
        raise ValueError("a name has 200 bytes at most, for files are called by it")
    return text


Name = Annotated[str, AfterValidator(_printable)]
"""A name of something: letters that can be printed."""

Last = Annotated[str, Field(pattern=r"^last-[1-9]\d*$")]
"""So many at the end, as `last-8`."""

Text = str | Sequence[Mapping[str, Any]]
"""Plain text, or a conversation: messages with a `role` and a `content`."""


@cache
def _installed(group: str) -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


@dataclass(frozen=True)
class Open:
    """Marks a choice of kinds to which anyone can add: `Annotated[..., Open(group, base)]`.

    A kind of one's own is named by an entry point of the group, or as `module:Class`.

    Attributes:
        group: Of entry points, such as `fedpref.algorithms`.
        base: The class that a kind of one's own must be derived from.
        also: What kinds are called elsewhere, and what they are called here.
    """

    group: str
    base: type
    also: tuple[tuple[str, str], ...] = ()

    @property
    def installed(self) -> Mapping[str, EntryPoint]:
        """The entry points of installed packages, by name."""
        return _installed(self.group)

    def named(self, kind: type) -> str:
        """Return what a config calls a kind of one's own."""
        path = f"{kind.__module__}:{kind.__qualname__}"
        return next((n for n, point in self.installed.items() if point.value == path), path)

    def has(self, value: Any) -> bool:
        """Return whether a value is of a kind of one's own."""
        return isinstance(value, self.base) and not type(value).__module__.startswith("fedpref.")

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Let values of kinds of one's own pass, which `config.parse` has made already."""

        def validated(value: Any, known: Callable[[Any], Any]) -> Any:
            return value if self.has(value) else known(value)

        def dumped(value: Any, known: Callable[[Any], Any]) -> Any:
            return self.dump(value) if self.has(value) else known(value)

        return core_schema.no_info_wrap_validator_function(
            validated,
            handler(source),
            serialization=core_schema.wrap_serializer_function_ser_schema(dumped),
        )

    def dump(self, value: Any) -> dict[str, Any]:
        """Return a value of a kind of one's own as plain data, under the name of its kind."""
        plain: dict[str, Any] = TypeAdapter(type(value)).dump_python(value, mode="json")
        return {**plain, "name": self.named(type(value))}

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Add that any other name is a kind of one's own, of which an editor knows nothing."""
        names = [{"pattern": r"^[\w.]+:[\w.]+$"}, *({"const": name} for name in self.installed)]
        own = {"type": "object", "required": ["name"], "properties": {"name": {"anyOf": names}}}
        return {"anyOf": [handler(schema), own]}
