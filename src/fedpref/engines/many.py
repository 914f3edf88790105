"""Many clients, of which a round has few: what is made of a client's rows when it is drawn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, overload

from fedpref.data.preferences import SIDES, ClientData
from fedpref.data.unusable import Policy, Unusable, refuse_empty, summary
from fedpref.engines.values import Kept
from fedpref.errors import UserError
from fedpref.federation.leaving import labels
from fedpref.federation.verbs import Work
from fedpref.tasks.task import Task

MANY = 1000  # clients, above which each is made ready when it is needed
KEPT = 512  # of them that stay ready in a process


class DrawnShards(Sequence["DrawnShard"]):
    """Clients' data that is made ready for learning when it is drawn, and forgotten again.

    Args:
        task: Makes it ready.
        clients: Their rows.
        unusable: What becomes of rows that turn out not to be usable.
    """

    def __init__(self, task: Task, clients: Sequence[ClientData], unusable: Policy) -> None:
        self._task, self.clients, self._unusable = task, clients, unusable
        self._cache: Path | None = None
        self._ready: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.clients)

    @overload
    def __getitem__(self, number: int) -> DrawnShard: ...
    @overload
    def __getitem__(self, number: slice) -> list[DrawnShard]: ...
    def __getitem__(self, number: int | slice) -> DrawnShard | list[DrawnShard]:
        if isinstance(number, slice):
            return [DrawnShard(self, i) for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return DrawnShard(self, number % len(self))

    def prepare(self, cache: Path) -> None:
        """Let what is computed once be kept in a folder."""
        self._cache = cache

    def ready(self, number: int) -> Any:
        """Return a client's shard.

        Raises:
            UserError: Rows of it cannot be used, or none is left.
        """
        if number in self._ready:
            self._ready.move_to_end(number)
            return self._ready[number]
        client, unusable = self.clients[number], list[Unusable]()
        shard = self._task.encode(client, unusable)
        if unusable and self._unusable == "refuse":
            raise UserError(f"client {client.name!r}: {summary(unusable, client.size)}")
        refuse_empty([shard], [side for side in SIDES if getattr(client, side)])
        if self._cache is not None:
            shard = self._task.prepare(shard, self._cache)
        self._ready[number] = shard
        if len(self._ready) > KEPT:
            self._ready.popitem(last=False)
        return shard


class DrawnShard:
    """One of them, of which a name and a size are known before it is ready.

    Args:
        among: All of them.
        number: Which it is.
    """

    __slots__ = ("_among", "_number")

    def __init__(self, among: DrawnShards, number: int) -> None:
        self._among, self._number = among, number

    @property
    def name(self) -> str:
        """The client's name."""
        return self._among.clients[self._number].name

    def __len__(self) -> int:
        return len(self._among.clients[self._number].train)

    def opened(self) -> Any:
        """Return it, ready."""
        return self._among.ready(self._number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.opened(), name)


def opened(shard: Any) -> Any:
    """Return a client's data, ready for learning."""
    return shard.opened() if isinstance(shard, DrawnShard) else shard


def when_needed(
    work: Work[..., Any], done: Callable[[int], Any], remembered: int = 64
) -> list[Callable[[int], Kept]]:
    """Return what makes a client's values before the first round, each when it is asked for.

    Draws are by a client's address, so that a value is the same whenever that is: who never takes
    part takes no time and no memory.

    Args:
        work: Of which they are the results.
        done: Does it for a client, and returns a tree, or several.
        remembered: Clients whose results are kept, as one is often asked for a few times in turn.

    Returns:
        For each of the results a function of the client.
    """
    again = lru_cache(maxsize=remembered)(done)

    def made(part: int, client: int) -> Kept:
        found = again(client)
        results = found if isinstance(found, tuple) else (found,)
        return Kept(results[part], labels(work, {}, results)[part])

    return [partial(made, part) for part in range(work.results or 1)]
