"""Where an experiment's clients are: in this process, or at sites that hold their own data."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from fedpref import config
from fedpref.data import ClientData
from fedpref.data.splits import SplitBy, digest
from fedpref.data.unusable import Unusable, refuse_empty, summary
from fedpref.engines import Engine, RemoteEngine, Simulation, Sites, Transport
from fedpref.engines.gold import learned_here
from fedpref.engines.host import HeldOut, Hosted
from fedpref.engines.kept_sums import KeptSums
from fedpref.engines.many import MANY, DrawnShards, opened
from fedpref.engines.private_examples import PrivateExamples
from fedpref.engines.private_sums import PrivateSums
from fedpref.engines.workers import can_fork
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment, encoded
from fedpref.experiments.free_baselines import FREE_BASELINES, run_free
from fedpref.experiments.lines import lines
from fedpref.experiments.private import (
    FOLDER,
    private_examples,
    private_sums,
    site_privacy,
    told_examples,
)
from fedpref.experiments.promises import in_words, in_words_of_sites
from fedpref.experiments.robustness import attacking, gold_of, looks, robust_means
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import CLIENTS, DATA, HELD_OUT, TRAINED, read_json
from fedpref.federation.verbs import Client, work
from fedpref.numerics.topology import Matrix
from fedpref.numerics.trees import Tree
from fedpref.privacy import Secret
from fedpref.tasks import Task

# client -> its numbers of examples, and a digest of its rows
About = Mapping[str, Mapping[str, Any]]


class ClientSource(Protocol):
    """Who brings the clients of an experiment, and an engine for each of its lines."""

    @property
    def about(self) -> About:
        """What is said of each client: sizes, and a digest of its rows."""
        ...

    @property
    def note(self) -> str:
        """What is to be said of the clients beside their sizes."""
        ...

    @property
    def files(self) -> Mapping[str, str]:
        """What a new run directory holds beside, by the file's name."""
        ...

    def prepare(self, cache: Path) -> Iterator[int]:
        """Compute once what training reads; yield how many clients are done."""
        ...

    def sizes(self, line: Experiment) -> Mapping[str, int]:
        """Return each client's number of training examples under a line."""
        ...

    def engine(self, line: Experiment, folder: Path) -> Engine:
        """Return an engine over all clients; `folder` is the line's run directory."""
        ...

    def in_words(self) -> str:
        """Return what is promised of privacy, and what it costs; empty without a promise."""
        ...

    def free(self, folder: RunDirectory) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Write the lines of baselines that cost nothing; yield each with its evaluation."""
        ...


def about(clients: Sequence[ClientData], shards: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Return what is said of clients, by name."""
    found = {}
    for number, client in enumerate(clients):
        # of what is not ready yet, what its rows say
        known: Any = client if isinstance(shards, DrawnShards) else shards[number]
        conversations, digest = client.about()
        found[client.name] = {
            "train": len(known.train),
            "test": len(known.test),
            **({"validation": len(known.validation)} if known.validation else {}),
            "truncated": 0 if known is client else known.truncated,
            "conversations": conversations,
            "digest": digest,
        }
    return found


def when_drawn(shards: Sequence[Any]) -> str:
    """Return what is not known yet of many clients, in words; empty where all is."""
    if not isinstance(shards, DrawnShards):
        return ""
    return (
        f"Of {len(shards):,} clients each is made ready when it is drawn: what of its rows is cut, "
        "or cannot be used, is not known before."
    )


def trained(clients: Sequence[ClientData], by: SplitBy) -> list[str]:
    """Return digests of all prompts that are trained on, by which newcomers' rows are told."""
    return sorted({digest(row.prompt, by) for client in clients for row in client.train})


# ---- this machine


