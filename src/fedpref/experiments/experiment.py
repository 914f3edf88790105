"""An experiment: everything that decides a result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from fedpref import config
from fedpref.algorithms import AnyAlgorithm, FedDPO
from fedpref.channel.chain import Chain
from fedpref.channel.compression import Compression
from fedpref.data import Builtin, ClientData, Natural, Partition, Source
from fedpref.data.preferences import Side
from fedpref.data.reading import EvaluateOn, Reading, read
from fedpref.data.splits import place
from fedpref.data.unusable import Unusable, refuse_empty
from fedpref.engines import Telling
from fedpref.engines.many import MANY, DrawnShards
from fedpref.engines.sites import Patience
from fedpref.errors import UserError
from fedpref.experiments.attack import Attack
from fedpref.experiments.choosing import Keep, Standing, Stop
from fedpref.experiments.free_baselines import FREE_BASELINES
from fedpref.experiments.idle import refuse_idle, warn_of_idle
from fedpref.experiments.lines import Baseline, baseline
from fedpref.experiments.migration import refuse_former_names
from fedpref.experiments.packaged import config_file
from fedpref.experiments.private import guarantee_of, refuse_seen, refuse_unaccounted
from fedpref.experiments.robustness import gold_digest, refuse_robust
from fedpref.federation.aggregation import Factors, Product
from fedpref.federation.diagnostics import Diagnostic
from fedpref.federation.network import Network
from fedpref.federation.participation import Participation
from fedpref.numerics import seeds
from fedpref.numerics.files import whole_path
from fedpref.numerics.metrics import ACCURACY
from fedpref.numerics.min_norm import require_solver
from fedpref.numerics.topology import GraphFile
from fedpref.privacy import Masks, Privacy
from fedpref.tasks import AnyTask, OpinionTask, PreferenceTask, Task
from fedpref.types import Count, Name, WholeNumber

FEWEST = 8  # examples that are evaluated apart from the others
OF_OBJECTIVES = ("rewards", ACCURACY)  # begin the names of metrics of one objective


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a result. `Experiment.load` reads and checks a YAML file of it."""

    name: Name = "experiment"
    """Begins the name of the run directory; runs that differ by their seed alone share it."""
    data: Source = Builtin()
    """Where rows come from."""
    partition: Partition = Natural()
    """How rows come to clients."""
    task: AnyTask = PreferenceTask()
    """What is learned: the model, the loss, what is measured."""
    algorithm: AnyAlgorithm = FedDPO()
    """How clients learn together."""
    federation: Participation = Participation()
    """Who takes part in a round, and with what weight."""
    network: Network = Network()
    """The graph between clients, of decentralised algorithms."""
    rounds: Count = 10
    """How many rounds are trained."""
    seed: WholeNumber = 0
    """The root of all random draws."""
    evaluate_every: WholeNumber = 0
    """Rounds between evaluations; 0 evaluates after the last one only."""
    evaluate_clients: Count | None = None
    """Clients that are evaluated, the same ones each time, by a hash of their names; null takes
    all. Of more than some thousand clients that is most of a run's time."""
    evaluate_all_at_end: bool = False
    """Let the last evaluation be of all clients nevertheless."""
    evaluate_pairs: Annotated[int, Field(ge=FEWEST)] | None = None
    """Held-out pairs of each client in the evaluations before the last, drawn once; null takes
    all."""
    evaluate_on_start: bool = False
    """Evaluate before the first round too."""
    evaluate_on: EvaluateOn = "test"
    """What the last evaluation is on: the test's rows, or those of `data.validation_fraction`, by
    which settings are chosen. Where such are set aside, evaluations before it are on them in either
    case, and the test's rows are read once."""
    stop: Stop | None = None
    """Stop a line when evaluations on validation rows get no better."""
    keep: Keep = "last"
    """Which round's model stands in the end: the last one's, or that of the best evaluation on
    validation rows."""
    privacy: Privacy | tuple[Privacy, Privacy] | None = None
    """Differential privacy of what is shared: one promise, or one of clients and one of what each
    has; null promises none."""
    secrecy: Masks | None = None
    """Sums of which the coordinator sees the whole alone, over sites; null lets it see what each
    client sends. In one process the same integers are summed, without masks."""
    attack: Attack | None = None
    """Hostile clients, in a simulated run, to see what a setting withstands; null has none."""
    diagnostics: tuple[Diagnostic, ...] = ()
    """What to measure with every evaluation beside metrics; clients send for it what a method may
    keep private."""
    checkpoint_every: Count = 1
    """Rounds between checkpoints."""
    workers: Count | None = None
    """Processes of one thread each; by default one a processor or GPU. On processors the result
    is the same for any number."""
    spill_above_mb: WholeNumber = 512
    """MB of a value that all clients hold which stay in memory; the rest lies in files of TMPDIR.
    Rows of data that take more than this lie in such a file too, all of them."""
    engine: Literal["simulation", "flare"] = "simulation"
    """All clients in this process and its workers, or at sites on NVIDIA FLARE."""
    sites: Count = 2
    """How many sites are simulated, where the engine is flare and nothing is submitted."""
    patience: Patience = Patience()
    """How long sites are waited for."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that are told what happens; none leaves this machine by default."""
    baselines: tuple[Baseline, ...] = ()
    """Lines to run beside the algorithm on the same data: each client alone, one model for all by
    federated averaging, all data pooled; for algorithms with parts of a client's own, each client
    alone with the same parts, one model for all with a reward head of each client's own, and such
    a head alone on the untrained model; and those that train no language model: Bradley-Terry
    regressions on word counts or on the untrained model's hidden states, each client's own, one for
    all, and one for all with clients' own slopes; and the longer answer. Of opinions, what other
    groups answered to the same question, and equal shares. One that is the algorithm is not run
    twice."""

    def __post_init__(self) -> None:
        config.refuse_plain(self, "")
        self._check_federation()
        self._check_choice()
        refuse_unaccounted(self)
        refuse_seen(self)
        refuse_robust(self)
        self._check_task()
        self._check_aggregate()

    def _check_federation(self) -> None:
        algorithm = self.algorithm
        if self.engine != "simulation" and self.patience.rounds_per_job % self.checkpoint_every:
            raise UserError(
                "patience.rounds_per_job must be a multiple of checkpoint_every: a job that "
                "follows begins at a checkpoint."
            )
        is_steady = self.network.is_fixed and self.federation.takes_everybody
        if algorithm.needs_fixed_network and not is_steady:
            raise UserError(
                f"network: {algorithm.name} needs the same neighbours in every round. Leave out "
                "link_failure, redraw, one-peer-exponential, federation.clients_per_round, "
                "federation.deadline and federation.newcomers."
            )
        if self.evaluate_clients is not None:
            is_private = any(promise.metrics == "private" for promise in self.promises)
            if is_private or self.secrecy is not None:
                raise UserError(
                    "evaluate_clients: figures that are private, or sums under masks, are of all "
                    "clients. Leave it out."
                )
        if self.uplink.stages:
            is_own = algorithm.compression is not None
            reasons = {
                f"{algorithm.name} compresses its changes itself": is_own
                and self.federation.compress,
                "what federation.clip cuts off would never be sent": is_own
                and self.federation.clip,
                "under masks the words that are summed are sent, of a fixed size": self.secrecy,
                "noise on sums is of whole numbers, which are sent": self.of_clients,
                f"{algorithm.name} has no mean; network.compress is for neighbours": (
                    algorithm.gossips
                ),
            }
            for reason, is_so in reasons.items():
                if is_so:
                    if not is_own or self.federation.compress:
                        raise UserError(f"federation.compress: {reason}. Leave it out.")
                    raise UserError(
                        f"{algorithm.name} sends compressed changes: {reason}. Leave that out, or "
                        "take algorithm: feddpo."
                    )
        if self.federation.concurrency is not None:
            if not algorithm.waits_for_nobody:
                raise UserError(
                    f"federation.concurrency: {algorithm.name} does not know what is old. Take "
                    "algorithm: fedbuff, or leave it out."
                )
            if self.promises:
                raise UserError(
                    "federation.concurrency: who is done when is drawn otherwise than privacy "
                    "counts on. Leave one of them out."
                )
        if algorithm.weighs_clients and self.federation.weighting != "equal":
            raise UserError(
                "algorithm.weights: they would be multiplied by those of federation.weighting. "
                "Set that to equal."
            )

    def _check_choice(self) -> None:
        if self.stop is None and self.keep == "last":
            return
        who = "keep: best" if self.stop is None else "stop"
        if not self.data.validation_fraction:
            raise UserError(
                f"{who}: nothing is decided by the test's rows. Set aside others by "
                "data.validation_fraction, such as 0.2."
            )
        if not self.evaluate_every:
            raise UserError(
                f"{who}: there is nothing to look at without evaluate_every, such as 1."
            )
        metric, known = None if self.stop is None else self.stop.metric, self.task.measures
        if metric is None or not known or metric in known:
            return
        if metric not in {f"{of}/{name}" for name in self.task.objectives for of in OF_OBJECTIVES}:
            raise UserError(
                f"stop.metric: evaluations of the task {self.task.name} do not measure {metric!r}; "
                f"they may have {', '.join(sorted(known))}."
            )

    @property
    def promises(self) -> tuple[Privacy, ...]:
        """What is promised of privacy."""
        if self.privacy is None:
            return ()
        return (self.privacy,) if isinstance(self.privacy, Privacy) else self.privacy

    @property
    def of_clients(self) -> Privacy | None:
        """The promise of clients, if there is one."""
        return next((promise for promise in self.promises if promise.is_of_clients), None)

    @property
    def of_units(self) -> Privacy | None:
        """The promise of what a client has, if there is one."""
        return next((promise for promise in self.promises if not promise.is_of_clients), None)

    @property
    def telling(self) -> Telling:
        """What is told of clients' figures, if sums are not under masks."""
        told = {promise.tells for promise in self.promises}
        if "none" in told:
            return "none"
        return "private" if "private" in told else "each"

    @property
    def validates(self) -> bool:
        """Whether evaluations before the last are on rows that are set aside for them."""
        return self.evaluate_on == "test" and self.data.validation_fraction > 0

    @property
    def reading(self) -> str:
        """How often the test's rows are read, in a sentence; empty where nothing is evaluated
        before the end.
        """
        if self.evaluate_on == "validation":
            return "Measured on validation rows alone; the test's are not read."
        if self.validates:
            return "The test's rows are read once, at the end; what comes before is on others."
        if self.evaluate_every or self.evaluate_on_start:
            return (
                "The test's rows are read at every evaluation: choose nothing by these figures, or "
                "set data.validation_fraction."
            )
        return ""

    @property
    def uplink(self) -> Chain:
        """The stages on the way into a mean."""
        own = self.algorithm.compression
        if own is None:
            return self.federation.uplink
        compression: Compression = TypeAdapter(Compression).validate_python(own)
        return Chain((compression.stage(),))

    @property
    def looks(self) -> Literal["glance", "validate"]:
        """What evaluations before the last are made for."""
        return "validate" if self.validates else "glance"

    def evaluates_on(self, purpose: str) -> EvaluateOn:
        """Return what an evaluation of a purpose is on."""
        return "validation" if purpose == "validate" else self.evaluate_on

    def looks_after(self, rounds: int) -> bool:
        """Return whether there is an evaluation after so many rounds beside the last one.

        After the last round there is one where it may decide something, or is on other rows.
        """
        if not self.evaluate_every or rounds < self.rounds:
            return self.evaluate_every > 0 and rounds % self.evaluate_every == 0
        return self.validates or self.stop is not None or self.keep == "best"

    def stops(self, stands: Standing) -> bool:
        """Return whether a line is over, for its evaluations got no better."""
        return self.stop is not None and stands.since >= self.stop.patience

    def _check_task(self) -> None:
        task, algorithm = self.task, self.algorithm
        if parts := algorithm.parts:
            task.check(parts)
        of_examples = [name for name in self.diagnostics if name != "pareto-stationarity"]
        if of_examples and not task.measures_examples:
            raise UserError(
                f"diagnostics: the task {task.name} has no single loss of its examples, which "
                f"{of_examples[0]} is about. Leave it out."
            )
        if len(of_examples) < len(self.diagnostics) and len(task.objectives) < 2:
            raise UserError(
                "diagnostics: pareto-stationarity is about several objectives, and the task has "
                "one. Leave it out."
            )
        if len(of_examples) < len(self.diagnostics):
            require_solver()
        if task.needs_critics and not (algorithm.keeps_critics and not self.baselines):
            who = algorithm.name if not algorithm.keeps_critics else " and ".join(self.baselines)
            raise UserError(
                f"task.estimator: ppo needs critics, which {who} does not keep. Take rloo or grpo; "
                "or firm, scalarized, fsmgda or fedcmoo as the algorithm, and no baselines."
            )
        if isinstance(task, OpinionTask) and algorithm.keeps_critics:
            raise UserError(
                f"algorithm: {algorithm.name} weighs several rewards of answers, and a predictor "
                "of opinions has one loss. Take pluralllm or feddpo."
            )
        if isinstance(task, OpinionTask) and algorithm.local.max_tokens_per_batch is not None:
            raise UserError(
                "algorithm.local.max_tokens_per_batch: a predictor's batches are counted in tasks. "
                "Set batch_size."
            )
        wanted = {"preference": {*FREE_BASELINES} - {"majority"}, "opinion": {"majority"}}
        for name in {*self.baselines} & FREE_BASELINES.keys() - wanted.get(task.name, set()):
            what = "predicts groups' opinions" if name == "majority" else "ranks pairs of answers"
            raise UserError(
                f"baselines: {name} {what}, which the task {task.name} does not have. Leave it out."
            )
        for name in self.baselines:
            line = baseline(self, name, 1)
            if line is not None and line.parts:
                task.check(line.parts)
        if self.evaluate_pairs is not None and not task.can_be_thinned:
            raise UserError(
                f"evaluate_pairs: the task {task.name} evaluates all that it holds out. Leave it "
                "out."
            )
        algorithm.check_task(task)

    def _check_aggregate(self) -> None:
        algorithm, aggregate = self.algorithm, self.algorithm.aggregate
        of_factors = algorithm.adapts or not isinstance(aggregate, Factors | None)
        if of_factors and not self.task.adapts:
            raise UserError(
                f"algorithm: {algorithm.name} is about the factors of an adapter, of which the "
                f"task {self.task.name} trains none. Take pluralllm, feddpo or decdpo, with "
                "algorithm.aggregate: factors."
            )
        if isinstance(aggregate, Product):
            if self.diagnostics and algorithm.gossips:
                raise UserError(
                    "diagnostics: they are about clients' mean adapter; where products are mixed "
                    "(algorithm.aggregate) there is none."
                )
            adapter: Any = self.task.model  # tasks that adapt have a language model
            aggregate.check(algorithm.local, adapter.lora_r)

    def check_clients(self, sizes: Mapping[str, int], *, begins: bool = True) -> None:
        """Check what the experiment says of clients.

        Args:
            sizes: Each client's number of training examples.
            begins: Whether it is not under way yet; what does nothing is refused then.

        Raises:
            UserError: It does not fit these clients.
        """
        # not where a config is read: runs of older versions can still be looked at
        algorithm = self.algorithm
        self.federation.check()
        if begins:
            refuse_idle(self)
            warn_of_idle(self, len(sizes))
        self.task.check_clients(sizes)
        chances = self.federation.weights(sizes, self.seed)
        guarantee_of(self, len(sizes) - self.federation.num_newcomers)
        compression = self.network.compression
        if algorithm.needs_contraction and compression and not compression.contracts:
            raise UserError(
                f"network.compression: with {compression.name} of so few bits, {algorithm.name} "
                "does not converge: what is lost in a round grows. Take three bits or more, or "
                "top-k."
            )
        algorithm.check_clients(tuple(sizes))
        if algorithm.gossips:
            taking_part = [client for client, chance in enumerate(chances) if chance > 0]
            self.network.check(list(sizes), taking_part, self.federation.takes_everybody)

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """Read an experiment.

        Args:
            path: A YAML file, or the name of a config that comes with fedpref.
            overrides: Settings that replace the file's, as in `task.loss.beta=0.2`.

        Raises:
            UserError: Whatever does not fit, all mistakes together.
        """
        if not isinstance(path, str | Path):
            raise UserError(
                f"Experiment.load reads a file, found {type(path).__name__}. Keys and values are "
                "taken by Experiment.of({...})."
            )
        return config.load(Experiment, config_file(path), overrides, check=refuse_former_names)

    @staticmethod
    def of(content: Mapping[str, Any]) -> Experiment:
        """Return the experiment that keys and values say, as those of a YAML file.

        Args:
            content: The keys and values; what is absent has its default.

        Raises:
            UserError: Whatever does not fit, all mistakes together.
        """
        if not isinstance(content, Mapping):
            raise UserError(
                f"an experiment is keys and values, a file or a config's name, not {content!r:.80}."
            )
        refuse_former_names(dict(content), "the experiment")
        return config.parse(Experiment, dict(content), "the experiment")

    def build_task(self) -> Task:
        """Load the model and return the task at work.

        Raises:
            UserError: The model cannot be loaded, or cannot have the parts that the algorithm
                gives to clients.
        """
        # finished runs hold experiments, which are defined here
        from fedpref.experiments.finished import open_groups

        task = self.task.build(open_groups)
        if parts := self.algorithm.parts:
            task.parts(parts, seeds.generator(self.seed, "check"))
        return task

    def evaluated(self, names: Sequence[str], clients: Sequence[int], is_last: bool) -> list[int]:
        """Return which clients an evaluation is of.

        Args:
            names: Of all clients.
            clients: Those that could be.
            is_last: Whether it is the run's last one.
        """
        few = self.evaluate_clients
        if few is None or few >= len(clients) or (is_last and self.evaluate_all_at_end):
            return list(clients)
        return sorted(sorted(clients, key=lambda i: place(names[i], self.seed, "evaluate"))[:few])

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides of the split of which every client needs rows."""
        return ("train", "test", "validation") if self.validates else ("train", "test")

    def read(self, trained: Collection[str] = ()) -> Reading:
        """Read the data and share it out; see `data.reading.read`."""
        draws = seeds.seed(self.seed, "partition")
        apart = self.of_clients is not None
        found = read(
            self.data,
            self.partition,
            draws,
            trained,
            self.evaluate_on,
            apart=apart,
            room=self.spill_above_mb * 10**6,
        )
        if self.attack is None:
            return found
        late = self.federation.joining([client.name for client in found.clients], self.seed)
        return replace(found, clients=self.attack.poisoned(found.clients, self.seed, late))

    def clients(self) -> tuple[tuple[ClientData, ...], int]:
        """Read the data and share it out.

        Returns:
            Every client's rows; how many training rows were left out because their prompt is a
            test prompt.

        Raises:
            UserError: Rows cannot be used, unless `data.unusable` skips them.
        """
        reading = self.read().settled()
        return reading.clients, reading.left_out


def encoded(experiment: Experiment, task: Task) -> tuple[Reading, Sequence[Any]]:
    """Read the data and encode it, and say of all rows at once what cannot be used.

    Returns:
        What was read, and each client's shard; of many clients those that are made when drawn.

    Raises:
        UserError: Rows cannot be used, unless `data.unusable` skips them; a client has no row left.
    """
    reading = experiment.read()
    unusable: list[Unusable] = []
    if len(reading.clients) > MANY:
        reading = reading.settled()
        return reading, DrawnShards(task, reading.clients, experiment.data.unusable)
    shards = [task.encode(client, unusable) for client in reading.clients]
    reading = reading.with_more(unusable).settled()
    if unusable:
        refuse_empty(shards, experiment.sides)
    return reading, shards


def with_whole_paths(experiment: Experiment, *, has_data: bool = True) -> Experiment:
    """Return the experiment with local paths made absolute, so that it can be resumed anywhere.

    Args:
        experiment: The experiment.
        has_data: Whether its data are here, and not at sites; data that grow are then taken as they
            are now.
    """
    changed = replace(
        experiment,
        task=experiment.task.with_models(whole_path),
        data=experiment.data.with_paths(whole_path),
    )
    if has_data:
        changed = replace(changed, data=changed.data.at_its_state())
    federation = changed.federation
    if federation.gold is not None:
        gold = whole_path(federation.gold)
        is_new = not federation.gold_digest and Path(gold).is_file()
        digest = gold_digest(Path(gold)) if is_new else federation.gold_digest
        changed = replace(changed, federation=replace(federation, gold=gold, gold_digest=digest))
    topology = experiment.network.topology
    if isinstance(topology, GraphFile):
        topology = replace(topology, path=whole_path(topology.path)).with_digest()
        changed = replace(changed, network=replace(experiment.network, topology=topology))
    return changed
