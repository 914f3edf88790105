"""What may leave a client: a property of the value, from the work that made it to its last copy.

The whole rule. A value on a client has an audience, and where that is not everybody a kind.

1. What a coordinator sends to everybody has no secret in it. Work makes values from such
   arguments, from the client's own values, and from its data.
2. A result's audience is what the work declares of it: `sends`, the coordinator; `tells`,
   neighbours in gossip; nothing, nobody. Metrics, which are plain numbers by name, are for the
   coordinator.
3. It is no wider than that of any argument, unless the work `reads` this argument, and the
   argument's value is of the kind that is read there. Nor has a result a kind into which such an
   argument went that is not read: what is one kind of value does not become another.
4. What neighbours told, and what is mixed with it, is for neighbours at most.
5. Copies keep both: under another name, in a checkpoint, after a restart. A name that is taken is
   not written to.

6. What work reads is a client's own, of the kind that is read there, or as everybody began with it;
   it does not come with a message.

So a private value reaches the coordinator through work alone that says, in its declaration, that it
sends what it computes from a value of this kind in this place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import Tensor

from fedpref.federation.verbs import ANYTHING, COPY, MOMENTS, WithheldError, Work


class Audience(IntEnum):
    """Who may get a value; who is later in the list has all that those before him have."""

    NOBODY = 0
    NEIGHBOURS = 1
    COORDINATOR = 2


@dataclass(frozen=True)
class Label:
    """Who may get a value, and what kind of value it is.

    Attributes:
        audience: Who may get it.
        kind: Of what kind it is, by which work reads it; empty where none is known.
        reason: Why it is for nobody else.
    """

    audience: Audience = Audience.COORDINATOR
    kind: str = ""
    reason: str = field(default="", compare=False)

    @property
    def mixed(self) -> Label:
        """The label of what came of a value and of neighbours' values of the same kind."""
        if self.audience < Audience.COORDINATOR:
            return self
        return Label(Audience.NEIGHBOURS, self.kind, "neighbours' values are in it")

    def refuse(self, audience: Audience, client: int) -> None:
        """Raise WithheldError where somebody is to get a value that is not for them."""
        if self.audience < audience:
            whose = "its own" if self.audience == Audience.NOBODY else "for its neighbours alone"
            why = f": {self.reason}" if self.reason else ""
            raise WithheldError(f"a value of client {client} is {whose}{why}.")


def is_metrics(value: Any) -> bool:
    """Return whether a value is plain numbers by name."""
    return isinstance(value, Mapping) and all(
        isinstance(number, int | float) for number in value.values()
    )


def labels(
    work: Work[..., Any], arguments: Mapping[int, Label], results: Sequence[Any]
) -> Sequence[Label]:
    """Return the labels of what work returned.

    Args:
        work: What was done.
        arguments: By place behind the client, the labels of those that are the client's own.
        results: What it returned.
    """
    unread = {
        _name(work, place): label
        for place, label in arguments.items()
        if not _reads(work, _name(work, place), label.kind)
    }
    by = min(unread, key=lambda name: unread[name].audience, default="")
    narrowest = unread[by].audience if by else Audience.COORDINATOR
    made = []
    for k, result in enumerate(results):
        if not isinstance(result, Mapping):
            raise TypeError(
                f"{work.name!r} returned {type(result).__name__} as result {k}; expected tensors "
                "by name, or metrics: numbers by name"
            )
        if odd := [
            name for name, one in result.items() if not isinstance(one, int | float | Tensor)
        ]:
            raise TypeError(
                f"{work.name!r}, result {k}: {odd[0]!r} is of type "
                f"{type(result[odd[0]]).__name__}; give a metric as float(...)"
            )
        declared = (
            Audience.COORDINATOR
            if k in work.sends or (result and is_metrics(result))
            else Audience.NEIGHBOURS
            if k in work.tells
            else Audience.NOBODY
        )
        if narrowest < declared:
            reason = f"{work.name!r} does not declare that it reads a private {by!r}"
            made.append(Label(narrowest, "", reason))
        else:
            reason = f"{work.name!r} does not declare that it sends its result {k}"
            kind = work.keeps.get(k, "") if narrowest == Audience.COORDINATOR else ""
            made.append(Label(declared, kind, reason))
    return made


def fits(work: Work[..., Any], place: int, label: Label | None) -> bool:
    """Return whether a value may stand in the place of an argument.

    Args:
        work: What is to be done.
        place: Of the argument, behind the client.
        label: The value's; None for one that came with a message.
    """
    read = work.reads.get(_name(work, place))
    if read is None or read == ANYTHING:
        return True
    if label is None:
        return False
    # a copy of what everybody was sent may stand for any kind but moments, which begin empty
    return label.kind == read or (label.kind == COPY and read != MOMENTS)


def _reads(work: Work[..., Any], name: str, kind: str) -> bool:
    """Return whether work reads an argument of a kind; one of no kind is read by none."""
    read = work.reads.get(name)
    return read == ANYTHING or (read is not None and read == kind != "")


def _name(work: Work[..., Any], place: int) -> str:
    """Return the name of an argument by its place behind the client."""
    return work.parameters[min(place, len(work.parameters) - 1)]  # the last may be *parts
