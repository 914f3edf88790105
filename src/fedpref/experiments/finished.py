"""A run directory as an object: its experiment, its clients, its evaluations, its models."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpref import config
from fedpref.data import ClientData, Opinion
from fedpref.data.unusable import Unusable, refuse_empty, summary
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.errors import UserError, command
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.free_baselines import free_lines
from fedpref.experiments.frozen import frozen, refuse_other
from fedpref.experiments.lines import lines
from fedpref.experiments.migration import migrated
from fedpref.experiments.run_directory import (
    CONFIG,
    JOINED,
    RESUMABLE,
    ROWS,
    RunDirectory,
    client_folder,
    client_path,
)
from fedpref.experiments.run_files import CLIENTS, DATA, EVALUATION, NEWCOMERS, TRAINED, read_json
from fedpref.federation.algorithm import Algorithm
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import ClientMetrics
from fedpref.numerics.trees import Tree
from fedpref.rewards import RewardFunction
from fedpref.rewards.combine import Combine
from fedpref.tasks import OpinionTask, Task
from fedpref.tasks.group_reward import CombinedReward, GroupReward, Kind
from fedpref.tasks.opinion import FILE

_FORMER_FOLDERS = {
    "baselines/alone": "references/local",
    "baselines/pooled": "references/centralised",
}


@dataclass(frozen=True)
class Outcome:
    """Where a run lies, and its last evaluation.

    Attributes:
        path: The run directory.
        evaluations: For each line, each client's held-out metrics.
        newcomers: For each line, the metrics of clients that joined after training, with the model
            as they find it, and after their own steps.
    """

    path: Path
    evaluations: Mapping[str, ClientMetrics]
    newcomers: Mapping[str, tuple[ClientMetrics, ClientMetrics]]

    @property
    def tells_each(self) -> bool:
        """Whether there are figures of single clients, not of all together alone."""
        return all(self.evaluations.values())


@dataclass(frozen=True)
class OpenedRun:
    """An engine over a run's clients, with a state of its algorithm.

    Attributes:
        engine: In this process.
        task: The task at work.
        shards: The data of the engine's clients.
        state: The algorithm's, from the run's last checkpoint.
        model: The parts of each client's model.
    """

    engine: Simulation
    task: Task
    shards: Sequence[Any]
    state: Any
    model: tuple[Any, ...]


@dataclass(frozen=True)
class FinishedRun:
    """A run directory and what it holds. Results and models need a finished run."""

    folder: RunDirectory = field(repr=False)

    @staticmethod
    def at(path: str | Path) -> FinishedRun:
        """Open a run directory.

        Raises:
            UserError: There is no run there, or one that a newer fedpref has written.
        """
        folder = RunDirectory(Path(path))
        if not (folder.path / CONFIG).is_file():
            raise UserError(
                f"{path}: there is no run here (no {CONFIG}). Give the directory that `fedpref "
                "run` printed."
            )
        folder.refuse_newer()
        return FinishedRun(folder)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.folder.path

    # ---- what it is

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment as it was resolved when the run began."""
        if self.folder.format >= RESUMABLE:
            experiment = Experiment.load(self.path / CONFIG)
            rows = self.path / ROWS
            # the run may have been moved since, and its rows with it
            return (
                replace(experiment, data=experiment.data.with_paths(lambda _: str(rows.resolve())))
                if rows.exists()
                else experiment
            )
        content = migrated(config.read(self.path / CONFIG))
        return config.parse(Experiment, content, str(self.path / CONFIG))

    @cached_property
    def lines(self) -> Mapping[str, RunDirectory]:
        """The directory of each line, by name: the algorithm's own, and the baselines'."""
        planned = lines(self.experiment, max(1, len(self.clients)) if self.has_begun else 1)
        folders = {}
        for name, (sub, _) in planned.items():
            path = self.path / sub
            former = self.path / _FORMER_FOLDERS.get(sub, sub)
            if sub and not path.exists() and former.exists():
                path = former
            folders[name] = RunDirectory(path)
        free = free_lines(self.experiment.baselines)
        return folders | {name: RunDirectory(self.path / sub) for name, sub in free.items()}

    @property
    def has_begun(self) -> bool:
        """Whether the run has recorded its clients."""
        return (self.path / CLIENTS).is_file()

    @cached_property
    def clients(self) -> Mapping[str, Mapping[str, Any]]:
        """Numbers of examples and a digest of the rows, by client.

        Raises:
            UserError: The run has not begun.
        """
        if not self.has_begun:
            raise UserError(
                f"{self.path}: the run has not begun, nobody has said which clients there are (no "
                f"{CLIENTS})."
            )
        known: Mapping[str, Mapping[str, Any]] = read_json(self.path / CLIENTS)
        return known

    @cached_property
    def joined(self) -> Mapping[str, Mapping[str, Any]]:
        """Clients that joined when the run was over: sizes, metrics before and after."""
        return {row["client"]: row for row in self.folder.read_rows(NEWCOMERS)}

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """How many rows were read, left out, and could not be used by kind; empty if unknown."""
        said: Mapping[str, Any] = self._json(DATA, {})
        return said

    @cached_property
    def trained_prompts(self) -> frozenset[str] | None:
        """Digests of all prompts that were trained on; None where the run does not know them."""
        digests = self._json(TRAINED, None)
        return None if digests is None else frozenset(digests)

    def _json(self, name: str, missing: Any) -> Any:
        file = self.path / name
        return read_json(file) if file.exists() else missing

    @property
    def learned_from_conversations(self) -> bool:
        """Whether training prompts were conversations, laid out by the chat template."""
        return any(about.get("conversations") for about in self.clients.values())

    @property
    def is_finished(self) -> bool:
        """Whether the algorithm's own line and all baselines are done."""
        return all(line.done for line in self.lines.values())

    def require_done(self) -> FinishedRun:
        """Return the run; raises UserError unless the algorithm's own line is done."""
        if not self.folder.done:
            raise UserError(
                f"{self.path}: the run is not finished. "
                f"`{command('resume', self.path)}` finishes it."
            )
        return self

    def refuse_opinions(self) -> FinishedRun:
        """Return the run; raises UserError if it has trained no language model."""
        if isinstance(self.experiment.task, OpinionTask):
            raise UserError(
                f"{self.path}: the run has trained a predictor of opinions; `fedpref reward` "
                "scores answers with it."
            )
        return self

    # ---- what came of it

    def evaluations(self, line: str | None = None) -> list[dict[str, Any]]:
        """Return a row for each evaluation of a line, by default of the algorithm's own.

        Raises:
            UserError: The run has no line of this name.
        """
        name = line or self.experiment.algorithm.name
        if name not in self.lines:
            raise UserError(
                f"{self.path}: the run has no line {name!r}; its lines are {', '.join(self.lines)}."
            )
        return self.lines[name].read_rows(EVALUATION)

    @property
    def last_evaluation(self) -> Mapping[str, Any]:
        """The last evaluation of the algorithm's own line; raises UserError if there is none."""
        return self.last_of(self.experiment.algorithm.name)

    def last_of(self, line: str) -> dict[str, Any]:
        """Return a line's last evaluation; raises UserError if there is none."""
        rows = self.evaluations(line)
        if not rows:
            missing = self.lines[line].path / EVALUATION
            raise UserError(
                f"{missing}: the run has not been evaluated, or this file has lost its rows. "
                f"`{command('resume', self.path)}` takes an unfinished run up."
            )
        if unknown := sorted(rows[-1]["clients"].keys() - self.clients.keys()):
            raise UserError(
                f"{self.path}: {CLIENTS} does not know {unknown[0]!r}, who was evaluated; one of "
                "the run's files is damaged."
            )
        return rows[-1]

    def result(self) -> Outcome:
        """Return what a finished run came to.

        Raises:
            UserError: The run, or one of its baselines, is not finished.
        """
        if not self.is_finished:
            raise UserError(
                f"{self.path}: the run is not finished. "
                f"`{command('resume', self.path)}` finishes it."
            )
        rows = {name: self.last_of(name) for name in self.lines}
        newcomers = {
            name: (row["newcomers_before"], row["newcomers"])
            for name, row in rows.items()
            if "newcomers" in row
        }
        return Outcome(self.path, {name: row["clients"] for name, row in rows.items()}, newcomers)

    # ---- its models

    @property
    def client_folders(self) -> dict[str, Path]:
        """The exported models of clients that trained, by client, where clients have their own."""
        return self._folders("clients", self.clients if self.has_begun else ())

    @property
    def joined_folders(self) -> dict[str, Path]:
        """The exported models of clients that joined when the run was over, by client."""
        return self._folders(JOINED, self.joined)

    def _folders(self, kind: str, clients: Iterable[str]) -> dict[str, Path]:
        paths = {name: client_path(self.path, kind, name) for name in clients}
        return {name: path for name, path in paths.items() if path}

    def joined_folder(self, client: str) -> Path:
        """Return where the model of a client that joins when the run is over goes."""
        return client_folder(self.path, JOINED, client)

    def model_folder(self, client: str | None = None) -> Path:
        """Return the folder of the shared model, or of a client's own.

        Raises:
            UserError: There is none, or several and no client is named.
        """
        own, later = self.client_folders, self.joined_folders
        shared = self.path / "adapter"
        if not own and self.folder.has_own:
            raise UserError(
                f"{self.path}: every client has a model of its own, which has stayed at its "
                "site: SITE'S FOLDER/RUN/clients."
            )
        if client is not None:
            if client in own | later:
                return (own | later)[client]
            if client not in self.clients:
                raise UserError(
                    f"{self.path}: there is no client {client!r}; the clients are "
                    f"{[*self.clients, *later][:12]}."
                )
        elif own:
            raise UserError(
                f"{self.path}: every client has a model of its own; choose one with --client: "
                f"{list(own)[:12]}."
            )
        if client is not None and own:
            raise UserError(
                f"{self.path}: client {client!r} has not taken part in a round, so that it has no "
                f"model of its own; {len(own)} clients have one, as {list(own)[:12]}."
            )
        if not own and shared.exists():
            return shared  # the shared model is every client's model
        raise UserError(
            f"{self.path}: the run is not finished, it has exported no model yet. "
            f"`{command('resume', self.path)}` finishes it."
        )

    @contextmanager
    def opened(
        self,
        clients: Sequence[ClientData],
        cache: Path,
        *,
        spec: Experiment | None = None,
        known: Sequence[str] | None = None,
    ) -> Iterator[OpenedRun]:
        """Load the run's models onto an engine, within a `with`.

        Args:
            clients: The rows that the engine's clients have.
            cache: Where what is computed once about them goes.
            spec: The experiment whose task is used; by default the run's own.
            known: Names of the run's clients, each of which becomes a client of the engine with its
                own parts from the last checkpoint; who has no rows has the first client's. Without
                them, the engine's clients are those of `clients`, new to the run, with what is
                shared from the checkpoint.

        Raises:
            UserError: The run has no checkpoint.
        """
        if not self.folder.checkpoints():
            raise UserError(
                f"{self.path}: the run's last checkpoint, from which models are read, is no "
                "longer there."
            )
        spec = spec or self.experiment
        keep_freed_memory()
        with one_thread():
            task: Task = spec.build_task() if known is not None else spec.task.build(open_groups)
            refuse_other(self.folder, frozen(task))
            unusable: list[Unusable] = []
            encoded = [task.encode(client, unusable) for client in clients]
            if unusable and spec.data.unusable == "refuse":
                raise UserError(summary(unusable, sum(c.size for c in clients)))
            if unusable:
                warnings.warn(f"{len(unusable)} rows more cannot be used.", stacklevel=3)
                # who joins also trains
                refuse_empty(encoded, ("train", "test") if known is None else ("test",))
            shards: list[Any] = [task.prepare(shard, cache) for shard in encoded]
            if known is not None:
                by_name = {shard.name: shard for shard in shards}
                shards = [by_name.get(name, shards[0]) for name in known]
            simulation = Simulation(task, shards, seed=spec.seed, rounds=1, folder=self.path)
            with closing(simulation) as engine:
                algorithm: Algorithm[Any] = spec.algorithm
                state = algorithm.init(engine, task.init(seeds.generator(spec.seed, "init")))
                if known is None:
                    state = self.folder.restore_shared(state)
                else:
                    state, _ = self.folder.restore(state, engine)
                yield OpenedRun(engine, task, shards, state, algorithm.model(state))

    # ---- opinions as rewards

    def group_rewards(
        self, groups: Sequence[str] = (), kind: Kind = "share"
    ) -> dict[str, GroupReward]:
        """Return the rewards of groups by the run's predictor of opinions.

        A group's context is drawn from its own data, which the run's config names, and is that of
        the run's evaluations.

        Args:
            groups: Whose rewards; by default all groups'.
            kind: Shares of a prompt's answers, or logits.

        Raises:
            UserError: The run is of another task or not finished, its data has changed, or a name
                is none of its groups.
        """
        spec = self.experiment
        if not isinstance(spec.task, OpinionTask):
            raise UserError(
                f"{self.path}: the run's task is {spec.task.name!r}; rewards come from a "
                "predictor of opinions (task: opinion)."
            )
        learner = spec.task.build()
        learner.move_to(0)
        clients = {client.name: client for client in spec.clients()[0]}
        known = {name: entry["digest"] for name, entry in self.clients.items()}
        digests = {name: client.digest for name, client in clients.items()}
        if changed := sorted(name for name in digests if known.get(name) != digests[name]):
            raise UserError(
                f"{self.path}: the data of {changed[:5]} is not what the run was trained on."
            )
        shards = {name: learner.encode(client) for name, client in clients.items()}
        if unknown := sorted(set(groups) - shards.keys()):
            raise UserError(
                f"{self.path}: {unknown[:5]} are no groups of the run; its groups are "
                f"{list(shards)[:12]}."
            )
        loaded: dict[Path, Tree] = {}
        rewards = {}
        for group in groups or shards:
            folder = self.model_folder(group)
            params = loaded.setdefault(folder, trees.load(folder / FILE))
            asks = isinstance(clients[group].train[0], Opinion)
            rewards[group] = GroupReward(learner, params, shards[group].context, group, kind, asks)
        return rewards


def open_groups(run: str, groups: tuple[str, ...], combine: Combine, kind: Kind) -> RewardFunction:
    """Return one reward of groups of a finished run, as a task's reward settings ask for it."""
    return CombinedReward(FinishedRun.at(run).group_rewards(groups, kind), combine)