class InProcess:
    """The experiment's own data, in this process and its workers."""

    def __init__(self, experiment: Experiment, task: Task) -> None:
        self._experiment, self._task = experiment, task
        self.reading, shards = encoded(experiment, task)
        self._shards: Sequence[Any] = shards
        self._gold = gold_of(experiment, task)
        self.about: About = about(self.reading.clients, shards)
        notes = (self.reading.skipped, *self.reading.notes, when_drawn(shards))
        self.note = "".join(f"\n{note}" for note in notes if note)
        self.files = {
            DATA: json.dumps(self.reading.figures, indent=1) + "\n",
            TRAINED: json.dumps(trained(self.reading.clients, experiment.data.split_by)) + "\n",
        }

    def prepare(self, cache: Path) -> Iterator[int]:
        if self._task.prepares:
            with closing(self._simulation(self._experiment, self._shards, cache)) as engine:
                size = 2 * self._workers()
                for first in range(0, len(self._shards), size):
                    some = engine.clients[first : first + size]
                    engine.begin(0, some, "init")
                    engine.each(prepare)
                    yield some[-1] + 1
        if isinstance(self._shards, DrawnShards):
            self._shards.prepare(cache)
        else:
            self._shards = [self._task.prepare(shard, cache) for shard in self._shards]
        if self._gold is not None:
            self._gold = replace(self._gold, shard=self._task.prepare(self._gold.shard, cache))

    def sizes(self, line: Experiment) -> Mapping[str, int]:
        return {shard.name: len(shard) for shard in self._shards_of(line)}

    def engine(self, line: Experiment, folder: Path) -> Simulation:
        if line.of_clients and line.of_clients.against == "coordinator":
            raise UserError(
                "privacy.against: in one process there is no coordinator to hide from. Run it over "
                "sites (engine: flare, or fedpref submit), or set against: model-users."
            )
        shards = self._shards_of(line)
        late = line.federation.joining([shard.name for shard in shards], line.seed)
        training = {i: shard for i, shard in enumerate(shards) if i not in late}
        private = private_sums(line, self._task, len(training), folder)
        examples = private_examples(line, self._task, training, folder)
        return self._simulation(line, shards, folder, private, examples)

    def in_words(self) -> str:
        return in_words(self._experiment, self._task, self._shards)

    def free(self, folder: RunDirectory) -> Iterator[tuple[str, Mapping[str, Any]]]:
        spec, task = self._experiment, self._task
        names = [shard.name for shard in self._shards]
        newcomers = spec.federation.joining(names, spec.seed)
        if any(name in FREE_BASELINES for name in spec.baselines):
            training = [k for k in range(len(names)) if k not in newcomers]
            measured = {names[k] for k in spec.evaluated(names, training, is_last=True)}
            trained = [self._shards[k] for k in training]
            yield from run_free(spec.baselines, task, trained, folder, spec.rounds, measured)

    def _shards_of(self, line: Experiment) -> Sequence[Any]:
        newcomers = line.federation.joining([shard.name for shard in self._shards], line.seed)
        return pooled(self._shards, newcomers) if line.algorithm.pools_data else self._shards

    def _simulation(
        self,
        line: Experiment,
        shards: Sequence[Any],
        folder: Path,
        private: PrivateSums | None = None,
        examples: PrivateExamples | None = None,
    ) -> Simulation:
        promise = private or examples
        return Simulation(
            self._task,
            shards,
            # what a private run draws nobody can draw again
            seed=promise.secret.number("draws") if promise else line.seed,
            rounds=line.rounds,
            weighting=line.federation.weighting,
            newcomers=line.federation.joining([shard.name for shard in shards], line.seed),
            links=line.network.links,
            uplink=line.uplink,
            mixing=mixing(line, [shard.name for shard in shards]),
            workers=min(self._workers(), len(shards)),
            spill_above_mb=line.spill_above_mb,
            folder=folder,
            clip=line.federation.clip,
            private=private,
            examples=examples,
            as_integers=line.secrecy is not None,
            figures=line.telling,
            robust=robust_means(line),
            gold=self._gold if looks(line) else None,
            distrust=line.network.distrust,
            attack=attacking(line, [shard.name for shard in shards]),
        )

    def _workers(self) -> int:
        wanted = self._experiment.workers
        if not can_fork():
            if wanted is not None and wanted > 1:
                raise UserError(
                    f"workers: {wanted} processes need a system on which processes fork, as Linux. "
                    "Leave workers out."
                )
            return 1
        return wanted or self._task.devices


def at_sites(line: Experiment) -> Experiment:
    """Return a line as sites are told of it, without where the coordinator has its files."""
    federation = line.federation
    if federation.gold is None:
        return line
    return replace(line, federation=replace(federation, gold="gold", gold_digest=""))


def mixing(line: Experiment, names: Sequence[str]) -> Any:
    """Return a function that gives the mixing matrix of a round, over clients of these names."""

    def matrix(round: int, active: Sequence[int]) -> Matrix:
        return line.network.matrix(names, line.seed, round, active)

    return matrix


def pooled(shards: Sequence[Any], newcomers: Collection[int]) -> list[Any]:
    """Return shards of which the first holds all training data but the newcomers'.

    Everybody else only evaluates.
    """
    first, *_ = training = [i for i in range(len(shards)) if i not in newcomers]
    everything = tuple(example for i in training for example in shards[i].train)
    return [
        replace(opened(shard), train=everything if i == first else ())
        for i, shard in enumerate(shards)
    ]


