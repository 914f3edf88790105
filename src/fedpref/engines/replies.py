"""The form of what sites may answer, by verb; a coordinator takes nothing else.

A site speaks for the clients that it was asked about, and for no other's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fedpref.engines.messages import Header, RefusedError
from fedpref.engines.requests import MOST_SITES, Advert, Hex, Key
from fedpref.numerics.trees import Tree

MOST = 10**9  # of whatever is counted
LONGEST_NAME, LONGEST_REASON = 200, 500  # characters
MOST_METRICS, LARGEST_METRIC = 1000, 1e9
LARGEST_NUMBER = 1e15  # of a tensor: the sum of many clients' must be finite


def _label(text: str) -> str:
    """Return a text that can be written to files and shown; raises ValueError otherwise."""
    if not text.isprintable() or not 0 < len(text) <= LONGEST_NAME:
        raise ValueError(f"a name is of 1 to {LONGEST_NAME} characters that can be printed")
    return text


def _reason(text: str) -> str:
    return text[:LONGEST_REASON]


Id = Annotated[int, Field(ge=0, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Size = Annotated[int, Field(ge=0, le=2**50)]
Label = Annotated[str, AfterValidator(_label)]
Reason = Annotated[str, AfterValidator(_reason)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e300, le=1e300)]


class Nothing(TypedDict):
    """An answer that says no more than that it is done."""


class About(TypedDict):
    """What is said of a client."""

    train: Count
    test: Annotated[int, Field(ge=1, le=MOST)]
    validation: NotRequired[Count]
    truncated: Count
    conversations: Count
    digest: Annotated[str, Field(max_length=200)]
    unusable: NotRequired[Count]
    number: NotRequired[Count]


class Split(TypedDict):
    """What tells the prompts that are held out at a site; see `host.HeldOut`."""

    held_out: list[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]]
    is_keyed: bool
    has_sides: bool


class Opened(TypedDict):
    """The clients of a site, by name."""

    about: Annotated[dict[Label, About], Field(min_length=1)]


class Consented(TypedDict):
    """Of each experiment, why the site takes no part in it; empty if it does."""

    reasons: list[Reason]


class Done(TypedDict):
    """The number of parts of a work's result, None if it is no tuple; who failed, and why; what
    private steps have spent of whom.
    """

    parts: Annotated[int, Field(ge=1, le=64)] | None
    failed: dict[Id, Reason]
    spent: NotRequired[
        dict[Id, Annotated[float, Field(allow_inf_nan=False, ge=0, le=LARGEST_METRIC)]]
    ]


class Sealed(TypedDict):
    """Boxes for other sites, and a commitment to the site's own mask."""

    boxes: dict[Label, Hex]
    commitment: Key


class Agreed(TypedDict):
    """A signature under a set of survivors."""

    signature: Hex


class Shared(TypedDict):
    """Shares of others' masks, by site."""

    shares: dict[Label, Hex]


class Exchanged(TypedDict):
    """Bytes that each client told, and clients who were waited for and not heard."""

    sizes: dict[Id, Size]
    unheard: list[Id]


class Reported(TypedDict):
    """Each client's scalars."""

    metrics: dict[Id, Annotated[dict[Label, Number], Field(max_length=MOST_METRICS)]]


class Saved(TypedDict):
    """By field, the clients whose value was written, where others' are made when asked for."""

    kept: NotRequired[dict[str, list[Id]]]


class Found(TypedDict):
    """By field, the clients whose value was found."""

    present: dict[str, list[Id]]


class Sent(TypedDict):
    """What goes with tensors that are sent: under masks of a few, whose boxes came."""

    heard: NotRequired[Annotated[str, Field(pattern=r"^[0-9a-f]+$", max_length=MOST_SITES)]]
    signature: NotRequired[Annotated[str, Field(pattern=r"^[0-9a-f]*$", max_length=4096)]]


class Names(TypedDict):
    """The names of the values that clients hold."""

    names: dict[Id, list[str]]


FORMS: dict[str, TypeAdapter[Any]] = {
    "split": TypeAdapter(Split),
    "consent": TypeAdapter(Consented),
    "open": TypeAdapter(Opened),
    "each": TypeAdapter(Done),
    "exchange": TypeAdapter(Exchanged),
    "report": TypeAdapter(Reported),
    "load": TypeAdapter(Found),
    "names": TypeAdapter(Names),
    "keys": TypeAdapter(Advert),
    "boxes": TypeAdapter(Sealed),
    "agree": TypeAdapter(Agreed),
    "unmask": TypeAdapter(Shared),
    **dict.fromkeys(("contribute", "tally"), TypeAdapter(Sent)),
    "number": TypeAdapter(Nothing),
    "save": TypeAdapter(Saved),
}


