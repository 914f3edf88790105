"""A site at work: the clients that it hosts, and what it does when a coordinator asks."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from pydantic import TypeAdapter
from torch import Tensor

from fedpref.channel import Chain, Sender
from fedpref.channel.compression import alike
from fedpref.engines.engine import mixed
from fedpref.engines.messages import (
    NO_TENSORS,
    Header,
    RefusedError,
    finite,
    pack,
    refuse_other_format,
    unpack,
    version,
)
from fedpref.engines.workers import one_thread
from fedpref.errors import UserError
from fedpref.federation.verbs import WORK, Client
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import Task

RUN = re.compile(r"\w[\w.-]{0,99}(/\w[\w.-]{0,99}){0,3}")
CHECKPOINTS, AHEAD = 2, 4  # that are kept, and messages of a site that may lie here unread
# what may be told has another name in a checkpoint
TELLABLE, PRIVATE = ".told.safetensors", ".safetensors"
LOG = logging.getLogger("fedpref")
Answer = tuple[Header, Tree]


def _failed(error: Exception) -> str:
    """Return what others are told of an error: no text of it, which may hold somebody's data."""
    LOG.exception("what the coordinator asked for failed")
    return f"it failed ({type(error).__name__}); the site's log says more"


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
    does: Callable[[str], bool] = lambda work: True
    """Whether a piece of work may be asked for."""
    gives: Callable[[str], bool] = lambda name: True
    """Whether a tensor of this name may leave."""
    limit: int | None = None
    """Bytes of a message."""


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


class Host(Protocol):
    """Who decides what a site brings to an experiment."""

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