@work("clients.prepare", sends=())
def prepare(client: Client) -> Tree:
    """Compute once what training on the client's data reads."""
    client.task.prepare(client.shard, client.folder)
    return {}


# ---- sites


class AtSites:
    """The data of sites, which stay there."""

    def __init__(
        self, experiment: Experiment, transport: Transport, folder: Path, task: Task
    ) -> None:
        if needy := [
            name for name in experiment.baselines if name == "pooled" or name in FREE_BASELINES
        ]:
            raise UserError(
                f"baselines: {needy[0]} needs all data in one place, and they stay at "
                "their sites. Leave it out."
            )
        self._transport, self._folder, self._patience = transport, folder, experiment.patience
        count = 1 + experiment.federation.num_newcomers
        planned = {name: line for name, (_, line) in lines(experiment, count).items()}
        refused = Sites.refusals(
            transport,
            {name: config.dump(at_sites(line)) for name, line in planned.items()},
            experiment.patience,
        )
        self._refused = "; ".join(f"site {site}: {reason}" for site, reason in refused.items())
        if refused and (
            experiment.patience.min_clients is None or refused.keys() == set(transport.sites)
        ):
            raise UserError(f"{self._refused}. Nothing was begun.")
        # who takes no part in one line takes part in none, or lines would be of other clients
        self._transport = Among(transport, [s for s in transport.sites if s not in refused])
        known = folder / HELD_OUT
        self._held_out = read_json(known) if known.exists() else None
        self._task, self._gold = task, gold_of(experiment, task)
        self._experiment, self._sites = experiment, self._open(experiment, folder)
        # the same for every line and job, whichever sites answer then
        self._held_out = self._sites.held_out
        self.files: Mapping[str, str] = {HELD_OUT: json.dumps(self._held_out) + "\n"}
        self.about: About = self._sites.about

    def prepare(self, cache: Path) -> Iterator[int]:
        if self._gold is not None:
            self._gold = replace(self._gold, shard=self._task.prepare(self._gold.shard, cache))
        yield len(self.about)  # sites have, as the experiment was opened

    def in_words(self) -> str:
        return in_words_of_sites(self._experiment, self._task, len(self.about))

    def sizes(self, line: Experiment) -> Mapping[str, int]:
        return {name: int(entry["train"]) for name, entry in self.about.items()}

    def free(self, folder: RunDirectory) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return iter(())  # they need all data in one place

    def engine(self, line: Experiment, folder: Path) -> RemoteEngine:
        sites = self._sites if line == self._experiment else self._open(line, folder, self.about)
        late = line.federation.num_newcomers
        return RemoteEngine(
            sites,
            weighting=line.federation.weighting,
            newcomers=line.federation.joining(list(sites.about), line.seed),
            links=line.network.links,
            uplink=line.uplink,
            mixing=mixing(line, list(sites.about)),
            clip=line.federation.clip,
            private=private_sums(
                line, self._task, len(sites.about) - late, folder, len(set(sites.site_of.values()))
            ),
            examples=told_examples(line),
            masks=line.secrecy,
            figures=line.telling,
            robust=robust_means(line),
            gold=self._learn_gold if looks(line) else None,
            # who waits for all sites gets the same sum again
            sums=KeptSums(folder) if line.secrecy and line.patience.min_clients else None,
        )

    def _learn_gold(self, round: int, told: Tree, names: Sequence[str]) -> Tree:
        """Return what gold pairs teach; the coordinator computes it."""
        assert self._gold is not None
        self._task.move_to(0)
        spec, number = self._experiment, len(self.about)
        place = (number, round, spec.rounds)
        return learned_here(self._gold, self._task, spec.seed, place, told, names)

    @property
    def note(self) -> str:
        """What is to be said of the clients beside their sizes."""
        late, notes = self._sites.latecomers, list(self._sites.notes)
        if self._refused:
            notes.append(f"{self._refused}; they take no part.")
        if lost := sum(about.get("unusable", 0) for about in self.about.values()):
            notes.append(f"{lost} rows at sites cannot be used; they are left out.")
        if late:
            notes.append(
                f"{', '.join(late[:8])} came after the run had begun; a new run takes them in."
            )
        return "".join(f"\n{note}" for note in notes)

    def _open(self, line: Experiment, folder: Path, began: About | None = None) -> Sites:
        run = folder.relative_to(self._folder.parent).as_posix()
        clients, resumes = self._folder / CLIENTS, bool(RunDirectory(folder).checkpoints())
        if began is None and clients.exists() and resumes:
            began = json.loads(clients.read_text())
        return Sites(
            self._transport,
            config.dump(at_sites(line)),
            run,
            self._patience,
            began=began,
            resumes=resumes,
            is_known=clients.exists(),
            held_out=self._held_out,
        )