def answered(verb: str, header: Header, asked: Header) -> Header:
    """Return the answer, parsed.

    Args:
        verb: What was asked.
        header: Of the answer.
        asked: Of the message.

    Raises:
        RefusedError: It is malformed, or speaks of others than those that were asked about.
    """
    try:
        reply: Header = FORMS[verb].validate_python(header)
    except ValidationError as error:
        raise RefusedError(f"malformed answer to {verb!r}: {error.errors()[0]['msg']}") from error
    if foreign := _spoken_of(verb, reply) - _asked_about(verb, asked):
        raise RefusedError(f"its answer to {verb!r} speaks of clients {sorted(foreign)[:5]}")
    if verb == "exchange" and reply["sizes"].keys() != set(map(int, asked["own"])):
        raise RefusedError("its answer to 'exchange' does not say what each client told")
    if verb == "consent" and len(reply["reasons"]) != len(asked["experiments"]):
        raise RefusedError("its answer to 'consent' is for other experiments")
    return reply


def _spoken_of(verb: str, reply: Header) -> set[int]:
    if verb == "each":
        return {*reply["failed"], *reply.get("spent", ())}
    if verb == "report":
        return set(reply["metrics"])
    if verb == "exchange":
        return set(reply["unheard"])
    return set()


def _asked_about(verb: str, asked: Header) -> set[int]:
    if verb == "each":
        return set(asked["clients"])
    if verb == "report":
        return set(map(int, asked["own"]))
    if verb == "exchange":  # whom its clients were to hear
        return {int(j) for i in asked["own"] for j in asked["weights"][i]}
    return set()


def usable_metrics(
    rows: Mapping[int, Mapping[str, float]],
    needs: Collection[str],
    one_of: Collection[str] = (),
) -> tuple[dict[int, dict[str, float]], dict[int, str]]:
    """Return the metrics that can be put together, and why some clients' cannot.

    Names that most clients do not have are left out. The range of some metrics is known from their
    names: accuracies lie between 0 and 1, numbers of examples are not negative.

    Args:
        rows: By client.
        needs: Names that every row must have.
        one_of: Names of which every row must have one.
    """
    usable: dict[int, dict[str, float]] = {}
    unfit: dict[int, str] = {}
    for client, row in rows.items():
        if missing := sorted(set(needs) - row.keys()):
            unfit[client] = f"it did not report {missing[0]!r}"
        elif one_of and not set(one_of) & row.keys():
            unfit[client] = f"it reported none of {sorted(one_of)}"
        elif wrong := [name for name, value in row.items() if not _in_range(name, value)]:
            unfit[client] = f"{wrong[0]!r} is {row[wrong[0]]:g}, which it cannot be"
    fit = {client: row for client, row in rows.items() if client not in unfit}
    count = Counter(name for row in fit.values() for name in row)
    common = {name for name, times in count.items() if 2 * times > len(fit)}
    for client, row in fit.items():
        if missing := sorted(common - row.keys()):
            unfit[client] = f"it did not report {missing[0]!r}"
        else:
            usable[client] = {name: value for name, value in row.items() if name in common}
    return usable, unfit


def _in_range(name: str, value: float) -> bool:
    if name == "num_examples":
        return 1 <= value <= MOST
    if name.startswith("num_"):
        return 0 <= value <= 1e12
    if "accuracies" in name.split("/")[-1] or "/accuracies" in name:
        return 0 <= value <= 1
    return abs(value) <= LARGEST_METRIC


def unusable(message: Tree) -> str:
    """Return why a message cannot be summed with others; empty if it can."""
    for name, tensor in message.items():
        if not tensor.is_floating_point():
            return "it holds tensors of other than real numbers"
        for extreme in map(float, tensor.aminmax() if tensor.numel() else ()):
            if not math.isfinite(extreme):
                return f"the tensor {name!r} holds a number that is not finite"
            if abs(extreme) > LARGEST_NUMBER:
                return f"it holds the number {extreme:g}"
    return ""


def majority(values: Iterable[Any]) -> Any:
    """Return the value that most have; of several, the one that came first."""
    return Counter(values).most_common(1)[0][0]
