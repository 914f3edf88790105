"""An experiment: everything that decides a result, and the lines it consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from fedpref import config, seeds
from fedpref.aggregation import Factors, Product
from fedpref.algorithms import AnyAlgorithm, Centralised, FedDPO, Local
from fedpref.data import Builtin, ClientData, Natural, Partition, Source, partition, split
from fedpref.diagnostics import Diagnostic
from fedpref.engines.remote import Patience
from fedpref.errors import UserError
from fedpref.models.language import BUILTIN
from fedpref.network import Network
from fedpref.participation import Participation
from fedpref.rewards import Function
from fedpref.tasks import AnyTask, PreferenceTask
from fedpref.topology import GraphFile

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a result. `Experiment.load` reads and validates it; the defaults are the ones here."""

    name: str = "experiment"
    data: Annotated[Source, Field(discriminator="name")] = Builtin()
    partition: Annotated[Partition, Field(discriminator="name")] = Natural()
    task: Annotated[AnyTask, Field(discriminator="name")] = PreferenceTask()
    algorithm: Annotated[AnyAlgorithm, Field(discriminator="name")] = FedDPO()
    federation: Participation = Participation()
    network: Network = Network()  # of decentralised algorithms
    rounds: Count = 10
    seed: Annotated[int, Field(ge=0)] = 0
    evaluate_every: Annotated[int, Field(ge=0)] = 0  # rounds; 0: after the last one only
    evaluate_on_start: bool = False  # before the first round too
    diagnostics: tuple[Diagnostic, ...] = ()  # measured with every evaluation; clients send what a method may keep private
    checkpoint_every: Count = 1  # rounds
    workers: Count | None = None  # processes of one thread; None: as many as processors; the result is the same for any number
    spill_above_mb: Annotated[int, Field(ge=0)] = 512  # of a value that all clients hold: what is above lies in files of TMPDIR
    engine: Literal["simulation", "flare"] = "simulation"  # all clients in this process and its workers, or at sites (docs/sites.md)
    sites: Count = 2  # simulated ones, where the engine is flare and the experiment is run, not submitted
    patience: Patience = Patience()  # with sites
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()  # trackers; none leaves this machine by default
    references: tuple[Literal["local", "centralised"], ...] = ()  # lines to run beside the algorithm, on the same data

    def __post_init__(self) -> None:
        if parts := getattr(self.algorithm, "parts", None):
            self.task.check(parts)
        if self.engine != "simulation" and self.patience.rounds_per_job % self.checkpoint_every:
            raise UserError("patience.rounds_per_job must be a multiple of checkpoint_every: a job that follows begins at a checkpoint.")
        if getattr(self.algorithm, "needs_fixed_network", False) and not (self.network.is_fixed and self.federation.takes_everybody):
            raise UserError(
                f"network: {self.algorithm.name} needs the same neighbours in every round. Leave out link_failure, redraw, "
                "one-peer-exponential, federation.clients_per_round, federation.deadline and federation.newcomers."
            )
        if getattr(self.algorithm, "weighs_clients", False) and self.federation.weighting != "equal":
            raise UserError("algorithm.weights: they would be multiplied by those of federation.weighting. Set that to equal.")
        of_examples = [name for name in self.diagnostics if name != "pareto-stationarity"]
        if of_examples and not self.task.measures_examples:
            raise UserError(
                f"diagnostics: the task {self.task.name} has no single loss of its examples, which {of_examples[0]} is about. Leave it out."
            )
        if len(of_examples) < len(self.diagnostics) and len(self.task.objectives) < 2:
            raise UserError("diagnostics: pareto-stationarity is about several objectives, and the task has one. Leave it out.")
        if getattr(self.task, "needs_critics", False) and not getattr(self.algorithm, "keeps_critics", False):
            raise UserError(
                f"task.estimator: ppo needs critics, which {self.algorithm.name} does not keep. Take rloo or grpo; or firm, scalarised, "
                "fsmgda or fedcmoo as the algorithm, and no references."
            )
        if check := getattr(self.algorithm, "check_objectives", None):
            check(self.task.objectives)
        aggregate = getattr(self.algorithm, "aggregate", None)
        if not self.task.adapts and (getattr(self.algorithm, "adapts", False) or not isinstance(aggregate, Factors | None)):
            raise UserError(
                f"algorithm: {self.algorithm.name} is about the factors of an adapter, of which the task {self.task.name} trains none. "
                "Take pluralllm, feddpo or decdpo, with algorithm.aggregate: factors."
            )
        if isinstance(aggregate, Product):
            if self.diagnostics and self.gossips:
                raise UserError(
                    "diagnostics: they are about clients' mean adapter; where products are mixed (algorithm.aggregate) there is none."
                )
            aggregate.check(self.algorithm.local, cast(Any, self.task.model).lora_r)

    @property
    def gossips(self) -> bool:
        """Whether clients tell one another what they learn, over the experiment's network."""
        return getattr(self.algorithm, "gossips", False)

    def check_clients(self, sizes: Mapping[str, int]) -> None:
        """Raise UserError where what the experiment says of clients does not fit these, given with their numbers of training examples."""
        chances = self.federation.weights(sizes, self.seed)
        if unknown := sorted(getattr(self.algorithm, "preferences", {}).keys() - sizes.keys()):
            raise UserError(f"algorithm.preferences: {unknown[:5]} are no clients; the clients are {list(sizes)[:8]}.")
        if self.gossips:
            taking_part = [client for client, chance in enumerate(chances) if chance > 0]
            self.network.check(list(sizes), taking_part, self.federation.takes_everybody)

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
        """Read a YAML file and `key.sub=value` overrides; raises UserError for whatever does not fit."""
        return config.load(Experiment, Path(path), overrides)

    def build_task(self) -> Any:
        """The task at work; raises UserError if its model cannot have the parts that the algorithm gives to clients."""
        task = self.task.build()
        if parts := getattr(self.algorithm, "parts", None):
            task.parts(parts, seeds.generator(self.seed, "check"))
        return task

    def clients(self) -> tuple[tuple[ClientData, ...], int]:
        """Every client's rows, and the number of training rows left out because their prompt is a test prompt."""
        rows, left_out = split(self.data.read(), getattr(self.data, "test_fraction", 0.2))
        return partition(rows, self.partition, seeds.seed(self.seed, "partition")), left_out


