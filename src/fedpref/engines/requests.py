"""What a coordinator may ask of a site: every name, number and path, parsed once.

A verb sees nothing that is not of one of these types; paths are made of them alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from typing_extensions import TypedDict

from fedpref.engines.engine import Purpose
from fedpref.engines.messages import Header, RefusedError

LONGEST = 200  # bytes of a part of a run's name, which is a folder's
# what lies in a run's folder at a site, in which no other run may lie
RESERVED = re.compile(r"(?i)(checkpoints|privacy|cache)([.].*)?|round-[0-9]+")
_DIGITS = re.compile(r"0|[1-9][0-9]{0,8}")
_FORM = ConfigDict(extra="forbid", strict=True)


def _whole(value: Any) -> Any:
    """Return a whole number; as a key of JSON's it is written in digits."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return int(value)
    return value


def run_name(name: str) -> str:
    """Return a run's name, up to four folders, none of them hidden; raises ValueError."""
    parts = name.split("/")
    if len(parts) > 4 or not all(re.fullmatch(r"\w[\w.-]{0,99}", part) for part in parts):
        raise ValueError("a run is called by up to four words of letters, digits, '.', '_' and '-'")
    if taken := [part for part in parts if RESERVED.fullmatch(part)]:
        raise ValueError(f"{taken[0]!r} is what a site calls a folder within a run's")
    if any(len(part.encode()) > LONGEST for part in parts):
        raise ValueError(f"a part of a run's name is longer than {LONGEST} bytes")
    return name


Number = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0, lt=10**9)]
ClientId = Number
Run = Annotated[str, AfterValidator(run_name)]
Checkpoint = Annotated[str, Field(pattern=r"^round-[0-9]{6,9}$")]
StateField = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,63}$")]
CallName = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
ValueName = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}\.([0-9]{1,2}|[a-z_][a-z0-9_]{0,63})$")]
WorkName = Annotated[str, Field(pattern=r"^[\w.:-]{1,120}$")]
SiteName = Annotated[str, Field(min_length=1, max_length=LONGEST)]
ClientName = Annotated[str, Field(max_length=1000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Weight = Annotated[float, Field(allow_inf_nan=False, ge=-1e3, le=1e3)]
Share = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
Seconds = Annotated[float, Field(allow_inf_nan=False, ge=0, le=86400)]


MOST_SITES = 2000  # of a sum under masks
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=4096)]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Own(TypedDict):
    """An argument that is each client's own, by name."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    own: dict[ClientId, ValueName]


class Everybody(TypedDict):
    """An argument that is a tree of the message's, by its number."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    tree: Annotated[int, Field(ge=0, lt=64)]


class Plain(TypedDict):
    """An argument that is plain data; the work's types say what it may be."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    plain: Any


class Split(TypedDict):
    """Say what tells prompts that are held out."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    experiment: dict[str, Any]
    everything: bool


class Consent(TypedDict):
    """Say whether the site takes part in these experiments; nothing is begun."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    experiments: Annotated[list[dict[str, Any]], Field(max_length=64)]


class Open(TypedDict):
    """Begin an experiment, or go on with it."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    experiment: dict[str, Any]
    run: Run
    resumes: bool
    is_known: bool
    held_out: list[Digest]


class Numbered(TypedDict):
    """Learn the numbers of clients."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    ids: dict[ClientName, ClientId]
    sites: dict[SiteName, list[ClientId]]


class Each(TypedDict):
    """Do work for some clients."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    work: WorkName
    args: Annotated[list[Own | Everybody | Plain], Field(max_length=32)]
    clients: list[ClientId]
    purpose: Purpose
    round: Number
    call: Number
    name: CallName


class Noisy(TypedDict):
    """A sum that noise is added to: where it stands, and the largest norm of what is sent."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    round: Number
    call: Number
    norm: Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e9)]


class SumAddress(TypedDict):
    """Which sum: where it stands in the run, and which attempt at it."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    purpose: Purpose
    round: Number
    call: Number
    attempt: Annotated[int, Field(ge=0, lt=100)]


class Keys(TypedDict):
    """Make known the public keys of a sum of so many sites."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    address: SumAddress
    sites: Annotated[list[SiteName], Field(min_length=2, max_length=MOST_SITES)]
    told: Hex
    value_name: ValueName


class Heard(TypedDict):
    """Whose boxes came to a site, as bits of their numbers, signed by it."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    heard: Annotated[str, Field(pattern=r"^[0-9a-f]+$", max_length=MOST_SITES // 4 + 1)]
    signature: Hex