class Among:
    """A transport to some of its sites."""

    def __init__(self, transport: Transport, sites: Sequence[str]) -> None:
        self._transport, self.sites = transport, sites

    def ask(self, messages: Mapping[str, bytes], seconds: float) -> Mapping[str, bytes]:
        return self._transport.ask(messages, seconds)


class SimulatedSite:
    """A simulated site: hosts every `sites`-th client of the experiment, starting at `number`."""

    def __init__(self, number: int, sites: int) -> None:
        self._number, self._sites = number, sites

    def consent(self, experiment: Any) -> None:
        """Take part in everything."""

    def held_out(self, experiment: Any, everything: bool) -> HeldOut:
        """Return nothing: all sites are of one file, whose split is one."""
        return HeldOut()

    def host(self, experiment: Any, folder: Path, held_out: Collection[str] = ()) -> Hosted:
        """Return the clients that the site hosts."""
        spec = config.parse(Experiment, experiment, "the experiment")
        reading = spec.read().settled()
        numbers = range(self._number, len(reading.clients), self._sites)
        mine = {number: reading.clients[number] for number in numbers}
        # every site reads the one file; the first says what is nobody's
        unread = 0 if self._number else len(reading.unusable)
        return hosted(spec, mine, folder, unread)


def ready(
    spec: Experiment, task: Task, clients: Sequence[ClientData], cache: Path
) -> tuple[list[Any], list[int]]:
    """Return clients' shards, and how many rows of each cannot be used; raises UserError."""
    unusable: list[Unusable] = []
    shards, counts = [], []
    for client in clients:
        before = len(unusable)
        shards.append(task.encode(client, unusable))
        counts.append(len(unusable) - before)
    if unusable and spec.data.unusable == "refuse":
        raise UserError(summary(unusable, sum(client.size for client in clients)))
    if unusable:
        refuse_empty(shards, spec.sides)
    return [task.prepare(shard, cache) for shard in shards], counts


def hosted(
    spec: Experiment,
    clients: Mapping[int, ClientData],
    folder: Path,
    unread: int = 0,
    max_epsilon: Mapping[str, float] = MappingProxyType({}),
    **limits: Any,
) -> Hosted:
    """Return clients ready to train; of many each is made ready when it is drawn.

    Args:
        spec: The experiment.
        clients: Their rows, by number.
        folder: Keeps what is computed once.
        unread: Rows of the site that cannot be used, and are nobody's.
        max_epsilon: What may be spent of a client over all runs at the site; see `SitePrivacy`.
        **limits: What may be asked of them; see `Hosted`.
    """
    task, here = spec.build_task(), list(clients.values())
    shards: Sequence[Any]
    # what is promised of examples hangs on how many of each can be used
    if len(here) > MANY and not spec.promises:
        counts = [0] * len(here)
        shards = DrawnShards(task, here, spec.data.unusable)
        shards.prepare(folder / "cache")
    else:
        shards, counts = ready(spec, task, here, folder / "cache")
    said = about(here, shards)
    # what cannot be read is said with the first client
    for place, (entry, count) in enumerate(zip(said.values(), counts, strict=True)):
        if lost := count + (0 if place else unread):
            entry["unusable"] = lost
    numbered = {
        name: {**entry, "number": number}
        for (name, entry), number in zip(said.items(), clients, strict=True)
    }
    seed = spec.seed
    if spec.promises:
        secret = Secret.of(folder / FOLDER)
        # what a private run draws nobody can draw again
        seed = secret.number("draws")
        for entry in numbered.values():  # a digest confirms a guess of the rows
            entry["digest"] = secret.digest(entry["digest"])
    task.move_to(0)
    by_name = {shard.name: shard for shard in shards}
    return Hosted(
        task,
        by_name,
        numbered,
        seed=seed,
        rounds=spec.rounds,
        links=spec.network.links,
        uplink=spec.uplink,
        privacy=site_privacy(spec, task, by_name, folder, max_epsilon),
        masks=spec.secrecy,
        gossips=spec.algorithm.gossips,
        means=spec.algorithm.means,
        distrust=spec.network.distrust,
        is_silent=spec.telling == "none",
        **limits,
    )
