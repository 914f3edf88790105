"""What an algorithm sees of a federation: values that live on clients, and the verbs over them."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, Protocol, TypeVar, overload

import torch

from fedpref.numerics.trees import Tree
from fedpref.tasks.task import Shard, Task, TaskSettings

if TYPE_CHECKING:
    from fedpref.federation.aggregation import Aggregate
    from fedpref.federation.local_training import LocalTraining
    from fedpref.models.own_parts import Parts

T = TypeVar("T")
S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")


@dataclass(frozen=True, eq=False)
class Work(Generic[P, R]):
    """A function `(client, *args)` that clients run, and that they find by its name.

    Made by `@work(name)`. Calling it calls the function.
    """

    name: str
    function: Callable[P, R]
    sends: tuple[int, ...]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)


WORK: dict[str, Work[Any, Any]] = {}


def work(name: str, *, sends: tuple[int, ...] = (0,)) -> Callable[[Callable[P, R]], Work[P, R]]:
    """Register a module-level function `(client, *args)` as work that clients may be asked for.

    Args:
        name: What the work is called on the wire, as in `feddpo.train`. It outlives the module's
            path, so that a file can move and sites still know the work.
        sends: Which of the values that the function returns may leave the client; all others stay,
            whoever asks for them.

    Returns:
        A decorator that turns the function into `Work`.

    Raises:
        TypeError: The function is not at the top of a module, or the name is taken.
    """

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
        WORK[name] = made = Work(name, function, sends)
        return made

    return register


def registered(function: Any) -> Work[..., Any]:
    """Return what was passed as work; raises TypeError for a function that is not registered."""
    if not isinstance(function, Work):
        raise TypeError(f"{function!r} is not registered: decorate it with @work(name)")
    return function


class PerClient(Protocol[T]):
    """A value on each client. The algorithm holds a name for it and cannot look inside."""

    def __or__(self, newer: PerClient[T]) -> PerClient[T]:
        """Return the values of `newer`, and for clients that are absent from it those of before."""
        ...


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
    """

    id: int
    task: Task
    shard: Shard
    rng: torch.Generator
    round: int
    rounds: int
    folder: Path = Path()


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
        """Let each active client tell its value to its neighbours, and mix it with theirs.

        Returns:
            What each client told, as it arrived, s; and each client's mixed value,
            x_i + sum_j W_ij (s_j - s_i). The mean over clients is that of x, whatever compression
            does to s.
        """
        ...

    def report(self, metrics: PerClient[Mapping[str, float]]) -> Mapping[str, float]:
        """Return scalars over the active clients: means by examples, sums of names in `num_`."""
        ...


class Algorithm(ABC, Generic[S]):
    """A short program over a federation: a frozen dataclass whose fields are its hyper-parameters.

    The class variables say what an experiment must know before it runs; each is off unless an
    algorithm turns it on. A class variable that is not declared here is an error when the class is
    made, so that a misspelt one cannot be silently off.
    """

    name: str

    works: ClassVar[tuple[Work[..., Any], ...]] = ()
    """What it runs on clients; a site that consents to the algorithm consents to exactly these."""
    pools_data: ClassVar[bool] = False
    """A baseline that needs all training data in one place."""
    gossips: ClassVar[bool] = False
    """Clients tell neighbours what they learn, over the experiment's network."""
    needs_fixed_network: ClassVar[bool] = False
    """The same neighbours, and everybody, in every round."""
    adapts: ClassVar[bool] = False
    """It is about the factors of a LoRA adapter, whatever aggregates them."""
    keeps_critics: ClassVar[bool] = False
    """Clients keep critics beside the adapter, as PPO needs them."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        known = vars(Algorithm).keys() | inspect.get_annotations(Algorithm).keys()
        hints = inspect.get_annotations(cls)
        declared = [name for name, hint in hints.items() if "ClassVar" in str(hint)]
        declared += [k for k, v in vars(cls).items() if isinstance(v, bool) and k not in hints]
        bare = [
            k for k in hints if k not in vars(cls) and isinstance(vars(Algorithm).get(k), property)
        ]
        if bare:
            raise TypeError(f"{cls.__name__}.{bare[0]}: give it a default; Algorithm reads it")
        for name in declared:
            if name not in known:
                near = difflib.get_close_matches(name, sorted(known), 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{cls.__name__}.{name}: Algorithm declares no such flag.{hint}")

    @property
    @abstractmethod
    def local(self) -> LocalTraining:
        """How a client trains within a round."""

    @property
    def aggregate(self) -> Aggregate | None:
        """How adapters become one; None where the algorithm leaves no choice."""
        return None

    @property
    def parts(self) -> Parts | None:
        """What of the model is each client's own; None where nothing is."""
        return None

    @property
    def preference(self) -> tuple[float, ...] | None:
        """A preference over the task's objectives; None where the algorithm knows none."""
        return None

    @property
    def weighs_clients(self) -> bool:
        """Whether the algorithm weighs clients itself, so that `federation.weighting` must not."""
        return False

    def check_task(self, task: TaskSettings) -> None:
        """Raise UserError where the algorithm does not fit the task or its objectives."""

    def check_clients(self, names: tuple[str, ...]) -> None:
        """Raise UserError where the algorithm's settings name clients that are not these."""

    @abstractmethod
    def init(self, fed: Federation, start: Tree) -> S:
        """Return the state before the first round, a frozen dataclass.

        Args:
            fed: All clients.
            start: The task's fresh parameters, the same for everybody.

        Returns:
            A dataclass with fields of `Tree`, which are shared, and `PerClient[Tree]`, which are
            private. Whatever must survive a round is in it.
        """

    @abstractmethod
    def step(self, fed: Federation, state: S) -> tuple[S, Mapping[str, float]]:
        """Do one round with the active clients; return the next state and the round's metrics."""

    def join(self, fed: Federation, state: S, steps: int) -> S:
        """Return the state in which clients that did not train have what is their own.

        Args:
            fed: The clients that join.
            state: After training.
            steps: Local steps that they may take.

        Returns:
            By default the state as it is: nothing is a client's own, or there is no neighbour to
            take it from.
        """
        return state

    @abstractmethod
    def model(self, state: S) -> tuple[Tree | PerClient[Tree], ...]:
        """Return the parts that together are each client's model: shared trees, private values."""