class Advert(TypedDict):
    """A site's public keys, and who says so."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    mask: Key
    box: Key
    holders: Annotated[list[Number], Field(max_length=MOST_SITES)] | None
    signature: Hex
    certificate: Annotated[str, Field(max_length=20_000)]


class Boxes(TypedDict):
    """Seal shares for the sites whose keys these are."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    address: SumAddress
    adverts: dict[SiteName, Advert]
    threshold: Annotated[int, Field(ge=2, le=MOST_SITES)]
    plan: dict[SiteName, dict[ClientId, Share]]


class Masked(TypedDict):
    """A sum under masks: which, and the boxes that others have sealed for the site."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    address: SumAddress
    boxes: dict[SiteName, Hex]


class Agree(TypedDict):
    """Sign whose values are in a sum."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    address: SumAddress
    survivors: Annotated[list[SiteName], Field(max_length=MOST_SITES)]


class Unmask(TypedDict):
    """Give shares of masks, to the set of survivors that the sites have signed."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    address: SumAddress
    survivors: Annotated[list[SiteName], Field(max_length=MOST_SITES)]
    signatures: dict[SiteName, Hex]
    heard: dict[SiteName, Heard]


class Place(TypedDict):
    """By what is drawn how a message that is compressed is rounded."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    round: Number
    call: Number


class Contribute(TypedDict):
    """Send each client's share of a sum; for one with noise, its change as integers."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    own: dict[ClientId, ValueName]
    shares: dict[ClientId, Share]
    noisy: NotRequired[Noisy]
    masked: NotRequired[Masked]
    place: NotRequired[Place]


class Tally(TypedDict):
    """Send the sums of clients' figures, under masks."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    own: Annotated[dict[ClientId, ValueName], Field(min_length=1)]
    masked: Masked


class Exchange(TypedDict):
    """Tell neighbours, hear them, and mix."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    own: Annotated[dict[ClientId, ValueName], Field(min_length=1)]
    weights: dict[ClientId, dict[ClientId, Weight]]
    round: Number
    call: Number
    name: CallName
    wait: Seconds


class Report(TypedDict):
    """Send clients' metrics."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    own: dict[ClientId, ValueName]


class Save(TypedDict):
    """Keep clients' values in files."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    own: dict[StateField, dict[ClientId, ValueName]]
    checkpoint: Checkpoint


class Load(TypedDict):
    """Take up clients' values."""

    __pydantic_config__ = _FORM  # type: ignore[misc]
    checkpoint: Checkpoint
    fields: Annotated[list[StateField], Field(max_length=64)]
    name: CallName


class Names(TypedDict):
    """Send the names of values."""

    __pydantic_config__ = _FORM  # type: ignore[misc]


FORMS: dict[str, TypeAdapter[Any]] = {
    "split": TypeAdapter(Split),
    "consent": TypeAdapter(Consent),
    "open": TypeAdapter(Open),
    "number": TypeAdapter(Numbered),
    "each": TypeAdapter(Each),
    "contribute": TypeAdapter(Contribute),
    "keys": TypeAdapter(Keys),
    "boxes": TypeAdapter(Boxes),
    "agree": TypeAdapter(Agree),
    "unmask": TypeAdapter(Unmask),
    "tally": TypeAdapter(Tally),
    "exchange": TypeAdapter(Exchange),
    "report": TypeAdapter(Report),
    "save": TypeAdapter(Save),
    "load": TypeAdapter(Load),
    "names": TypeAdapter(Names),
}
FREED: TypeAdapter[list[tuple[int, str]]] = TypeAdapter(list[tuple[ClientId, ValueName]])


def parsed(verb: Any, header: Header) -> dict[str, Any]:
    """Return what is asked, of the verb's types; raises RefusedError where it is malformed."""
    form = FORMS.get(verb) if isinstance(verb, str) else None
    if form is None:
        raise RefusedError(f"there is no verb {str(verb)[:40]!r}")
    asked: dict[str, Any] = _checked(form, header, f"what is asked by {verb!r}")
    return asked


def freed(entries: Any) -> list[tuple[int, str]]:
    """Return clients and names of values that are no longer wanted."""
    if not isinstance(entries, list):
        raise RefusedError("'free' is malformed: it is no list")
    some = [tuple(entry) if isinstance(entry, list) else entry for entry in entries]
    wanted: list[tuple[int, str]] = _checked(FREED, some, "'free'")
    return wanted


def _checked(form: TypeAdapter[Any], content: Any, what: str) -> Any:
    try:
        return form.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise RefusedError(f"{what} is malformed: {where}: {first['msg']}") from error


def beneath(folder: Path, *parts: str) -> Path:
    """Return a path under a folder; raises RefusedError for one that leads out of it."""
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RefusedError("a path leads out of the site's folder")
    return path
