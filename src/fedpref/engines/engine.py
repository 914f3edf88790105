"""What an experiment asks of an engine beyond the verbs of a federation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpref.channel.chain import Chain, Sender
from fedpref.channel.robust import clipped_gossip
from fedpref.engines.private_examples import PrivateExamples, ToldExamples
from fedpref.engines.private_sums import PrivateSums
from fedpref.engines.robust_means import RobustMeans
from fedpref.federation.verbs import Federation, PerClient
from fedpref.numerics import tallies, trees
from fedpref.numerics.tallies import Figure
from fedpref.numerics.trees import Tree

# (round, active clients) -> the mixing matrix over all clients
Mixing = Callable[[int, Sequence[int]], NDArray[np.float64]]
Purpose = Literal["init", "train", "join", "evaluate"]
Telling = Literal["each", "sums", "private", "none"]
"""Of figures: each client's, sums over all, sums with noise, or nothing."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of tensors sent since the round began, over all clients."""

    bytes_up: int = 0
    bytes_down: int = 0
    links: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """Of `bytes_up`, those that a neighbour told another."""

    def __add__(self, other: Traffic) -> Traffic:
        over = {
            link: self.links.get(link, 0) + other.links.get(link, 0)
            for link in self.links.keys() | other.links.keys()
        }
        return Traffic(self.bytes_up + other.bytes_up, self.bytes_down + other.bytes_down, over)

    def metrics(self) -> Mapping[str, float]:
        """Return totals, and for gossip the mean over links and the client that tells most.

        Each direction counts as a link.
        """
        totals: dict[str, float] = {"bytes_up": self.bytes_up, "bytes_down": self.bytes_down}
        if self.links:
            totals["bytes_per_link"] = sum(self.links.values()) / len(self.links)
            by_teller: Counter[int] = Counter()
            for (teller, _), sent in self.links.items():
                by_teller[teller] += sent
            totals["bytes_of_busiest_client"] = max(by_teller.values())
        return totals


def told(sizes: Mapping[int, int], weights: NDArray[np.float64]) -> Traffic:
    """Return the traffic of sending each client's message to every client that weighs it above
    zero.

    Args:
        sizes: Bytes of each client's message.
        weights: The mixing matrix [N, N].
    """
    links = {(i, j): size for i, size in sizes.items() for j in sizes if j != i and weights[j, i]}
    return Traffic(bytes_up=sum(links.values()), links=links)


def everybody(round: int, active: Sequence[int]) -> NDArray[np.float64]:
    """Return a mixing matrix in which all active clients hear one another, with equal weights."""
    count = max(active) + 1
    matrix = np.eye(count)
    matrix[np.ix_(active, active)] = 1 / len(active)
    return matrix


def mixed(
    value: Tree,
    told: Tree | None,
    heard: Iterable[tuple[Tree, float]],
    hostile: float | None = None,
) -> Tree:
    """Return a client's value mixed with what it heard.

    Args:
        value: The client's own.
        told: What it told, as it arrived; None if that is the value unchanged.
        heard: What it heard, itself included, with weights.
        hostile: The weight that may be hostile; None shortens nothing.
    """
    if hostile is not None:
        own = value if told is None else told
        moved = clipped_gossip(own, list(heard), hostile)
        return moved if told is None else trees.add(value, trees.subtract(moved, own))
    mean = trees.total(trees.scale(tree, weight) for tree, weight in heard)
    return mean if told is None else trees.add(value, trees.subtract(mean, told))


def compressed(uplink: Chain, message: Tree, sender: Sender) -> Tree:
    """Return a message as it travels into a mean; figures beside a value stay as they are."""
    if not uplink.stages:
        return message
    value, beside = trees.with_figures(message)
    return {**uplink.encode(value, sender), **beside}


