"""A site's own file: its data, its clients, and what it consents to. It stays at the site."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedpref import config
from fedpref.data import IID, ClientData, Partition, Source
from fedpref.data.preferences import Preference
from fedpref.data.reading import by_rule
from fedpref.data.row_store import filtered
from fedpref.data.splits import keyed
from fedpref.engines.host import SETTLED, Bounds, HeldOut, Hosted
from fedpref.engines.messages import RefusedError
from fedpref.errors import UserError
from fedpref.experiments import evaluations
from fedpref.experiments.clients import hosted
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.migration import refuse_former_names
from fedpref.federation import diagnostics
from fedpref.federation.local_training import LocalTraining, halves
from fedpref.federation.personal import Personal
from fedpref.models.model_settings import ALL_LINEAR, Model
from fedpref.models.own_parts import NAMES, OWN_ADAPTER
from fedpref.numerics import files
from fedpref.rewards import Reward
from fedpref.tasks.task import CRITIC
from fedpref.types import Count, OpenFraction, Positive, WholeNumber

LOG = logging.getLogger("fedpref")
COUNTED = ".preferences"  # how many there were when the last run began, of data that grow
T = TypeVar("T")
MOST_CYCLES = 4  # of a learning rate in a run


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an experiment may ask of a site; whoever asks for more is refused."""

    least_examples: WholeNumber = 8
    """Distinct examples behind an update that leaves a client, and its training examples, at
    least."""
    least_batch: Count = 4
    """Examples in a training batch, at least; a batch by tokens alone is refused above 1."""
    least_evaluated: WholeNumber = 10
    """Held-out examples behind a client's metrics, at least."""
    embeddings: bool = False
    """Whether adapters may be on the embeddings, from whose gradients a row's words can be read."""
    head: bool = False
    """Whether adapters may be on the vocabulary head, from whose gradients they can be read too."""
    max_lora_r: Count = 64
    """The highest rank of an adapter: the gradient of a first layer's spans at most so many
    words."""
    max_steps: Count = 1000
    """Batches of a client in one call."""
    max_calls: Count = 32
    """Calls for a client in one phase of a round."""
    max_seconds: Positive = 7200.0
    """Seconds of one phase of a round, after which no more is begun."""
    max_openings: Count = 1000
    """How often a run may be opened, as after each job of a long one."""
    max_memory_mb: Count = 8192
    """MB of clients' values that lie in memory."""
    max_disk_mb: Count = 51200
    """MB of the folder of runs, with all that is kept for them."""

    max_epsilon: Mapping[Literal["client", "unit"], Positive] = field(default_factory=dict)
    """Epsilon that may be spent, over all runs whose folders lie here: of a client (`client`), and
    of what one has (`unit`: an example, a prompt). An experiment without such a promise is
    refused."""

    max_delta: OpenFraction = 0.01
    """Delta at most, of the promises that `max_epsilon` asks for: the chance that epsilon does not
    hold."""

    def refuse(self, experiment: Experiment) -> None:
        """Raise RefusedError for an experiment that asks for more."""
        self.check(experiment.algorithm)
        made = {"client": experiment.of_clients, "unit": experiment.of_units}
        for level, most in self.max_epsilon.items():
            promise = made[level]
            if promise is None:
                what = "of clients" if level == "client" else "of what a client has"
                raise RefusedError(
                    f"it promises no privacy {what}, which limits.max_epsilon asks for"
                )
            if promise.epsilon is not None and promise.epsilon > most:
                raise RefusedError(
                    f"its epsilon of {promise.epsilon:g} is above limits.max_epsilon, {most:g}"
                )
            if promise.delta > self.max_delta:
                raise RefusedError(
                    f"its delta of {promise.delta:g} is above limits.max_delta, {self.max_delta:g}"
                )
        if experiment.telling == "private" and "client" in self.max_epsilon:
            raise RefusedError(
                "private evaluations are the coordinator's to count, and limits.max_epsilon is the "
                "site's; it takes privacy.metrics: none or kept"
            )
        for model in _parts(experiment.task, Model):
            if isinstance(model.lora_target_modules, str) and (
                model.lora_target_modules != ALL_LINEAR
            ):
                raise RefusedError(
                    "task.model.lora_target_modules is a pattern, which may take for ever to "
                    "match; it takes all-linear, or a list of names"
                )
            if model.lora_r > self.max_lora_r:
                raise RefusedError(
                    f"adapters of rank {model.lora_r} are above limits.max_lora_r, "
                    f"{self.max_lora_r}"
                )
        local, algorithm = experiment.algorithm.local, experiment.algorithm
        if isinstance(algorithm, Personal) and algorithm.phases == "alternate":
            local = halves(local, algorithm.personal_steps)[1]
        drawn = local.steps * local.gradient_accumulation_steps * local.batch_size
        if drawn < self.least_examples:
            raise RefusedError(
                f"updates of {drawn} examples are below limits.least_examples, "
                f"{self.least_examples}"
            )

    def check(self, value: Any) -> None:
        """Raise RefusedError for settings of training, anywhere in a value, that ask for more."""
        for local in _parts(value, LocalTraining):
            if local.batch_size < self.least_batch or (
                local.max_tokens_per_batch and self.least_batch > 1
            ):
                size = local.batch_size if not local.max_tokens_per_batch else "some tokens"
                raise RefusedError(
                    f"batches of {size} are below limits.least_batch, {self.least_batch}"
                )
            if local.num_cycles > MOST_CYCLES:
                raise RefusedError(
                    f"a learning rate of {local.num_cycles:g} cycles is above the {MOST_CYCLES} at "
                    "most: some batches would count for nothing"
                )
            if (batches := local.steps * local.gradient_accumulation_steps) > self.max_steps:
                raise RefusedError(
                    f"{batches} batches a round are above limits.max_steps, {self.max_steps}"
                )

    def refuse_small(self, about: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise RefusedError where a client has fewer examples than anything may be told of."""
        for client, known in about.items():
            for side, least, key in (
                ("train", self.least_examples, "least_examples"),
                ("test", self.least_evaluated, "least_evaluated"),
                ("validation", self.least_evaluated, "least_evaluated"),
            ):
                if 0 < known.get(side, 0) < least:
                    said = {"train": "training", "test": "held-out"}.get(side, side)
                    raise RefusedError(
                        f"client {client!r} has fewer {said} examples than limits.{key}, {least}, "
                        "so that the site takes no part. It may have more rows, hold out another "
                        "share (data.test_fraction), leave such clients out (partition.min_rows, "
                        "min_test_rows), or lower the limit, all in its site.yaml"
                    )

    def refuse_ends(self, ends: Collection[str]) -> None:
        """Raise RefusedError for adapters on ends of the model that the site keeps them from."""
        allowed = {"embeddings": self.embeddings, "head": self.head}
        if refused := [end for end in sorted(ends) if not allowed[end]]:
            raise RefusedError(f"adapters on the {refused[0]} need limits.{refused[0]}: true")


def _of_rows(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is told of a client whose rows' privacy is promised: how many there are, and
    whether most are conversations, as which its model is then asked.
    """
    told = {key: value for key, value in about.items() if key != "unusable"}
    most = 2 * about["conversations"] > about["train"] + about["test"]
    return {**told, "truncated": 0, "conversations": int(most)}


def _parts(value: Any, kind: type[T]) -> Iterator[T]:
    """Yield all that is of a kind in settings, whatever holds it."""
    return (part for part in config.parts(value) if isinstance(part, kind))


@dataclass(frozen=True, kw_only=True)
class SiteFile:
    """What a site brings, and what it consents to, before anything of an experiment is used."""

    data: Source
    """Where the site's rows come from; a relative path starts at the file's folder."""
    split_key: str | None = None
    """A file with a secret that all sites have and the coordinator lacks, by which sites whose data
    say themselves what is held out tell one another which prompts that are; null tells nothing."""
    algorithms: tuple[str, ...]
    """The algorithms that the site takes part in, by name; those of a module of your own as
    `module:Class`."""
    partition: Partition | None = None
    """Which clients the site hosts; null is one client with all rows."""
    client: str | None = None
    """The name of that one client; null is the site's."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Models that experiments, and their rewards, may name: what they call it, and the folder or
    name here."""
    functions: tuple[str, ...] = ()
    """`module:function` that experiments may name as rewards, and `module:Class` of losses and
    rewards."""
    judge: Reward | None = None
    """The site's own judge of answers, in place of the experiment's (task: online-preference)."""
    max_rounds: Count = 1000
    """The longest experiment that the site takes part in."""
    max_message_mb: Count = 512
    """The largest message that is taken, in MB."""
    limits: Limits = Limits()
    """What an experiment may ask for."""
    may_leave: tuple[str, ...] = ()
    """Names of private parts that may be averaged all the same, such as bottleneck.down."""
    diagnostics: bool = False
    """Whether what a method keeps private may be measured."""
    folder: str = "fedpref"
    """Where the site keeps its clients' side of runs; as seen from the file unless it is a whole
    path."""

    @staticmethod
    def load(path: Path) -> SiteFile:
        """Read and check a site's file; paths in it are as seen from the file.

        Raises:
            UserError: It does not fit.
        """
        read = config.load(SiteFile, path, check=refuse_former_names)

        def beside(name: str) -> str:
            return str((path.parent / name).resolve()) if (path.parent / name).exists() else name

        source = read.data.with_paths(beside)
        if read.split_key is not None:
            read = replace(read, split_key=_secret(path.parent / read.split_key))
        return replace(read, data=source, folder=str((path.parent / read.folder).resolve()))


def _secret(file: Path) -> str:
    """Return the key in a file; raises UserError where there is none of 16 characters or more."""
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"split_key: {file} cannot be read: {error}") from error
    if len(secret) < 16:
        raise UserError(f"split_key: {file} holds {len(secret)} characters; 16 are the least.")
    return secret


