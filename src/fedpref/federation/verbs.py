"""What an algorithm sees of a federation: values that live on clients, and the verbs over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import (
    Any,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import torch

from fedpref.errors import UserError
from fedpref.federation.private_steps import PrivateSteps
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import Shard, Task

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")


ANYTHING = "*"  # a kind that work reads: whatever it is given
COPY, MOMENTS = "copy", "moments"  # kinds: what everybody was sent; what optimisers keep


@dataclass(frozen=True, eq=False)
class Work(Generic[P, R]):
    """A function `(client, *args)` that clients run, and that they find by its name.

    Made by `@work(name)`. Calling it calls the function.
    """

    name: str
    function: Callable[P, R]
    sends: tuple[int, ...]
    tells: tuple[int, ...]
    keeps: Mapping[int, str]
    reads: Mapping[str, str]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    @cached_property
    def results(self) -> int | None:
        """How many values the function returns, as it declares; None where it does not."""
        hint = get_type_hints(self.function).get("return")
        if get_origin(hint) is not tuple:
            return None if hint is None else 1
        kinds = get_args(hint)
        return None if Ellipsis in kinds else len(kinds)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of what follows the client in its arguments."""
        return tuple(inspect.signature(self.function).parameters)[1:]


WORK: dict[str, Work[Any, Any]] = {}


def work(
    name: str,
    *,
    sends: tuple[int, ...] = (0,),
    tells: tuple[int, ...] = (),
    keeps: Mapping[int, str] = MappingProxyType({}),
    reads: Sequence[str] | Mapping[str, str] = (),
) -> Callable[[Callable[P, R]], Work[P, R]]:
    """Register a module-level function `(client, *args)` as work that clients may be asked for.

    What it declares of its results is the whole of what may leave a client; see
    `fedpref.federation.leaving`.

    Args:
        name: What the work is called on the wire, as in `feddpo.train`. It outlives the module's
            path, so that a file can move and sites still know the work.
        sends: Which of the values that the function returns the coordinator may get.
        tells: Which of them neighbours in gossip may get, and the coordinator may not.
        keeps: What kind of value a result is, by its place: a word that other work reads it by.
            What is neither sent nor told stays with its client, whoever asks for it.
        reads: Arguments that may be private though what is made of them is sent or told, by name:
            with the kind that is read there, or as a list of names that are their kinds too.
            Without it, what is made of a private value is private.

    Returns:
        A decorator that turns the function into `Work`.

    Raises:
        TypeError: The function is not at the top of a module, the name is taken, or an argument
            that is read is none of the function's.
    """
    kinds = reads if isinstance(reads, Mapping) else {argument: argument for argument in reads}

    def register(function: Callable[P, R]) -> Work[P, R]:
        where = f"{function.__module__}.{function.__qualname__}"
        if "<locals>" in where:
            raise TypeError(
                f"{where}: work must be a module-level function, so that every process has it"
            )
        known = WORK.get(name)
        # a document or a notebook runs its cell again: the same place may register anew
        if (
            known is not None
            and f"{known.function.__module__}.{known.function.__qualname__}" != where
        ):
            raise TypeError(
                f"{where}: {known.function.__module__} has registered work called {name!r} already"
            )
        made = Work(name, function, sends, tells, keeps, kinds)
        if unknown := sorted(kinds.keys() - set(made.parameters)):
            raise TypeError(f"{where}: it reads {unknown[0]!r}, which is none of its arguments")
        WORK[name] = made
        return made

    return register


def registered(function: Any) -> Work[..., Any]:
    """Return what was passed as work; raises TypeError for a function that is not registered."""
    if not isinstance(function, Work):
        raise TypeError(f"{function!r} is not registered: decorate it with @work(name)")
    return function


class WithheldError(UserError):
    """A client does not give what was asked for; the reason holds nothing of its data."""


class PerClient(Protocol[T]):
    """A value on each client. The algorithm holds a name for it and cannot look inside."""

    def __or__(self, newer: PerClient[T]) -> PerClient[T]:
        """Return the values of `newer`, and for clients that are absent from it those of before."""
        ...


