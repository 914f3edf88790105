"""What a site brings to an experiment, who decides it, and what it lets be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedpref.channel import Chain
from fedpref.engines.site_privacy import SitePrivacy
from fedpref.privacy import Masks
from fedpref.tasks.task import Task


@dataclass(frozen=True)
class Bounds:
    """What a site lets be asked of it, whatever the experiment says; None is no bound.

    Attributes:
        message: Bytes of a message.
        memory: Bytes of the values that lie here for a coordinator.
        disk: Bytes of the site's folder of runs.
        calls: Calls of work for a client in one phase of a round.
        seconds: Of work in one phase of a round, after which no more is begun.
        openings: How often a run may be opened.
        examples: Distinct examples behind an update that leaves a client, at least.
        evaluated: Held-out examples behind its metrics, at least.
        check: Raises RefusedError for a plain argument of work, in a phase of a purpose, that the
            experiment does not have.
    """

    message: int | None = None
    memory: int | None = None
    disk: int | None = None
    calls: int | None = None
    seconds: float | None = None
    openings: int | None = None
    examples: int = 0
    evaluated: int = 0
    check: Callable[[Any, str], None] = lambda value, purpose: None


@dataclass(frozen=True)
class Hosted:
    """What a site brings to an experiment: the task, its clients' data, and what may be asked of
    them.
    """

    task: Task
    shards: Mapping[str, Any]
    """Client's name -> shard."""
    about: Mapping[str, Mapping[str, Any]]
    """Client's name -> sizes, a digest, its number where all sites count alike."""
    seed: int
    rounds: int
    links: Chain = Chain()
    uplink: Chain = Chain()
    does: Callable[[str, str], bool] = lambda work, purpose: True
    """Whether a piece of work may be asked for, in a phase of that purpose."""
    gives: Callable[[str], bool] = lambda name: True
    """Whether a tensor of this name may leave."""
    bounds: Bounds = Bounds()
    privacy: Callable[[Mapping[int, str], int, int, Path], SitePrivacy | None] = lambda *_: None
    """(names of the clients here by number, how many clients and how many sites there are, the
    folder of all runs) -> what is promised of them."""

    masks: Masks | None = None
    """What sums are masked by; None where the coordinator sees clients' parts of them."""
    gossips: bool = False
    """Whether neighbours are told of clients' values."""
    means: int = 1
    """How many sums a round has."""
    distrust: float | None = None
    """The share of neighbours' weight that may be hostile; None hears all as they are."""
    is_silent: bool = False
    """Whether nothing is told of clients' figures."""


@dataclass(frozen=True)
class HeldOut:
    """What a site says of its prompts that are held out.

    Attributes:
        held_out: A keyed hash of each, for sites to compare.
        is_keyed: Whether the site has the key.
        has_sides: Whether its data say themselves what is held out, in place of the common rule.
    """

    held_out: Sequence[str] = ()
    is_keyed: bool = True
    has_sides: bool = False


SETTLED = "data.json"  # in the folder of a run: which of a site's data it goes on with


class Host(Protocol):
    """Who decides what a site brings to an experiment."""

    def consent(self, experiment: Any) -> None:
        """Raise RefusedError where the site takes no part in an experiment.

        Args:
            experiment: As plain data, from the coordinator.
        """
        ...

    def held_out(self, experiment: Any, everything: bool) -> HeldOut:
        """Return what tells prompts that are held out here.

        Args:
            experiment: As plain data, from the coordinator.
            everything: All of them; otherwise those alone that no common rule decides.

        Raises:
            RefusedError: The site does not consent to the experiment.
            UserError: The site cannot do it.
        """
        ...

    def host(self, experiment: Any, folder: Path, held_out: Collection[str] = ()) -> Hosted:
        """Return what the site brings.

        Args:
            experiment: As plain data, from the coordinator.
            folder: Where the site keeps its side of the run.
            held_out: What tells prompts that are held out anywhere, which are not trained on.

        Raises:
            RefusedError: The site does not consent to it.
            UserError: The site cannot do it.
        """
        ...


class Peers(Protocol):
    """A site's way to other sites."""

    def tell(self, site: str, message: bytes) -> None:
        """Send a message, without waiting for an answer."""
        ...