def refuse_code(spec: Experiment, functions: Sequence[str]) -> None:
    """Raise UserError where an experiment would run code that the participant has not named.

    Args:
        spec: The experiment.
        functions: `module:function` that may be imported.
    """
    if spec.task.runs_remote_code:
        raise UserError("no code that comes with a model is run here")
    if spec.task.names_model_files:
        raise UserError(
            "what a model's name means is for the participant to say, and so are its revision and "
            "the file of it (task.model.gguf_file)"
        )
    for name, reward in spec.task.reward_settings().items():
        if reward.code is not None and reward.code not in functions:
            raise UserError(
                f"the function {reward.code!r} of the reward {name!r} is none of those that are "
                "consented to here"
            )


@dataclass(frozen=True)
class _Settled:
    """A site's data, as they were when a run began."""

    data: Source


class Consenting:
    """A site that takes part in what its file allows."""

    def __init__(self, name: str, file: SiteFile) -> None:
        self._name, self._file = name, file

    def consent(self, experiment: Any) -> None:
        """Raise RefusedError for an experiment that the file does not allow."""
        self._spec(experiment)

    def held_out(self, experiment: Any, everything: bool) -> HeldOut:
        """Return an HMAC of each held-out prompt, by the sites' common key.

        Prompts that are held out by the rule are so at every site; without `everything` they are
        left out.

        Raises:
            RefusedError: The file does not allow the experiment, or the site's data do not fit.
        """
        spec = self._spec(experiment)
        key, by = self._file.split_key, spec.data.split_by
        try:
            # nobody trains on either side, whichever this experiment measures on
            clients = replace(spec, evaluate_on="test").read().settled().clients
        except UserError as error:  # whose text may hold rows
            raise self._unfit() from error
        has_sides = any(row.side for one in clients for row in one.each())
        if key is None:
            return HeldOut(is_keyed=False, has_sides=has_sides)
        keys = {
            keyed(row.prompt, by, key)
            for one in clients
            for row in chain(one.test, one.validation)
            if everything or row.side == "test" or not by_rule(row, spec.data)
        }
        return HeldOut(sorted(keys), True, has_sides)

    def _spec(self, experiment: Any) -> Experiment:
        try:
            with config.of_somebody_else((*self._file.algorithms, *self._file.functions)):
                spec = config.parse(Experiment, experiment, "the experiment")
        except UserError as error:
            raise RefusedError(str(error)) from error
        if self._file.judge is not None:
            try:
                spec = replace(spec, task=spec.task.judged_by(self._file.judge))
            except ValueError as error:
                raise RefusedError(f"the site's own judge cannot be: {error}") from error
        self._consent(spec)
        if spec.validates and not self._file.data.validation_fraction:
            raise RefusedError(
                "the experiment looks at rows that are set aside to choose by, and this site sets "
                "none aside (data.validation_fraction in its file)"
            )
        partition = self._file.partition or IID(clients=1)
        task = spec.task.with_models(self._here)
        return replace(spec, data=self._file.data, partition=partition, task=task)

    def read(self, experiment: Any) -> Sequence[ClientData]:
        """Return the site's clients as an experiment would have them; raises UserError."""
        spec = config.parse(Experiment, experiment, "the experiment")
        partition = self._file.partition or IID(clients=1)
        clients = replace(spec, data=self._file.data, partition=partition).read().settled().clients
        if self._file.partition is None:
            clients = (replace(clients[0], name=self._file.client or self._name),)
        return clients

    def _settled(self, folder: Path) -> Source:
        """Return the site's data as they were when a run began, and say how much of it is new.

        Args:
            folder: The site's side of the run.

        Raises:
            UserError: There are no data.
        """
        source = self._file.data.at_its_state()
        if source == self._file.data:  # they do not grow, or not by themselves
            return source
        if (folder / SETTLED).exists():
            written = json.loads((folder / SETTLED).read_text())
            return config.parse(_Settled, written, str(folder / SETTLED)).data
        count = sum(isinstance(row, Preference) for row in source.read())
        before = Path(self._file.folder) / COUNTED
        known = int(before.read_text()) if before.exists() else 0
        LOG.info("%d preferences, %d more than when the last run began", count, count - known)
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / SETTLED, json.dumps(config.dump(_Settled(source))))
        files.write(before, f"{count}\n")
        return source

    def _unfit(self) -> RefusedError:
        LOG.exception("the site's data or models do not fit the experiment")
        return RefusedError("its data or models do not fit the experiment; the site's log says why")

    def host(self, experiment: Any, folder: Path, held_out: Collection[str] = ()) -> Hosted:
        """Return the site's own data under the experiment's settings.

        Raises:
            RefusedError: The file does not allow it, or the site's data do not fit.
        """
        file, spec = self._file, self._spec(experiment)
        try:
            spec = replace(spec, data=self._settled(folder))
        except UserError as error:
            raise self._unfit() from error
        withheld = (NAMES | {OWN_ADAPTER, CRITIC}) - set(file.may_leave)
        limits = {
            "does": self._does(spec),
            "gives": lambda name: (
                not any(part.startswith(tuple(withheld)) for part in name.split("/"))
            ),
            "bounds": Bounds(
                message=file.max_message_mb * 10**6,
                memory=file.limits.max_memory_mb * 10**6,
                disk=file.limits.max_disk_mb * 10**6,
                calls=file.limits.max_calls,
                seconds=file.limits.max_seconds,
                openings=file.limits.max_openings,
                examples=file.limits.least_examples,
                evaluated=file.limits.least_evaluated,
                check=self._known(spec),
            ),
        }
        try:
            reading = spec.read().settled()
            clients = reading.clients
            if held_out and file.split_key is not None:
                clients = tuple(self._without(one, spec, set(held_out)) for one in clients)
            if file.partition is None:
                clients = (replace(clients[0], name=file.client or self._name),)
            unread = len(reading.unusable)
            site = hosted(
                spec,
                dict(enumerate(clients)),
                folder,
                unread,
                max_epsilon={str(level): most for level, most in file.limits.max_epsilon.items()},
                **limits,
            )
        except UserError as error:  # whose text may hold rows
            raise self._unfit() from error
        file.limits.refuse_ends(site.task.adapted_ends)
        file.limits.refuse_small(site.about)
        told = _of_rows if spec.of_units else dict[str, Any]
        unnumbered = {
            name: {key: value for key, value in told(about).items() if key != "number"}
            for name, about in site.about.items()
        }
        return replace(site, about=unnumbered)

    def _without(self, client: ClientData, spec: Experiment, held_out: set[str]) -> ClientData:
        """Return a client without training rows whose prompts are held out at any site."""
        key, by = str(self._file.split_key), spec.data.split_by
        train = filtered(client.train, lambda row: keyed(row.prompt, by, key) not in held_out)
        if not train:
            raise UserError(
                f"client {client.name!r}: all its training prompts are held out at other sites."
            )
        return replace(client, train=train)

    def _consent(self, spec: Experiment) -> None:
        file = self._file
        # an algorithm of somebody's own is consented to as module:Class, not as it calls itself
        algorithm = config.dump(spec)["algorithm"]["name"]
        if algorithm not in file.algorithms:
            raise RefusedError(
                f"this site takes no part in {algorithm}; it does in {', '.join(file.algorithms)}"
            )
        if spec.rounds > file.max_rounds:
            raise RefusedError(
                f"{spec.rounds} rounds are more than the {file.max_rounds} that this site "
                "consents to"
            )
        if spec.diagnostics and not file.diagnostics:
            raise RefusedError("this site lets no diagnostics be measured")
        own = [file.judge.code] if file.judge and file.judge.code else []
        refuse_code(spec, [*file.functions, *own])
        file.limits.refuse(spec)

    def _here(self, model: str) -> str:
        if model not in self._file.models:
            raise RefusedError(f"the model {model!r} is none of those that this site consents to")
        return self._file.models[model]

    @staticmethod
    def _known(spec: Experiment) -> Callable[[Any, str], None]:
        """Return a check that a plain argument of work is one that the experiment has.

        Otherwise a coordinator would consent for the site to other settings.
        """
        trains = spec.algorithm.given(spec.federation.join_steps)
        measures = (spec.evaluate_pairs or 0, "clients", "newcomers")

        def check(value: Any, purpose: str) -> None:
            known = measures if purpose == "evaluate" else trains
            are_names = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
            if isinstance(value, bool) or (are_names and spec.diagnostics):
                return
            # by kind too: True is 1, and 1.0 as well
            if not any(type(one) is type(value) and one == value for one in known):
                raise RefusedError("an argument of work that is none of the experiment's settings")

        return check

    def _does(self, spec: Experiment) -> Callable[[str, str], bool]:
        """Return whether a piece of work may be asked for, in a phase of a purpose.

        Allowed are the algorithm's own works, and in evaluations what measures, with diagnostics
        if they are consented to.
        """
        measures = {
            work.name
            for work in (*evaluations.WORKS, *(diagnostics.WORKS if spec.diagnostics else ()))
        }
        trains = {work.name for work in spec.algorithm.works}
        return lambda work, purpose: work in (measures if purpose == "evaluate" else trains)


def consenting(name: str, path: Path) -> tuple[Consenting, Path]:
    """Return a site by its file, and the folder where it keeps its side of runs.

    Raises:
        UserError: The file does not fit, or the site takes part in nothing.
    """
    file = SiteFile.load(path)
    if not file.algorithms:
        raise UserError(
            f"{path}: algorithms: the site takes part in nothing. Name those that it consents to."
        )
    return Consenting(name, file), Path(file.folder)