def in_turn(functions: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Yield what each function returns, called in this process."""
    return (function() for function in functions)


@dataclass(frozen=True)
class Client:
    """What a piece of work sees of the client that it runs on.

    Attributes:
        id: The client's number, from 0.
        task: The learning problem, with its model.
        shard: This client's data; its length is the client's weight in means by examples.
        rng: Random numbers of this client, call and round alone.
        round: The round's number, from 0.
        rounds: The number of rounds of the whole run.
        folder: Where what the client keeps in files is written.
        least_examples: Distinct examples behind an update that leaves it, at least.
        least_evaluated: Held-out examples behind its metrics, at least.
        private: What makes its local steps private; None without a promise.
        spread: Calls functions that do not depend on each other, and yields what they return, in
            their order; in several processes where these would else be idle, so that what a
            function changes may be lost.
    """

    id: int
    task: Task
    shard: Shard
    rng: torch.Generator
    round: int
    rounds: int
    folder: Path = Path()
    least_examples: int = 0
    least_evaluated: int = 0
    private: PrivateSteps | None = None
    spread: Callable[[Sequence[Callable[[], Any]]], Iterator[Any]] = in_turn


class Federation(Protocol):
    """Clients, and the verbs over them; one `step` of an algorithm is one round."""

    @property
    def clients(self) -> tuple[int, ...]:
        """All clients, by number."""
        ...

    @property
    def active(self) -> tuple[int, ...]:
        """This round's cohort, in the order of client numbers; everybody during `init`."""
        ...

    @property
    def round(self) -> int:
        """The round's number, from 0."""
        ...

    @property
    def ages(self) -> Mapping[int, int]:
        """How many rounds old what each active client started from is; empty where all wait for
        one another.
        """
        ...

    @property
    def share(self) -> float:
        """The active clients' share of the weight of all that train, newcomers not among them."""
        ...

    # mypy takes the last overload's value for a tuple too, and would call the others unreachable
    @overload
    def each(  # type: ignore[overload-overlap]
        self, work: Work[..., tuple[A, B]], *args: Any
    ) -> tuple[PerClient[A], PerClient[B]]: ...
    @overload
    def each(  # type: ignore[overload-overlap]
        self, work: Work[..., tuple[A, B, C]], *args: Any
    ) -> tuple[PerClient[A], PerClient[B], PerClient[C]]: ...
    @overload
    def each(  # type: ignore[overload-overlap]
        self, work: Work[..., tuple[A, B, C, D]], *args: Any
    ) -> tuple[PerClient[A], PerClient[B], PerClient[C], PerClient[D]]: ...
    @overload
    def each(  # type: ignore[overload-overlap]
        self, work: Work[..., tuple[A, B, C, D, E]], *args: Any
    ) -> tuple[PerClient[A], PerClient[B], PerClient[C], PerClient[D], PerClient[E]]: ...
    @overload
    def each(self, work: Work[..., A], *args: Any) -> PerClient[A]: ...
    def each(self, work: Any, *args: Any) -> Any:
        """Run registered work on each active client.

        Args:
            work: What to run, a function decorated with `@work(...)`.
            *args: What follows the client in its arguments: trees, which are sent to everybody;
                `PerClient` values, of which each client gets its own; plain data, such as frozen
                dataclasses of hyper-parameters.

        Returns:
            What the work returned, as a `PerClient`; a tuple of them where it returns a tuple.
        """
        ...

    def mean(self, values: PerClient[Tree]) -> Tree:
        """Return the weighted mean over the active clients, as it comes through the channel."""
        ...

    def mix(self, values: PerClient[Tree]) -> tuple[PerClient[Tree], PerClient[Tree]]:
        """Send each active client's value to its neighbours, and return the mixed values.

        Returns:
            What each client told, as it arrived, s; and each client's mixed value,
            x_i + sum_j W_ij (s_j - s_i). The mean over clients is that of x, whatever compression
            does to s.
        """
        ...

    def report(self, metrics: PerClient[Mapping[str, float]]) -> Mapping[str, float]:
        """Return scalars over the active clients: means by examples, sums of names in `num_`."""
        ...
