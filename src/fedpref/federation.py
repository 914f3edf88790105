"""What an algorithm sees of a federation: values that live on clients, and five verbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fedpref.tasks.task import Shard, Task
from fedpref.trees import Tree

T = TypeVar("T")
S = TypeVar("S")
W = TypeVar("W", bound=Callable[..., Any])

WORK: dict[str, Callable[..., Any]] = {}
SENDS: dict[str, tuple[int, ...]] = {}


def work(*, sends: tuple[int, ...] = (0,)) -> Callable[[W], W]:
    """Register a module-level function `work(client, *args)` under its name, by which a client looks it up.

    `sends`: which parts of what it returns may leave the client; nothing else does, whoever asks.
    """

    def register(function: W) -> W:
        name = f"{function.__module__.removeprefix('fedpref.')}.{function.__qualname__}"
        if "<locals>" in name:
            raise TypeError(f"{name}: work must be a module-level function, so that every client can find it by its name")
        if name in WORK and WORK[name].__module__ != function.__module__:
            raise TypeError(f"{name}: {WORK[name].__module__} has registered work of this name already; give the module another name")
        WORK[name], SENDS[name] = function, sends
        return function

    return register


def name_of(function: Callable[..., Any]) -> str:
    """The registered name of a piece of work."""
    for name, registered in WORK.items():
        if registered is function:
            return name
    raise TypeError(f"{function!r} is not registered: decorate it with @work()")


class PerClient(Protocol[T]):
    """A value on each client, for which the algorithm holds a name and nothing else."""

    def __or__(self, newer: PerClient[T]) -> PerClient[T]:
        """Take what is in `newer`; clients absent from it keep what they had."""
        ...


@dataclass(frozen=True)
class Client:
    """What a piece of work sees of the client it runs on."""

    id: int
    task: Task
    shard: Shard  # this client's data; len() is its weight
    rng: torch.Generator
    round: int  # from 0
    rounds: int  # of the whole run
    folder: Path = Path()  # where what a client keeps in files is written


class Federation(Protocol):
    """Clients and the verbs over them; one `step` of an algorithm is one round."""

    @property
    def clients(self) -> tuple[int, ...]: ...

    @property
    def active(self) -> tuple[int, ...]:
        """This round's cohort, in the order of client ids; everybody during `init`."""
        ...

    @property
    def round(self) -> int: ...

    def each(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run registered work on each active client.

        `args` are trees (sent to everyone), `PerClient` values (each client sees its own), and plain data such as frozen
        dataclasses of hyper-parameters. The result is a `PerClient`, or a tuple of them where the work returns a tuple.
        """
        ...

    def mean(self, values: PerClient[Tree]) -> Tree:
        """The weighted mean over the active clients, through the channel."""
        ...

    def mix(self, values: PerClient[Tree]) -> tuple[PerClient[Tree], PerClient[Tree]]:
        """What each active client told its neighbours, as it arrives, and its value mixed with theirs.

        Mixed is x_i + sum_j W_ij (s_j - s_i) of what was told, s: the mean over clients is preserved whatever the way does to messages.
        """
        ...

    def report(self, metrics: PerClient[Mapping[str, float]]) -> Mapping[str, float]:
        """Scalars of the active clients: means weighted by examples; names that begin with `num_` are summed."""
        ...


class Algorithm(Protocol[S]):
    """A frozen dataclass of hyper-parameters with a short program over a federation."""

    pooled: bool  # a reference line that needs all training data in one place

    def init(self, fed: Federation, start: Tree) -> S:
        """The state before the first round: a frozen dataclass of `Tree` and `PerClient[Tree]` fields."""
        ...

    def step(self, fed: Federation, state: S) -> tuple[S, Mapping[str, float]]:
        """One round."""
        ...

    def join(self, fed: Federation, state: S, steps: int) -> S:
        """Let the active clients, who took no part in training, make what is their own beside what is shared, in so many local steps."""
        ...

    def model(self, state: S) -> tuple[Tree | PerClient[Tree], ...]:
        """The parts that together are each client's model: what is a `Tree` is shared, what is `PerClient` is private."""
        ...
