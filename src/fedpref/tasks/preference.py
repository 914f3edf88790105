"""Preference alignment of a language model: pairs of answers, and the DPO family of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data.preferences import ClientData, Preference, Row
from fedpref.data.unusable import Unusable, kept
from fedpref.errors import UserError
from fedpref.losses import DPO, Explicit, Hinge, Loss, PairScores
from fedpref.models.own_parts import Parts
from fedpref.models.packed import scored_tokens
from fedpref.numerics.metrics import ACCURACY, COMBINED
from fedpref.numerics.trees import Tree
from fedpref.rewards.reward import OpenGroups, no_groups
from fedpref.tasks.alignment import calibration_error
from fedpref.tasks.examples import Batch, Example, OfflineShard
from fedpref.tasks.offline import MINIMISED, OfflineLearner, OfflineTask, PerExample
from fedpref.tasks.task import ExampleOutcome

ENDS = frozenset({("a", "b"), ("A", "B"), ("0", "1"), ("1", "2")})
"""How the names of columns with two answers end."""


@dataclass(frozen=True, kw_only=True)
class PairTask(OfflineTask):
    """What tasks share that learn from pairs, by one of the DPO family's losses."""

    measures: ClassVar[frozenset[str]] = frozenset(
        {"loss", "loss_joint", "rewards/chosen", "rewards/rejected", "rewards/margins", ACCURACY}
        | {COMBINED, "rewards/accuracies_explicit", "calibration_error"}
    )

    loss: Loss = DPO()
    """The loss of a pair."""
    explicit: Explicit = Explicit()
    """How an explicit reward joins the loss, where clients have a reward head."""
    objective_column: str | None = None
    """A column that says which objective a pair is about; null for one objective."""
    objective_names: tuple[str, ...] = ()
    """What that column may say, in the order of preferences over objectives."""

    def __post_init__(self) -> None:
        if bool(self.objective_column) != bool(self.objective_names):
            raise ValueError(
                "task.objective_column and task.objective_names: give both, the column and what "
                "it may say"
            )
        if self.objective_names:
            self._check_names()

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.objective_names or (self.loss.name,)

    def check(self, parts: Parts) -> None:
        if not parts.reward:
            return
        if not isinstance(self.loss, DPO | Hinge):
            raise UserError(
                "algorithm.parts.reward: an explicit reward is defined beside the losses dpo "
                "and hinge, task.loss is "
                f"{self.loss.name}. Take one of these, or set algorithm.parts.reward to false."
            )
        if self.explicit.alpha and self.explicit.stop_gradient and not self.explicit.gamma:
            raise UserError(
                "task.explicit: with gamma 0 and stop_gradient nothing would train the reward "
                "head. "
                "Raise gamma, set stop_gradient to false, or leave the head out: "
                "algorithm.parts.reward=false."
            )

    @property
    def loss_name(self) -> str:
        return self.loss.name


@dataclass(frozen=True, kw_only=True)
class PreferenceTask(PairTask):
    """Preference pairs under one of the DPO family's losses."""

    units: ClassVar[frozenset[str]] = frozenset({"example", "prompt", "column"})

    name: Literal["preference"] = "preference"

    def build(self, open_groups: OpenGroups = no_groups) -> PreferenceLearner:
        return PreferenceLearner(self, open_groups)


def _two_answers(columns: Mapping[str, Any]) -> str:
    """Return how a row's columns could be read, where two of them look like answers; else "".

    They are texts whose names differ in their ends alone, as response_a and response_b.
    """
    texts = [name for name, value in columns.items() if isinstance(value, str)]
    for one, other in permutations(texts, 2):
        if one[:-1] == other[:-1] and (one[-1:], other[-1:]) in ENDS:
            return (
                f" Its columns {one!r} and {other!r} look like two answers: where each has a "
                "score beside it, read them by data.name: shp, whose settings name the columns "
                "(fedpref list shp); otherwise write the better one to chosen."
            )
    return ""


