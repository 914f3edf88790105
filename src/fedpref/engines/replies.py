"""The form of what sites may answer, by verb; a coordinator takes nothing else."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fedpref.engines.messages import Header, RefusedError
from fedpref.types import WholeNumber

Id = int
Number = Annotated[float, Field(allow_inf_nan=False)]


class Nothing(TypedDict):
    """An answer that says no more than that it is done."""


class About(TypedDict, total=False):
    """What is said of a client."""

    train: WholeNumber
    test: WholeNumber
    truncated: WholeNumber
    conversations: WholeNumber
    unusable: WholeNumber
    digest: str
    number: WholeNumber


class Split(TypedDict):
    """What tells the prompts that are held out at a site; see `site.HeldOut`."""

    held_out: list[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]]
    is_keyed: bool
    has_sides: bool


class Opened(TypedDict):
    """The clients of a site, by name."""

    about: dict[str, About]


class Done(TypedDict):
    """The number of parts of a work's result, None if it is no tuple; who failed, and why."""

    parts: Annotated[int, Field(ge=1, le=64)] | None
    failed: dict[Id, str]


class Exchanged(TypedDict):
    """Bytes that each client told, and clients who were waited for and not heard."""

    sizes: dict[Id, WholeNumber]
    unheard: list[Id]


class Reported(TypedDict):
    """Each client's scalars."""

    metrics: dict[Id, dict[str, Number]]


class Found(TypedDict):
    """By field, the clients whose value was found."""

    present: dict[str, list[Id]]


class Names(TypedDict):
    """The names of the values that clients hold."""

    names: dict[Id, list[str]]


FORMS: dict[str, TypeAdapter[Any]] = {
    "split": TypeAdapter(Split),
    "open": TypeAdapter(Opened),
    "each": TypeAdapter(Done),
    "exchange": TypeAdapter(Exchanged),
    "report": TypeAdapter(Reported),
    "load": TypeAdapter(Found),
    "names": TypeAdapter(Names),
    **dict.fromkeys(("number", "contribute", "save"), TypeAdapter(Nothing)),
}


def answered(verb: str, header: Header) -> Header:
    """Return the answer, parsed; raises RefusedError where it is malformed."""
    try:
        reply: Header = FORMS[verb].validate_python(header)
    except ValidationError as error:
        raise RefusedError(f"malformed answer to {verb!r}: {error.errors()[0]['msg']}") from error
    return reply
