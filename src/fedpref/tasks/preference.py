"""Preference alignment of a language model: pairs of answers, the DPO family of losses, an adapter to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedpref.data.preferences import Preference, Row
from fedpref.errors import UserError
from fedpref.losses import DPO, Loss, PairScores
from fedpref.tasks.answers import AnswerLearner, AnswerTask, Batch, Example, PerExample


@dataclass(frozen=True, kw_only=True)
class PreferenceTask(AnswerTask):
    """Preference pairs under one of the DPO family's losses."""

    name: Literal["preference"] = "preference"
    loss: Annotated[Loss, Field(discriminator="name")] = DPO()

    def build(self) -> PreferenceLearner:
        return PreferenceLearner(self)


class PreferenceLearner(AnswerLearner):
    """The task at work; an example's answers are the chosen and the rejected one."""

    settings: PreferenceTask

    def __init__(self, settings: PreferenceTask) -> None:
        super().__init__(settings, needs_reference=settings.loss.needs_reference)

    def examples(self, rows: Sequence[Row]) -> tuple[list[Example], int]:
        found, cut = [], 0
        for row in rows:
            if not isinstance(row, Preference):
                raise UserError(
                    f"{row.where}: the row judges one answer, the task {self.settings.name!r} needs two to compare. "
                    "Set task.name to feedback, or give columns chosen and rejected."
                )
            prompt, answers = self.tokens(row.prompt, (row.chosen, row.rejected), row.where)
            prompt, (chosen, rejected), shortened = self.fit(prompt, answers, row.where)
            if chosen == rejected:
                raise UserError(f"{row.where}: the two answers are the same tokens to the model, after truncation if any. Remove the row.")
            found.append(Example(prompt, (chosen, rejected)))
            cut += shortened
        return found, cut

    def measure(self, policy: Float[Tensor, "B 2"], batch: Batch) -> Mapping[str, PerExample]:
        """TRL's names. A tie counts as half an accurate pair: nothing is learnt from it, and nothing is lost."""
        tokens = torch.tensor([tuple(map(len, example.answers)) for example in batch.examples]).to(policy)
        scores, reference = (PairScores(*sums.unbind(1), *tokens.unbind(1)) for sums in (policy, batch.reference))
        chosen, rejected = (reward.detach() for reward in self.settings.loss.rewards(scores, reference))
        return {
            "loss": self.settings.loss(scores, reference),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float() + 0.5 * (chosen == rejected).float(),
        }
