"""The base of every algorithm: what it is, what it runs on clients, and its program."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from fedpref import config
from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.local_training import LocalTraining, joining
from fedpref.federation.verbs import Federation, PerClient, Work
from fedpref.models.own_parts import Parts
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import TaskSettings

S = TypeVar("S")


class Algorithm(ABC, Generic[S]):
    """A short program over a federation: a frozen dataclass whose fields are its hyper-parameters.

    The class variables say what an experiment must know before it runs; all but `starts_alike` are
    off by default. A class variable that is not declared here is a TypeError when the class is
    made, so that a misspelt one is noticed.
    """

    name: str

    works: ClassVar[tuple[Work[..., Any], ...]] = ()
    """What it runs on clients; a site that consents to the algorithm consents to exactly these."""
    sends_nothing: ClassVar[bool] = False
    """Clients send nothing, not even to neighbours."""
    pools_data: ClassVar[bool] = False
    """A baseline that needs all training data in one place."""
    waits_for_nobody: ClassVar[bool] = False
    """Clients may have started from parameters that are some rounds old."""
    starts_alike: ClassVar[bool] = True
    """In a round clients begin from the same parameters: none have been under way for longer than
    others, or keep a factor of their own of what is shared."""
    gossips: ClassVar[bool] = False
    """Clients tell neighbours what they learn, over the experiment's network."""
    tells_models: ClassVar[bool] = False
    """Neighbours tell one another models, not changes."""
    clips_gossip: ClassVar[bool] = False
    """What neighbours tell may be shortened: nothing is kept of it over rounds."""
    needs_fixed_network: ClassVar[bool] = False
    """It needs the same graph, and all clients, in every round."""
    needs_contraction: ClassVar[bool] = False
    """What compression loses is told later, which converges only if it always loses less than it
    was given."""
    adapts: ClassVar[bool] = False
    """It works on the factors of a LoRA adapter, whatever aggregates them."""
    keeps_critics: ClassVar[bool] = False
    """Clients keep critics beside the adapter, as PPO needs them."""
    sums: ClassVar[int] = 0
    """How many sums of clients' changes a round has, each of trees like `sent`, where these are all
    that clients send: a guarantee of privacy counts them. Zero is an algorithm of which that is not
    known."""
    sums_apart: ClassVar[bool] = False
    """Its sums have a part for each of several groups of clients, and tell how large these are: a
    group of one client is not hidden in them."""
    sends_local_steps: ClassVar[bool] = False
    """All that clients send or tell comes of the steps of `train_locally` alone, so that private
    steps make it private."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        known = vars(Algorithm).keys() | inspect.get_annotations(Algorithm).keys()
        hints = inspect.get_annotations(cls)
        declared = [name for name, hint in hints.items() if "ClassVar" in str(hint)]
        declared += [
            k for k, v in vars(cls).items() if isinstance(v, int) and k not in hints and k[0] != "_"
        ]
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
    def compression(self) -> Mapping[str, Any] | None:
        """Settings of how clients' changes are compressed, by an algorithm that sends later what
        that loses; None where all is sent.
        """
        return None

    @property
    def noisy_steps(self) -> int:
        """The steps of a round that a client takes on its data and that reach others."""
        return self.local.steps

    @property
    def means(self) -> int:
        """How many means over clients a round has at most."""
        return max(1, self.sums) * (self.aggregate.means if self.aggregate else 1)

    def sent(self, start: Tree) -> Tree:
        """Return the part of the parameters whose changes a round's sums are of.

        Args:
            start: The task's fresh parameters.
        """
        return self.aggregate.split(start)[0] if self.aggregate else start

    @property
    def parts(self) -> Parts | None:
        """What of the model is each client's own; None where nothing is."""
        return None

    @property
    def shares_parts_once(self) -> bool:
        """Whether a mean over clients of something of their own begins a run, beside its sums."""
        return False

    @property
    def preference(self) -> tuple[float, ...] | None:
        """A preference over the task's objectives; None where the algorithm knows none."""
        return None

    @property
    def weighs_clients(self) -> bool:
        """Whether the algorithm weighs clients itself, so that `federation.weighting` must not."""
        return False

    def given(self, join_steps: int) -> tuple[Any, ...]:
        """Return the plain data that its works may be given; a site takes no other.

        By default these are the algorithm itself, all that its settings consist of, and the local
        settings with which clients join.
        """
        # also what is no field: the only choice there is, and what consensus errors are of
        known = [*config.parts((self, self.parts, self.aggregate, Factors()))]
        known += [joining(local, join_steps) for local in known if isinstance(local, LocalTraining)]
        return tuple(known)

    def check_task(self, task: TaskSettings) -> None:
        """Raise UserError where the algorithm does not fit the task or its objectives."""

    def refuse_unused(self) -> None:
        """Raise UserError where a setting would do nothing."""

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