def restored(uplink: Chain, message: Tree) -> Tree:
    """Return what has travelled; raises ValueError where it is not of the form that was agreed."""
    if not uplink.stages:
        return message
    value, beside = trees.with_figures(message)
    try:
        whole = uplink.decode(value, 1)
    # whatever a stage makes of tensors that are not its own
    except (LookupError, RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise ValueError("it is not compressed as was agreed") from error
    if not whole:
        raise ValueError("it is not compressed as was agreed")
    return {**whole, **beside}


def clipped(message: Tree, share: float, most: float) -> tuple[Tree, float]:
    """Return a client's share of a mean, shortened where its value is too long, and the length.

    Figures that travel beside a value have no length, and stay as they are.

    Args:
        message: The value times the client's share.
        share: Its weight in the mean.
        most: The largest norm that a value may have.
    """
    value, beside = trees.with_figures(message)
    length = trees.norm(value) / share if share else 0.0
    if length <= most:
        return message, length
    return {**trees.scale(value, most / length), **beside}, length


class Engine(Federation, Protocol):
    """A federation that can be driven."""

    ages: Mapping[int, int]

    @property
    def traffic(self) -> Traffic:
        """Bytes sent since the phase began."""
        ...

    def begin(self, round: int, cohort: Sequence[int], purpose: Purpose = "train") -> None:
        """Open a phase of a round for some clients.

        Calls and traffic are counted from zero, and random draws are the purpose's own. An engine
        starts in round 0, for everybody, to `init`.
        """
        ...

    @property
    def private(self) -> PrivateSums | None:
        """What keeps the engine's sums private, if they are."""
        ...

    @property
    def examples(self) -> PrivateExamples | ToldExamples | None:
        """What keeps the units of clients' data private, if they are."""
        ...

    @property
    def robust(self) -> RobustMeans | None:
        """What keeps the engine's means robust, if they are."""
        ...

    @property
    def lengths(self) -> Mapping[int, float]:
        """The norm of the longest value that each client sent in the phase, before it was clipped;
        empty without a clip.
        """
        ...

    def disclose(
        self,
        metrics: PerClient[Mapping[str, float]],
        needs: Collection[str] = (),
        one_of: Collection[str] = (),
    ) -> Mapping[int, Mapping[str, float]]:
        """Return each active client's scalars: for the table of an evaluation, never for an
        algorithm.

        Args:
            metrics: What clients measured.
            needs: Metrics that every client must have.
            one_of: Metrics of which every client must have one.
        """
        ...

    @property
    def figures(self) -> Telling:
        """What is told of clients' figures; of `sums` and `none` nobody's own are disclosed."""
        ...

    def tally(self, metrics: PerClient[Mapping[str, float]], place: str) -> Mapping[str, Figure]:
        """Return what the active clients' figures come to, by name; nothing where that is lost.

        Args:
            metrics: What clients measured.
            place: Which of a round's figures they are, such as "conclude".
        """
        ...

    def having(self, values: Sequence[PerClient[Tree]]) -> Sequence[int]:
        """Return the clients of whose values any is not what it was in the beginning, where there
        are many; of few clients all.
        """
        ...

    def save(self, values: Mapping[str, PerClient[Tree]], folder: Path) -> None:
        """Let every client write its values, by name, to files of its own.

        Args:
            values: By field of the state.
            folder: The checkpoint, among others of the run; hidden while it is not whole.
        """
        ...

    def load(self, folder: Path, names: Sequence[str]) -> Mapping[str, PerClient[Tree]]:
        """Return what `save` wrote, of the clients that have written."""
        ...

    @property
    def left_out(self) -> Mapping[int, str]:
        """Clients of the round that were lost on the way, each with the reason."""
        ...

    def close(self) -> None:
        """End what was begun for the engine."""
        ...


def share_of(
    weights: Mapping[int, float],
    examples: Mapping[int, float],
    active: Sequence[int],
    newcomers: Collection[int],
) -> float:
    """Return the active clients' share of the weight of all that have data to train on.

    Args:
        weights: Of each client.
        examples: Each client's number of training examples.
        active: Who takes part.
        newcomers: Who joins after training.
    """
    total = sum(w for i, w in weights.items() if examples[i] and i not in newcomers)
    return sum(weights[i] for i in active) / total if total else 0.0


def weighted_report(
    reports: Mapping[int, Mapping[str, float]], weights: Mapping[int, float]
) -> Mapping[str, float]:
    """Return scalars over the clients that tell them: weighted means, and sums of those named
    `num_`.
    """
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for metrics in reports.values() for name in metrics):
        told = {client: metrics[name] for client, metrics in reports.items() if name in metrics}
        is_sum = name.startswith("num_")
        total = 1.0 if is_sum else sum(weights[client] for client in told)
        result[name] = sum(
            (1.0 if is_sum else weights[client] / total) * value for client, value in told.items()
        )
    return result


def figures_of(
    rows: Mapping[int, Mapping[str, float]], weights: Mapping[int, float]
) -> Mapping[str, Figure]:
    """Return what clients' rows come to, each weighed by the examples that it is of.

    Args:
        rows: By client.
        weights: Each client's number of training examples, for rows that do not say theirs.
    """
    weighed = [row.get("num_examples", weights[client]) for client, row in rows.items()]
    return tallies.read(tallies.tally(list(rows.values()), weighed))


def hostile_weight(distrust: float | None, own: float) -> float | None:
    """Return which weight may be hostile, of that which a client gives to others; None for none.

    Args:
        distrust: The share.
        own: The weight that the client gives to itself.
    """
    return None if distrust is None else distrust * (1 - own)
