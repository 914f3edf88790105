"""All clients on this machine, over one copy of the model, in this process or in workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedpref.channel import Chain, Sender
from fedpref.channel.lattice import fixed, unfixed
from fedpref.engines.engine import (
    Mixing,
    Purpose,
    Telling,
    Traffic,
    clipped,
    compressed,
    everybody,
    figures_of,
    hostile_weight,
    mixed,
    restored,
    share_of,
    told,
    weighted_report,
)
from fedpref.engines.forks import forked
from fedpref.engines.gold import Gold, learned_here, told_first
from fedpref.engines.many import MANY, opened, when_needed
from fedpref.engines.per_client import Others, StoredValues, gather, stored
from fedpref.engines.private_examples import PrivateExamples
from fedpref.engines.private_sums import PrivateSums
from fedpref.engines.robust_means import RobustMeans
from fedpref.engines.store import Store
from fedpref.engines.values import Kept
from fedpref.engines.workers import Workers
from fedpref.errors import UserError
from fedpref.federation.leaving import Audience, Label, labels
from fedpref.federation.verbs import WORK, Client, PerClient, in_turn, registered
from fedpref.numerics import seeds, trees
from fedpref.numerics.tallies import Figure
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import Shard, Task

Turned = Callable[[Mapping[int, Tree], Tree], Mapping[int, Tree]]
"""(values by client, what everybody was sent last) -> what clients send, hostile ones too."""


class Simulation:
    """The federation on one machine; see `Federation` and `Engine` for what the methods promise.

    Args:
        task: The learning problem.
        shards: Each client's data.
        seed: The root of all random draws.
        rounds: Of the whole run.
        weighting: What a client's weight in means is by.
        links: Stages on the way to a neighbour.
        uplink: Stages on the way into a mean that are undone before it, message by message.
        newcomers: Clients that do not train, but join afterwards.
        mixing: The mixing matrix of a round.
        workers: Processes; 1 computes in this one.
        spill_above_mb: MB of a value that stay in memory; the rest goes to files.
        folder: Where what clients keep in files goes.
        clip: The largest norm of what a client sends for a mean; longer ones are shortened.
        private: What keeps sums private, if they are.
        examples: What keeps the units of clients' data private, if they are.
        as_integers: Sum integers, as sites do under masks; here there is nobody to hide from.
        figures: What is told of clients' figures.
        robust: What keeps means robust, if they are.
        gold: Pairs with which clients' changes are compared, if there are any.
        distrust: The share of neighbours' weight that may be hostile; None hears all as they are.
        attack: What hostile clients make of what they send.
    """

    def __init__(
        self,
        task: Task,
        shards: Sequence[Shard],
        *,
        seed: int,
        rounds: int,
        weighting: Literal["examples", "equal"] = "examples",
        newcomers: Collection[int] = (),
        links: Chain = Chain(),
        uplink: Chain = Chain(),
        mixing: Mixing = everybody,
        workers: int = 1,
        spill_above_mb: int = 512,
        folder: Path = Path(),
        clip: float | None = None,
        private: PrivateSums | None = None,
        examples: PrivateExamples | None = None,
        as_integers: bool = False,
        figures: Telling = "each",
        robust: RobustMeans | None = None,
        gold: Gold | None = None,
        distrust: float | None = None,
        attack: Turned | None = None,
    ) -> None:
        self.robust, self._distrust, self._attack, self._gold = robust, distrust, attack, gold
        self._told: Tree = {}  # what everybody was sent last
        self._as_integers, self.figures = as_integers, figures
        self.private, self.examples = private, examples
        # gold pairs are learned from as if they were one more client's
        self._task, self._shards = task, (*shards, *([gold.shard] if gold else []))
        self._seed, self._rounds, self._folder = seed, rounds, folder
        self._uplink = uplink
        self._links, self._mixing, self._room = links, mixing, spill_above_mb * 10**6
        self._weights = {
            i: float(len(shard)) if weighting == "examples" else 1.0
            for i, shard in enumerate(shards)
        }
        self._newcomers, self._clip = frozenset(newcomers), clip
        self._store: Store | None = None
        self._examples = {i: float(len(shard)) for i, shard in enumerate(shards)}
        self.clients = tuple(range(len(shards)))
        self._workers = Workers(workers, self._job, task.move_to) if workers > 1 else None
        self._processes = workers
        if not self._workers:
            task.move_to(0)
        self.begin(0, self.clients, "init")

    def begin(self, round: int, cohort: Sequence[int], purpose: Purpose = "train") -> None:
        self.round, self._purpose = round, purpose
        self.active = tuple(cohort)
        self.traffic, self._calls = Traffic(), 0
        self.lengths: dict[int, float] = {}
        self.ages: Mapping[int, int] = {}
        if self.robust is not None:
            self.robust.begin()

    @property
    def share(self) -> float:
        if self.private is not None:  # whoever came
            return self.private.chance
        return share_of(self._weights, self._examples, self.active, self._newcomers)

    def each(self, work: Callable[..., Any], *args: Any) -> Any:
        # what everybody is told; what is a client's own does not travel
        sent = sum(trees.size(arg) for arg in args if isinstance(arg, Mapping))
        self.traffic += Traffic(bytes_down=sent * len(self.active))
        self._calls += 1
        if self._attack is not None or self._gold is not None:
            self._told = told_first(args)
        is_alike = not any(isinstance(arg, StoredValues) for arg in args)
        if self._purpose == "init" and is_alike and len(self.active) > MANY:
            return self._when_needed(work, args)
        # sent to each worker once; a client's own arguments go with its job
        common = {k: arg for k, arg in enumerate(args) if not isinstance(arg, StoredValues)}
        columns = {k: arg for k, arg in enumerate(args) if isinstance(arg, StoredValues)}
        # workers for which there is no client help the others
        each = max(1, self._processes // max(1, len(self.active)))
        shared = (registered(work).name, self._purpose, self.round, self._calls, each, common)
        own = ((i, {k: column[i] for k, column in columns.items()}) for i in self.active)
        run = self._workers.run if self._workers else self._run_here

        def label(client: int, results: Sequence[Any]) -> Sequence[Label]:
            given = {k: column.label(client) for k, column in columns.items()}
            return labels(registered(work), given, results)

        return gather(run(shared, own), self._room, label, registered(work).results)

    def _when_needed(self, work: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Return what clients have before the first round, each made when it is asked for."""
        common = dict(enumerate(args))
        shared = (registered(work).name, self._purpose, self.round, self._calls, 1, common)
        columns = [
            StoredValues[Any](self._room, (), Others(self.active, made))
            for made in when_needed(registered(work), lambda i: self._job(i, shared, {}))
        ]
        return columns[0] if len(columns) == 1 else tuple(columns)

    def _run_here(self, shared: Any, own: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        return ((i, self._job(i, shared, values)) for i, values in own)

    def _job(
        self,
        i: int,
        shared: tuple[str, str, int, int, int, Mapping[int, Any]],
        own: Mapping[int, Any],
    ) -> Any:
        """Do one client's part of `each`, in whichever process.

        Arguments are numbered: `shared` has those in common, `own` the client's.
        """
        work, purpose, round, call, processes, common = shared
        # by address, not by turn: whoever computes it, and in whatever order, draws the same
        # numbers
        rng = seeds.generator(self._seed, purpose, round=round, call=call, client=i)
        spread = partial(forked, processes) if processes > 1 else in_turn
        is_private = self.examples is not None and purpose == "train"
        private = self.examples.of(i, round, call) if self.examples and is_private else None
        client = Client(
            i,
            self._task,
            # what a client has in the beginning is seldom of its data
            self._shards[i] if purpose == "init" else opened(self._shards[i]),
            rng,
            round,
            self._rounds,
            self._folder,
            private=private,
            spread=spread,
        )
        args = {**common, **own}
        result = WORK[work](client, *(args[k] for k in sorted(args)))
        if private is not None:
            private.settle()
        return result

    @property
    def left_out(self) -> Mapping[int, str]:
        return {}

    def close(self) -> None:
        """End the worker processes."""
        if self._workers:
            self._workers.close()

    def mean(self, values: PerClient[Tree]) -> Tree:
        self._calls += 1
        column = self._turned(stored(values), Audience.COORDINATOR)
        if self.robust is not None and self._purpose == "train":
            total = sum(self._weights[i] for i in self.active)
            all_values = {i: column.leaving(i, Audience.COORDINATOR) for i in self.active}
            self.traffic += Traffic(bytes_up=sum(map(trees.size, all_values.values())))
            shares = {i: self._weights[i] / total for i in self.active}
            learn = self._learn_gold if self._gold else None
            return self.robust.mean(all_values, shares, learn)
        if self.private is not None:
            return self._private_mean(self.private, column)
        total = sum(self._weights[i] for i in self.active)
        if self._as_integers:
            return self._integer_mean(column, total)

        uplink = self._uplink if self._purpose == "train" else Chain()

        def messages() -> Iterator[Tree]:
            for i in self.active:
                rng = seeds.generator(
                    self._seed, "channel", round=self.round, call=self._calls, client=i
                )
                value = column.leaving(i, Audience.COORDINATOR)
                message = trees.scale(value, self._weights[i] / total)
                message = compressed(uplink, message, Sender(i, self.round, rng))
                self.traffic += Traffic(bytes_up=trees.size(message))
                message = restored(uplink, message)
                if self._clip is not None and self._purpose == "train":
                    share = self._weights[i] / total
                    message, length = clipped(message, share, self._clip)
                    self.lengths[i] = max(length, self.lengths.get(i, 0.0))
                yield message

        # in client order, whichever worker was first, so that the sum has the same bits anywhere
        return trees.total(messages())

    def _learn_gold(self, names: Sequence[str]) -> Tree:
        """Return what gold pairs teach in this round."""
        assert self._gold is not None
        number = len(self.clients)
        if not self._workers:
            place = (number, self.round, self._rounds)
            return learned_here(self._gold, self._task, self._seed, place, self._told, names)
        common = {0: self._told, 1: list(names), 2: self._gold.local}
        shared = ("gold.learn", "gold", self.round, 0, 1, common)
        ((_, change),) = self._workers.run(shared, [(number, {})])
        found: Tree = change
        return found

    def _turned(self, column: StoredValues[Tree], audience: Audience) -> StoredValues[Tree]:
        """Return what clients send, the hostile ones among them."""
        if self._attack is None or self._purpose != "train":
            return column
        values = {i: column.leaving(i, audience) for i in self.active}
        sent = self._attack(values, self._told)
        labelled = {i: column.label(i) for i in self.active}
        return StoredValues(self._room, ((i, Kept(sent[i], labelled[i])) for i in self.active))

    def _integer_mean(self, column: StoredValues[Tree], total: float) -> Tree:
        """Return the mean of clients' values by a sum of integers."""

        def messages() -> Iterator[Tree]:
            for i in self.active:
                value = column.leaving(i, Audience.COORDINATOR)
                try:
                    fixed(value)  # before it is scaled too, as sites see to it
                    message = fixed(trees.scale(value, self._weights[i] / total))
                except ValueError as error:
                    raise UserError(f"secrecy: client {i}: {error}.") from error
                self.traffic += Traffic(bytes_up=trees.size(message))
                yield {name: tensor.long() for name, tensor in message.items()}

        return unfixed(trees.total(messages()))

    def _private_mean(self, private: PrivateSums, column: StoredValues[Tree]) -> Tree:
        """Return the mean of clients' changes with noise, whoever came."""
        if self._purpose != "train":
            raise ValueError(f"no sum is private in the phase to {self._purpose}")

        def messages() -> Iterator[Tree]:
            for i in self.active:
                value = column.leaving(i, Audience.COORDINATOR)
                message = private.encode(value, i, self.round, self._calls)
                self.traffic += Traffic(bytes_up=trees.size(message))
                yield message

        return private.release(messages(), self.round, self._calls)

    def mix(self, values: PerClient[Tree]) -> tuple[PerClient[Tree], PerClient[Tree]]:
        self._calls += 1
        weights = self._mixing(self.round, self.active)
        told_by, sizes, arrived = (
            self._turned(stored(values), Audience.NEIGHBOURS),
            {},
            StoredValues[Tree](self._room),
        )
        labelled = {i: told_by.label(i).mixed for i in self.active}
        for i in self.active:
            rng = seeds.generator(
                self._seed, "channel", round=self.round, call=self._calls, client=i
            )
            value = told_by.leaving(i, Audience.NEIGHBOURS)
            message = self._links.encode(value, Sender(i, self.round, rng))
            sizes[i] = trees.size(message)
            arrived.put(i, Kept(self._links.decode(message, 1), labelled[i]))
        self.traffic += told(sizes, weights)

        def mixture(i: int) -> Kept:
            heard = ((arrived[j], float(weights[i, j])) for j in self.active if weights[i, j])
            told = arrived[i] if self._links.stages else None
            hostile = hostile_weight(self._distrust, float(weights[i, i]))
            value = mixed(told_by[i], told, heard, hostile)
            return Kept(value, labelled[i])

        return arrived, StoredValues(self._room, ((i, mixture(i)) for i in self.active))

    def report(self, metrics: PerClient[Mapping[str, float]]) -> Mapping[str, float]:
        if self.figures in ("private", "none"):
            return {}
        return weighted_report(self.disclose(metrics), self._examples)

    def disclose(
        self,
        metrics: PerClient[Mapping[str, float]],
        needs: Collection[str] = (),
        one_of: Collection[str] = (),
    ) -> Mapping[int, Mapping[str, float]]:
        column = stored(metrics)
        return {i: column.leaving(i, Audience.COORDINATOR) for i in self.active}

    def tally(self, metrics: PerClient[Mapping[str, float]], place: str) -> Mapping[str, Figure]:
        return figures_of(self.disclose(metrics), self._examples)

    def having(self, values: Sequence[PerClient[Tree]]) -> Sequence[int]:
        drawn = [set(one.kept) for one in map(stored, values) if one.others is not None]
        return sorted(set[int]().union(*drawn)) if drawn else self.clients

    def save(self, values: Mapping[str, PerClient[Tree]], folder: Path) -> None:
        kept = {field: stored(value).kept for field, value in values.items()}
        self._store_in(folder.parent).save(folder, folder.name.removeprefix("."), kept)

    def load(self, folder: Path, names: Sequence[str]) -> Mapping[str, PerClient[Tree]]:
        store = self._store_in(folder.parent)
        store.tidy()
        return {
            field: StoredValues(self._room, kept.items())
            for field, kept in store.load(folder, names).items()
        }

    def _store_in(self, folder: Path) -> Store:
        """Return the store of a folder of checkpoints, the same as long as that is."""
        if self._store is None or self._store.folder != folder:
            self._store = Store(folder)
        return self._store
