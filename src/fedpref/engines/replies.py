"""What sites may answer, by verb: a coordinator takes nothing that is not of this form."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fedpref.engines.messages import Header, RefusedError
from fedpref.types import WholeNumber

Id = int
Number = Annotated[float, Field(allow_inf_nan=False)]


class Nothing(TypedDict):
    """That it is done."""


class About(TypedDict, total=False):
    """What is said of a client."""

    train: WholeNumber
    test: WholeNumber
    truncated: WholeNumber
    conversations: WholeNumber
    digest: str
    number: WholeNumber


class Opened(TypedDict):
    """Clients by name."""

    about: dict[str, About]


class Done(TypedDict):
    """How many parts a work's result has, None for one that is no tuple; clients for which it failed, each with the reason."""

    parts: Annotated[int, Field(ge=1, le=64)] | None
    failed: dict[Id, str]


class Exchanged(TypedDict):
    """Bytes that each client told; clients who were waited for and not heard."""

    sizes: dict[Id, WholeNumber]
    unheard: list[Id]


class Reported(TypedDict):
    """Each client's scalars."""

    metrics: dict[Id, dict[str, Number]]


class Found(TypedDict):
    """By field, the clients of which there was something."""

    found: dict[str, list[Id]]


class Names(TypedDict):
    """Names under which clients hold values."""

    names: dict[Id, list[str]]


FORMS: dict[str, TypeAdapter[Any]] = {
    "open": TypeAdapter(Opened),
    "each": TypeAdapter(Done),
    "exchange": TypeAdapter(Exchanged),
    "report": TypeAdapter(Reported),
    "load": TypeAdapter(Found),
    "names": TypeAdapter(Names),
    **dict.fromkeys(("number", "contribute", "save"), TypeAdapter(Nothing)),
}


def answered(verb: str, header: Header) -> Header:
    """The answer as it should be; raises RefusedError for another."""
    try:
        found: Header = FORMS[verb].validate_python(header)
    except ValidationError as error:
        raise RefusedError(f"an answer to {verb!r} that is none: {error.errors()[0]['msg']}") from error
    return found
