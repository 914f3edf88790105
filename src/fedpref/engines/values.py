"""Clients' values, each with what may be done with it; at a site, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from fedpref.engines.messages import RefusedError
from fedpref.federation.leaving import Label

OVERHEAD = 500  # bytes of a tensor beside its numbers, about
OPEN = Label()  # of what came from the coordinator, which may go anywhere


class Kept:
    """A value on a client, with its label; the same one as long as the value is."""

    def __init__(self, value: Any, label: Label = OPEN) -> None:
        self.value, self.label = value, label


class Later:
    """How a value of many clients is made when it is asked for, each time anew.

    Args:
        made: Makes a client's.
        size: Bytes of what that needs, which lie here as long as any client has the value.
    """

    def __init__(self, made: Callable[[int], Kept], size: int) -> None:
        self.made, self.size, self.clients = made, size, 0


class Values:
    """Clients' values by name: none is written twice, and all together have a bound."""

    def __init__(self, numbers: Iterable[int] = (), room: int | None = None) -> None:
        self._values: dict[int, dict[str, Kept | Later]] = {number: {} for number in numbers}
        self._room, self._bytes = room, 0

    def refuse_taken(self, clients: Iterable[int], name: str) -> None:
        """Raise RefusedError where clients have values of a call's name, or are not here."""
        for client in clients:
            if client not in self._values:
                raise RefusedError(f"client {client} is none of those here")
            if any(taken.split(".", 1)[0] == name for taken in self._values[client]):
                raise RefusedError(f"client {client} has values called {name!r} already")

    def put(self, client: int, name: str, kept: Kept) -> None:
        """Keep a value; raises RefusedError where there is no room."""
        self._take(size(kept.value))
        self._values[client][name] = kept

    def put_later(self, clients: Iterable[int], name: str, later: Later) -> None:
        """Let values be made when they are asked for; raises RefusedError where what that needs has
        no room.
        """
        self._take(later.size)
        for client in clients:
            self._values[client][name] = later
            later.clients += 1

    def _take(self, more: int) -> None:
        if self._room is not None and self._bytes + more > self._room:
            raise RefusedError(
                f"the values here would take more than the {self._room / 1e6:,.0f} MB that this "
                "site lends"
            )
        self._bytes += more

    def drop(self, client: int, name: str) -> None:
        """Forget a value, if it is there."""
        kept = self._values.get(client, {}).pop(name, None)
        if isinstance(kept, Kept):
            self._bytes -= size(kept.value)
        elif kept is not None:
            kept.clients -= 1
            self._bytes -= 0 if kept.clients else kept.size

    def get(self, client: int, name: str) -> Kept:
        """Return a value; raises RefusedError where there is none."""
        kept = self._found(client, name)
        return kept if isinstance(kept, Kept) else kept.made(client)

    def is_kept(self, client: int, name: str) -> bool:
        """Return whether a value is there, not made when it is asked for; raises RefusedError where
        there is none.
        """
        return isinstance(self._found(client, name), Kept)

    def _found(self, client: int, name: str) -> Kept | Later:
        if name not in self._values.get(client, {}):
            raise RefusedError(f"client {client} has no value {name!r} here")
        return self._values[client][name]

    def names(self) -> dict[int, list[str]]:
        """Return the names of all values, by client."""
        return {client: sorted(values) for client, values in self._values.items()}


def size(value: Any) -> int:
    """Return about the bytes that a tree takes, its names among them; metrics take none."""
    return sum(part.nbytes + OVERHEAD for part in value.values() if isinstance(part, Tensor))
