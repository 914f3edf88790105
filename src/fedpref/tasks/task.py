"""The interface of learning problems to the local loop and to experiments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data.preferences import ClientData
from fedpref.data.unusable import Unusable
from fedpref.models.named import BUILTIN
from fedpref.models.own_parts import Parts
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree
from fedpref.privacy import Unit
from fedpref.rewards.reward import OpenGroups, RewardSettings, no_groups
from fedpref.tasks.batches import BatchSize

ExampleOutcome = tuple[str, float] | tuple[str, float, float]
CRITIC = "critic."  # begins the names of parameters that predict an objective's rewards


@dataclass(frozen=True)
class Apart:
    """Gradients of S pieces of units, a piece being what a unit has of one objective.

    Attributes:
        gradients: By parameter [S, ...].
        units: Which pieces are shortened together, by number: those of a unit are here all.
        objectives: The number of each piece's objective.
    """

    gradients: Tree
    units: Sequence[int]
    objectives: Sequence[int]


class Shard(Protocol):
    """One client's data."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int:
        """Return the number of training examples: the client's weight in a mean by examples."""
        ...

    def validating(self) -> Self:
        """Return the shard whose held-out examples are those that are set aside to choose by."""
        ...


class TaskSettings(ABC):
    """The settings of a learning problem, a frozen dataclass; `build` makes the problem itself.

    What an experiment must know of it before anything is loaded is declared here, with defaults.
    """

    name: str
    model: Any

    adapts: ClassVar[bool] = False
    """It trains a LoRA adapter of a model, whose factors algorithms may treat apart."""

    measures: ClassVar[frozenset[str]] = frozenset()
    """Names of metrics that evaluations may have, beside those of an objective, which end in its
    name; empty where they are not known beforehand."""
    units: ClassVar[frozenset[str]] = frozenset()
    """Whose gradients it can take apart, as privacy of what a client has needs it: `example`,
    `prompt`, `question`, `column`."""
    pieces_of_unit: ClassVar[int] = 1
    """In how many of the gradients that are clipped a unit may be, or what stands in its place."""

    @property
    @abstractmethod
    def objectives(self) -> tuple[str, ...]:
        """The names of the objectives, one for each loss."""

    @property
    @abstractmethod
    def measures_examples(self) -> bool:
        """Whether `batches` and `choices` are there, as diagnostics of examples need them."""

    @property
    def needs_critics(self) -> bool:
        """Whether clients keep critics, which predict rewards."""
        return False

    @property
    def runs_remote_code(self) -> bool:
        """Whether code that comes with a model would run."""
        return False

    @property
    def names_model_files(self) -> bool:
        """Whether more is said of a model than its name."""
        return False

    @property
    def can_be_thinned(self) -> bool:
        """Whether a few of a client's held-out examples can be evaluated alone."""
        return True

    @property
    def compares_by_shares(self) -> bool:
        """Whether clients are compared by a metric from 0 to 1."""
        return True

    @property
    def samples(self) -> int:
        """Held-out prompts of a client that are answered before training and after, to be read."""
        return 0

    def asks(self, client: str) -> bool:
        """Return whether a client's answers to `samples` prompts are kept."""
        return self.samples > 0

    def check_clients(self, names: Collection[str]) -> None:  # noqa: B027  # most name none
        """Say so if the task names clients that are not there."""

    @property
    def loss_name(self) -> str | None:
        """The loss's name, where there is a choice of losses."""
        return None

    def check(self, parts: Parts) -> None:  # noqa: B027  # most tasks have nothing to check
        """Raise UserError if clients cannot have these parts of their own under this task."""

    @abstractmethod
    def build(self, open_groups: OpenGroups = no_groups) -> Task:
        """Load the model and return the task at work.

        Args:
            open_groups: Opens rewards that are read off a finished run of opinions.
        """

    def reward_settings(self) -> Mapping[str, RewardSettings]:
        """Return the rewards by objective, where the task has any."""
        return {}

    def judged_by(self, judge: Any) -> Self:
        """Return the same task, whose answers another judge compares, where one compares them."""
        return self

    def without_samples(self) -> Self:
        """Return the same task, of whose answers none are kept to be read."""
        return self

    def evaluating(self, examples: int) -> Self:
        """Return the same task, whose evaluations take so many held-out examples at least."""
        return self

    def with_models(self, renamed: Callable[[str], str]) -> Self:
        """Return the same task with `renamed` applied to its model's path, unless it is shipped."""
        if self.model.path == BUILTIN:
            return self
        settings: Any = self  # a dataclass, as all settings are
        made: Self = replace(settings, model=replace(self.model, path=renamed(self.model.path)))
        return made