class Site:
    """Clients' values lie here by name; what the coordinator no longer refers to is freed."""

    def __init__(self, name: str, host: Host, folder: Path, peers: Peers) -> None:
        self.name, self._host, self._folder, self._peers = name, host, folder, peers
        self._hosted: Hosted | None = None
        self._names: dict[int, str] = {}  # of clients, by their ids
        self._values: dict[int, dict[str, Any]] = {}
        self._told: set[tuple[int, str]] = set()  # values that may leave: clients and names
        self._site_of: dict[int, str] = {}  # every client's site
        self._heard: dict[tuple[int, int, str], bytes] = {}
        self._news = threading.Condition()
        verbs = (
            self.split,
            self.open,
            self.number,
            self.each,
            self.contribute,
            self.exchange,
            self.report,
            self.save,
            self.load,
            self.names,
        )
        self._verbs: dict[str, Callable[..., Answer]] = {verb.__name__: verb for verb in verbs}

    def answer(self, message: bytes) -> bytes:
        """Do what the coordinator asks, and return the answer.

        What is refused or fails is said in the answer, without what it is about, and changes
        nothing.
        """
        try:
            header, tensors = unpack(message, self._hosted.limit if self._hosted else None)
            for client, name in header.pop("free", ()):
                self._values.get(client, {}).pop(name, None)
                self._told.discard((client, name))
            verb = header.pop("verb", None)
            if verb not in self._verbs:
                raise RefusedError(f"there is no verb {str(verb)[:40]!r}")
            # said in `open` alone: what follows comes from the same coordinator
            if verb in ("split", "open"):
                refuse_other_format(header, "the coordinator")
            with one_thread():
                answer, tensors = self._verbs[verb](finite(tensors), **header)
            return pack(version() | answer, tensors)
        except (RefusedError, UserError) as error:
            return pack(version() | {"refused": str(error)})
        except Exception as error:
            return pack(version() | {"refused": _failed(error)})

    def hear(self, sender: str, message: bytes) -> None:
        """Take what another site's clients tell clients here; it waits for its exchange.

        What nobody waits for is dropped.
        """
        if sender not in self._site_of.values() or len(message) > (
            self._opened.limit or sys.maxsize
        ):
            return
        try:
            # the header alone; tensors are read by the exchange that waits for them
            header, _ = unpack(message[: 8 + int.from_bytes(message[:8], "big")])
            address = (int(header["round"]), int(header["call"]), sender)
        except (RefusedError, KeyError, TypeError, ValueError, OverflowError):
            return  # the exchange counts the sender as missing
        with self._news:
            self._heard[address] = message
            # a site that runs ahead, or sends nonsense, must not fill the memory here
            for older in sorted(known for known in self._heard if known[2] == sender)[:-AHEAD]:
                del self._heard[older]
            self._news.notify_all()

    # ---- verbs

    def split(self, tensors: Tree, experiment: Any, everything: bool) -> Answer:
        """Say what tells prompts that are held out here, for sites to compare; see `Host`."""
        return asdict(self._host.held_out(experiment, everything)), NO_TENSORS

    def open(
        self,
        tensors: Tree,
        experiment: Any,
        run: str,
        resumes: bool,
        is_known: bool,
        held_out: Sequence[str] = (),
    ) -> Answer:
        """Begin an experiment, or go on with it, and say which clients there are.

        A run is begun anew only if the coordinator knows it.
        """
        if not RUN.fullmatch(run):
            raise RefusedError(f"a run cannot be called {run[:40]!r}")
        folder = self._folder / run
        if not is_known and list(folder.glob("checkpoints/round-*")):
            raise RefusedError(
                f"it has kept the clients of a run {run!r} that the coordinator does not know; "
                "its folder of runs is another"
            )
        self._hosted, self._run = self._host.host(experiment, folder, held_out), folder
        folder.mkdir(parents=True, exist_ok=True)
        # of an earlier run of this name
        if not resumes:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self._values.clear()
        self._told.clear()
        self._heard.clear()
        return {"about": self._hosted.about}, NO_TENSORS

    def number(
        self, tensors: Tree, ids: Mapping[str, int], sites: Mapping[str, Sequence[int]]
    ) -> Answer:
        """Learn the numbers of the clients here, and at which sites all others are."""
        if not ids.keys() <= self._opened.shards.keys():
            raise RefusedError("ids of clients that are not those here")
        self._names = {number: name for name, number in ids.items()}
        self._values = {number: {} for number in self._names}
        self._site_of = {number: site for site, numbers in sites.items() for number in numbers}
        return {}, NO_TENSORS

    def each(
        self,
        tensors: Tree,
        work: str,
        args: Sequence[Mapping[str, Any]],
        clients: Sequence[int],
        purpose: str,
        round: int,
        call: int,
        name: str,
    ) -> Answer:
        """Do registered work for some clients and keep what comes of it."""
        hosted = self._opened
        function = WORK.get(work)
        if function is None or not hosted.does(work):
            raise RefusedError(f"{work[:80]!r} is no work that is done here")
        if not 0 <= round <= hosted.rounds:
            raise RefusedError(f"round {round} is none of the {hosted.rounds} of the experiment")
        # arguments are read by the types that the work declares; nothing is unpickled
        hints = [
            hint for key, hint in get_type_hints(function.function).items() if key != "return"
        ][1:]
        hints += hints[-1:] * (len(args) - len(hints))  # a work's *parts
        common = {k: trees.part(tensors, k) for k, arg in enumerate(args) if "tree" in arg}
        try:
            common |= {
                k: TypeAdapter(hint).validate_python(arg["plain"])
                for k, (arg, hint) in enumerate(zip(args, hints, strict=True))
                if "plain" in arg
            }
        except ValueError as error:  # pydantic's among them
            raise RefusedError(f"arguments of {work!r} that do not fit: {error}") from error
        parts: int | None = None
        failed = {}
        for i in clients:
            given = {
                **common,
                **{
                    k: self._value(i, arg["own"][str(i)])
                    for k, arg in enumerate(args)
                    if "own" in arg
                },
            }
            # the same address as in a simulation, therefore the same numbers
            rng = seeds.generator(hosted.seed, purpose, round=round, call=call, client=i)
            client = Client(
                i, hosted.task, hosted.shards[self._names[i]], rng, round, hosted.rounds, self._run
            )
            try:
                result = function(client, *(given[k] for k in sorted(given)))
                values = result if isinstance(result, tuple) else (result,)
                # checked before it is kept, so that a client which diverges keeps the state from
                # before
                for part in values:
                    if all(isinstance(value, Tensor) for value in part.values()):
                        finite(part)
            except RefusedError as error:
                failed[i] = str(error)
                continue
            except Exception as error:
                failed[i] = _failed(error)
                continue
            parts = len(result) if isinstance(result, tuple) else None
            self._values[i] |= {f"{name}.{k}": part for k, part in enumerate(values)}
            self._told |= {(i, f"{name}.{k}") for k in function.sends}
        return {"parts": parts, "failed": failed}, NO_TENSORS

    def contribute(
        self, tensors: Tree, own: Mapping[str, str], shares: Mapping[str, float]
    ) -> Answer:
        """Send each client's share of a sum."""
        return {}, trees.nest(
            {i: trees.scale(self._leaving(int(i), name), shares[i]) for i, name in own.items()}
        )

    def exchange(
        self,
        tensors: Tree,
        own: Mapping[str, str],
        weights: Mapping[str, Mapping[str, float]],
        round: int,
        call: int,
        name: str,
        wait: float,
    ) -> Answer:
        """Send this site's values to its neighbours, wait for theirs, and mix.

        A neighbour that does not answer in time is replaced by the receiver's own value.
        """
        links, told = self._opened.links, dict[int, Tree]()
        for i, key in ((int(client), key) for client, key in own.items()):
            rng = seeds.generator(self._opened.seed, "channel", round=round, call=call, client=i)
            told[i] = links.encode(self._leaving(i, key), Sender(i, round, rng))
        rows = {int(i): {int(j): weight for j, weight in row.items()} for i, row in weights.items()}
        self._send(told, rows, round, call)
        arrived = {i: links.decode(message, 1) for i, message in told.items()}
        awaited = {self._site_of[j] for i in told for j in rows[i] if j not in told} - {self.name}
        arrived |= self._arrived(self._hear(awaited, round, call, wait), next(iter(told.values())))
        for i in told:
            # who was not heard is taken to say what the hearer says, so that weights still sum to
            # one
            heard = ((arrived.get(j, arrived[i]), weight) for j, weight in rows[i].items())
            self._values[i][f"{name}.0"] = arrived[i]
            self._values[i][f"{name}.1"] = mixed(
                self._value(i, own[str(i)]), arrived[i] if links.stages else None, heard
            )
            self._told |= {(i, f"{name}.0"), (i, f"{name}.1")}
        unheard = {j for i in told for j in rows[i]} - arrived.keys()
        return {
            "sizes": {i: trees.size(message) for i, message in told.items()},
            "unheard": sorted(unheard),
        }, NO_TENSORS

    def _send(
        self,
        told: Mapping[int, Tree],
        rows: Mapping[int, Mapping[int, float]],
        round: int,
        call: int,
    ) -> None:
        """Send each other site what its clients are to hear of those here."""
        for site in set(self._site_of.values()) - {self.name}:
            heard = {i for j, row in rows.items() if self._site_of[j] == site for i in row}
            if message := {i: tree for i, tree in told.items() if i in heard}:
                self._peers.tell(site, pack({"round": round, "call": call}, trees.nest(message)))

    def _arrived(self, messages: Mapping[str, bytes], like: Tree) -> dict[int, Tree]:
        """Return what other sites' clients have told, by client.

        What cannot be read, or is not like what is told here, has not arrived.
        """
        heard: dict[int, Tree] = {}
        for site, message in messages.items():
            with suppress(RefusedError):
                _, theirs = unpack(message, self._opened.limit)
                for j in (j for j, other in self._site_of.items() if other == site):
                    with suppress(Exception):  # whatever the neighbour has made up
                        tree = trees.part(theirs, j)
                        if alike(tree, like):
                            heard[j] = finite(self._opened.links.decode(tree, 1))
        return heard

    def _hear(self, sites: set[str], round: int, call: int, wait: float) -> dict[str, bytes]:
        """Return the messages of other sites, by site, as soon as all are there or the time is
        over.
        """
        addresses = {(round, call, site) for site in sites}
        until = time.monotonic() + wait
        with self._news:
            while not addresses <= self._heard.keys() and (left := until - time.monotonic()) > 0:
                self._news.wait(left)
            metrics = {
                address[2]: self._heard[address]
                for address in sorted(addresses & self._heard.keys())
            }
            self._heard = {
                address: message
                for address, message in self._heard.items()
                if address[:2] > (round, call)
            }
        return metrics

    def report(self, tensors: Tree, own: Mapping[str, str]) -> Answer:
        """Send clients' scalars."""
        metrics = {}
        for i, name in own.items():
            value = self._value(int(i), name)
            if not isinstance(value, Mapping) or not all(
                isinstance(number, int | float) for number in value.values()
            ):
                raise RefusedError("what is no mapping of names to numbers is not reported")
            metrics[i] = dict(value)
        return {"metrics": metrics}, NO_TENSORS

    def save(self, tensors: Tree, own: Mapping[str, Mapping[str, str]], checkpoint: str) -> Answer:
        """Keep clients' values in files, all of them or none; older checkpoints go but for the
        last.
        """
        if not all(RUN.fullmatch(f"{checkpoint}/{field}") for field in own):
            raise RefusedError("invalid file names")
        folder = self._run / "checkpoints"
        unfinished = folder / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for field, names in own.items():
            (unfinished / field).mkdir()
            for i, name in names.items():
                end = TELLABLE if (int(i), name) in self._told else PRIVATE
                trees.save(self._value(int(i), name), unfinished / field / f"{int(i)}{end}")
        shutil.rmtree(folder / checkpoint, ignore_errors=True)
        unfinished.replace(folder / checkpoint)
        for old in sorted(folder.glob("round-*"))[:-CHECKPOINTS]:
            shutil.rmtree(old)
        return {}, NO_TENSORS

    def load(self, tensors: Tree, checkpoint: str, fields: Sequence[str], name: str) -> Answer:
        """Take up each client's values of the newest checkpoint that has it and is not newer than
        this.
        """
        present: dict[str, list[int]] = {field: [] for field in fields}
        kept = sorted(
            folder
            for folder in (self._run / "checkpoints").glob("round-*")
            if folder.name <= checkpoint
        )
        for i in self._names:
            with_it = [folder for folder in kept if list(folder.glob(f"*/{i}.*"))]
            for field in fields if with_it else ():
                for file in (with_it[-1] / field).glob(f"{i}.*"):
                    self._values[i][f"{name}.{field}"] = trees.load(file)
                    self._told |= (
                        {(i, f"{name}.{field}")} if file.name.endswith(TELLABLE) else set()
                    )
                    present[field].append(i)
        return {"present": present}, NO_TENSORS

    def names(self, tensors: Tree) -> Answer:
        """Send the names of the values that lie here."""
        return {"names": {i: sorted(values) for i, values in self._values.items()}}, NO_TENSORS

    # ---- what they need

    @property
    def _opened(self) -> Hosted:
        if self._hosted is None:
            raise RefusedError("no experiment is open here")
        return self._hosted

    def _value(self, client: int, name: str) -> Any:
        if name not in self._values.get(client, {}):
            raise RefusedError(f"client {client} has no value {name[:40]!r} here")
        return self._values[client][name]

    def _leaving(self, client: int, name: str) -> Tree:
        """Return a value that may leave the site; raises RefusedError for one that may not."""
        tree: Tree = self._value(client, name)
        if (client, name) not in self._told:
            raise RefusedError(f"the value {name[:40]!r} of client {client} is its own")
        if kept := [key for key in tree if not self._opened.gives(key)]:
            raise RefusedError(f"{kept[0]!r} does not leave this site")
        return tree