def lines(experiment: Experiment, clients: int) -> dict[str, tuple[str, Experiment]]:
    """The algorithm's own line and the reference lines: name -> (subfolder, experiment).

    References train with the same local settings; a step of the centralised line accumulates as many batches as the cohort has
    clients, so that all lines take the same number of steps, and the centralised one sees as many pairs. Alone, every client trains in
    every round.
    """
    found: dict[str, tuple[str, Experiment]] = {experiment.algorithm.name: ("", experiment)}
    local = experiment.algorithm.local
    clients -= experiment.federation.num_newcomers
    cohort = min(experiment.federation.clients_per_round or clients, clients)
    pooled = replace(local, gradient_accumulation_steps=local.gradient_accumulation_steps * cohort)
    for name in experiment.references:
        if name == experiment.algorithm.name:
            continue
        algorithm = Local(local=local) if name == "local" else Centralised(local=pooled)
        everybody = replace(experiment.federation, clients_per_round=None, sampling="uniform", sampling_weights={}, deadline=None)
        task: Any = experiment.task
        silent = replace(task, samples=0) if hasattr(task, "samples") else task  # answers to be read are the algorithm's own
        line = replace(experiment, algorithm=algorithm, federation=everybody, task=silent, references=())
        found[name] = (f"references/{name}", line)
    return found


def with_whole_paths(experiment: Experiment) -> Experiment:
    """Local paths made absolute, so that a run can be resumed from anywhere."""

    def whole(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path

    changed: Any = replace(experiment, task=with_models(experiment.task, whole))
    if hasattr(experiment.data, "path"):
        data: Any = experiment.data
        changed = replace(changed, data=replace(data, path=whole(data.path)))
    if isinstance(experiment.network.topology, GraphFile):
        topology = replace(experiment.network.topology, path=whole(experiment.network.topology.path)).with_digest()
        changed = replace(changed, network=replace(experiment.network, topology=topology))
    return cast(Experiment, changed)


def with_models(task: Any, renamed: Callable[[str], str]) -> Any:
    """A task with its model, if that is not the shipped one, and the models and runs that its rewards read, by other names."""
    changed = task if task.model.path == BUILTIN else replace(task, model=replace(task.model, path=renamed(task.model.path)))
    if not hasattr(task, "rewards"):
        return changed
    return replace(changed, rewards={name: _with_model(reward, renamed) for name, reward in task.rewards.items()})


def _with_model(reward: Any, renamed: Callable[[str], str]) -> Any:
    if isinstance(reward, Function):  # whose path is no file
        return reward
    return replace(reward, **{key: renamed(getattr(reward, key)) for key in ("path", "run") if hasattr(reward, key)})