class Task(Protocol):
    """A learning problem: model, data and objective in one."""

    @property
    def description(self) -> str:
        """The model in words: its size, its arithmetic, how it computes."""
        ...

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the objectives, one for each loss."""
        ...

    @property
    def pieces_of_unit(self) -> int:
        """See `TaskSettings.pieces_of_unit`."""
        ...

    @property
    def prepares(self) -> str:
        """What `prepare` computes, in words; empty for nothing."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which parameters are trained."""
        ...

    @property
    def devices(self) -> int:
        """The number of workers on this machine that have a processor, or a GPU, of their own."""
        ...

    @property
    def adapted_ends(self) -> frozenset[str]:
        """Which ends of a language model are trained, whose gradients tell words of a row.

        `embeddings`, `head`.
        """
        ...

    def move_to(self, worker: int) -> None:
        """Move to the device of a worker, before anything is computed.

        Each of several workers is a process of its own.
        """
        ...

    def init(self, rng: torch.Generator) -> Tree:
        """Return fresh trainable parameters, on the CPU."""
        ...

    def parts(self, settings: Parts, rng: torch.Generator) -> Tree:
        """Return a client's own parts as they begin, under names that `init` does not use.

        Raises:
            UserError: The model cannot have them.
        """
        ...

    def encode(self, data: ClientData, unusable: list[Unusable] | None = None) -> Any:
        """Return a client's rows as the task reads them.

        Args:
            data: The rows.
            unusable: Takes the rows that cannot be used, which the shard then lacks; without it the
                first of them is raised.

        Raises:
            UserError: A row is none of this task's, or cannot be used.
        """
        ...

    def prepare(self, shard: Any, cache: Path) -> Any:
        """Return the shard with what is computed once about it.

        It is kept in a folder of files that are named after what they depend on.
        """
        ...

    def draw(
        self, params: Tree, start: Tree, shard: Any, size: BatchSize, rng: torch.Generator
    ) -> Any:
        """Draw a training batch.

        Args:
            params: The client's parameters as they are.
            start: Those that it began the round with.
            shard: The client's data.
            size: How large the batch is, and where in its epochs the client is, for tasks whose
                examples have epochs.
            rng: Random numbers.
        """
        ...

    def losses(self, params: Tree, batch: Any) -> tuple[Float[Tensor, " M"], Mapping[str, float]]:
        """Return one differentiable loss for each objective [M], and metrics of the batch.

        Metrics named `num_` are counts.
        """
        ...

    def units(self, shard: Any, unit: Unit) -> Sequence[int]:
        """Return which unit each training example belongs to, by number from 0.

        Raises:
            UserError: The task has no such units.
        """
        ...

    def private_batch(self, shard: Any, batch: int) -> tuple[float, Sequence[float]]:
        """Return the chance of each unit to be in a private batch, and what sums are divided by.

        Args:
            shard: The client's data.
            batch: The size of a batch, as in settings.

        Returns:
            The chance; for each objective the expected number of what its sum is of.
        """
        ...

    def gradients_apart(
        self,
        params: Tree,
        start: Tree,
        shard: Any,
        units: Sequence[Sequence[int]],
        batch: int,
        wanted: Collection[str],
        draws: seeds.Draws,
    ) -> Iterator[Apart]:
        """Yield the gradients of the summed losses of some units' training examples.

        Each unit's hang on its own examples and on random numbers of its own, whichever others are
        asked for.

        Args:
            params: The client's parameters as they are.
            start: Those that it began the round with.
            shard: The client's data.
            units: The numbers of each unit's examples.
            batch: The size of a batch, as in settings.
            wanted: The parameters whose gradients are asked for.
            draws: Random numbers, by an address of the unit's.
        """
        ...

    def batches(self, shard: Any) -> Iterator[tuple[Any, float]]:
        """Yield all training examples once, for `losses`, with each batch's share of them."""
        ...

    def evaluate(self, params: Tree, shard: Any) -> Mapping[str, float]:
        """Return metrics on the shard's held-out examples, whose number is `num_examples`."""
        ...

    def generated(self, params: Tree, shard: Any) -> Mapping[str, float]:
        """Return metrics of answers that the model gives when training is over, if asked for."""
        ...

    def choices(self, params: Tree, shard: Any) -> Float[Tensor, " n"]:
        """Return what is chosen for each held-out example [n], from 0 to 1, on the CPU.

        The order depends on the shard alone.
        """
        ...

    def outcomes(self, params: Tree, shard: Any) -> list[ExampleOutcome]:
        """Return of each held-out example a digest of its prompt and whether the model was right.

        Where a model states probabilities, the one that it gave to what is preferred is the third.
        There are none where a task has no examples that are right or wrong.
        """
        ...

    def samples(self, params: Tree, shard: Any) -> list[dict[str, Any]]:
        """Return held-out prompts with an answer before training and one after, and rewards."""
        ...

    def export(self, params: Tree, folder: Path) -> None:
        """Write the parameters as a folder that other tools load."""
        ...