class PairLearner(OfflineLearner):
    """A task on pairs with its model loaded; an example's answers are the chosen one, then the
    rejected.
    """

    settings: PairTask

    def __init__(self, settings: PairTask, open_groups: OpenGroups = no_groups) -> None:
        super().__init__(settings, open_groups, needs_reference=settings.loss.needs_reference)

    def examples(
        self, rows: Sequence[Row], unusable: list[Unusable] | None = None
    ) -> tuple[list[Example], int]:
        encoded, cut = [], 0
        for row in rows:
            if not isinstance(row, Preference):
                raise UserError(
                    f"{row.where}: the row does not compare two answers, as the task "
                    f"{self.settings.name!r} needs them. "
                    "Set task.name to feedback for judgements of one answer, to opinion for "
                    "groups' opinions, "
                    "or give columns chosen and rejected." + _two_answers(row.columns)
                )
            with kept(unusable):
                prompt, answers = self.tokens(row.prompt, (row.chosen, row.rejected), row.where)
                prompt, (chosen, rejected), shortened = self.fit(prompt, answers, row.where)
                if chosen == rejected:
                    raise Unusable(
                        "alike",
                        row.where,
                        "the two answers are the same tokens to the model, after truncation if any",
                    )
                objective = self._objective(row)
                encoded.append(
                    Example(
                        prompt,
                        (chosen, rejected),
                        objective=objective,
                        columns=row.columns,
                        text=self.messages(row.prompt),
                    )
                )
                cut += shortened
        return encoded, cut

    def encode(self, data: ClientData, unusable: list[Unusable] | None = None) -> OfflineShard:
        """Return a client's rows as tokens; see `Task.encode`.

        Raises:
            UserError: The client has no pairs of an objective.
        """
        shard = super().encode(data, unusable)
        sides = {"training": shard.train, "held-out": shard.test, "validation": shard.validation}
        for side, examples in sides.items():
            if side == "validation" and not data.validation:
                continue
            if len(self.objectives) > 1 and (
                missing := set(range(len(self.objectives)))
                - {example.objective for example in examples}
            ):
                name = self.objectives[min(missing)]
                raise UserError(
                    f"client {data.name!r} has no {side} pairs of the objective {name!r}, and "
                    "each needs some of every objective. "
                    "Take another partition, or larger clients (partition.min_rows)."
                )
        return shard

    def _objective(self, row: Preference) -> int:
        column = self.settings.objective_column
        if column is None:
            return 0
        if row.columns.get(column) not in self.objectives:
            raise UserError(
                f"{row.where}, column {column!r}: expected one of {list(self.objectives)}, found "
                f"{row.columns.get(column)!r}."
            )
        return self.objectives.index(row.columns[column])

    def evaluate(self, params: Tree, shard: OfflineShard) -> Mapping[str, float]:
        """Return means over the shard's held-out pairs, as `OfflineLearner.evaluate` does.

        Under DPO, whose margin states a probability, `calibration_error` is how far that is from
        how often the policy is right.
        """
        means = super().evaluate(params, shard)
        if not (stated := self._stated(params, shard)).numel():
            return means
        right = (stated > 0.5).double() + (stated == 0.5).double() / 2
        error = calibration_error(torch.maximum(stated, 1 - stated), right)
        return {**means, "calibration_error": error}

    def outcomes(self, params: Tree, shard: OfflineShard) -> list[ExampleOutcome]:
        right = self.choices(params, shard).tolist()
        return self.told(shard, right, self._stated(params, shard).tolist())

    def _stated(self, params: Tree, shard: OfflineShard) -> Float[Tensor, " n"]:
        """Return the probability that the policy gives to each preferred answer; empty if none."""
        if not isinstance(self.settings.loss, DPO) or not shard.test:
            return torch.zeros(0)
        margins = [row["rewards/margins"].double() for _, row in self._held_out(params, shard)]
        return torch.sigmoid(torch.cat(margins)).cpu()

    def measure(
        self, policy: Float[Tensor, "B 2"], explicit: Float[Tensor, "B 2"] | None, batch: Batch
    ) -> Mapping[str, PerExample]:
        """Return metrics of each pair under TRL's names; `loss` is differentiable.

        These are the policy's, whatever stands beside it. With a reward head, what is minimised is
        also given, and accuracies of the explicit reward alone and of both together.
        """
        loss, tokens = (
            self.settings.loss,
            torch.tensor([tuple(map(scored_tokens, e.answers)) for e in batch.examples]).to(policy),
        )
        scores, reference = (
            PairScores(*sums.unbind(1), *tokens.unbind(1)) for sums in (policy, batch.reference)
        )
        chosen, rejected = loss.rewards(scores, reference)
        losses = loss(scores, reference)
        self._refuse_unfit(losses, policy)
        if explicit is None:
            return _metrics(losses, chosen, rejected)
        if not isinstance(loss, DPO | Hinge):
            raise TypeError(f"{loss.name} has no margin to which an explicit reward could be added")
        added = self.settings.explicit.alpha * explicit
        margins = chosen - rejected, explicit[:, 0] - explicit[:, 1]
        return {
            **_metrics(losses, chosen, rejected),
            MINIMISED: self.settings.explicit(loss, *margins),
            COMBINED: _accurate(chosen + added[:, 0], rejected + added[:, 1]),
            "rewards/accuracies_explicit": _accurate(explicit[:, 0], explicit[:, 1]),
        }

    def _refuse_unfit(self, losses: Tensor, policy: Float[Tensor, "B 2"]) -> None:
        """Raise UserError where a loss is not one number of each pair, with a gradient."""
        what = f"task.loss: {type(self.settings.loss).__name__}"
        if losses.shape != policy.shape[:1]:
            raise UserError(
                f"{what} should return the loss of each of {len(policy)} pairs, and has returned a "
                f"tensor of shape {tuple(losses.shape)}. Batches are averaged elsewhere."
            )
        if policy.requires_grad and not losses.requires_grad:
            raise UserError(
                f"{what} returns losses without a gradient, of which nothing would be learned. "
                "Compute them from the policy's log-probabilities, not detached."
            )


class PreferenceLearner(PairLearner):
    """Given pairs, with the model loaded."""


def _metrics(loss: PerExample, chosen: PerExample, rejected: PerExample) -> dict[str, PerExample]:
    return {
        "loss": loss,
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/margins": (chosen - rejected).detach(),
        "rewards/accuracies": _accurate(chosen, rejected),
    }


def _accurate(chosen: PerExample, rejected: PerExample) -> PerExample:
    """Return which pairs are accurate; a tie counts as half, for nothing is learnt and nothing
    lost.
    """
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
