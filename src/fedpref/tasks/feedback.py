"""Alignment on judgements of single answers, by Kahneman-Tversky optimisation.

No two answers to one prompt are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data.preferences import ClientData, Feedback, Preference, Row
from fedpref.data.splits import identity
from fedpref.data.unusable import Unusable, kept
from fedpref.errors import UserError
from fedpref.losses.feedback import KTO
from fedpref.models.own_parts import Parts
from fedpref.models.packed import scored_tokens
from fedpref.rewards.reward import OpenGroups, no_groups
from fedpref.tasks.examples import Batch, Example, OfflineShard
from fedpref.tasks.language import Tokens
from fedpref.tasks.offline import OfflineLearner, OfflineTask, PerExample
from fedpref.types import Text

# prompts, answers, whether these are desirable, prompts as messages, and what they are told by
Judged = list[tuple[Tokens, Tokens, bool, Text, str]]


@dataclass(frozen=True, kw_only=True)
class FeedbackTask(OfflineTask):
    """Single answers, each desirable or not.

    Columns are prompt, completion and label; a preference pair counts as one answer of each kind.
    """

    name: Literal["feedback"] = "feedback"
    loss: KTO = KTO()
    """The loss of a judged answer."""

    def check(self, parts: Parts) -> None:
        if parts.reward:
            raise UserError(
                "algorithm.parts.reward: an explicit reward is for pairs; with judgements, set "
                "it to false."
            )

    @property
    def loss_name(self) -> str:
        return self.loss.name

    def build(self, open_groups: OpenGroups = no_groups) -> FeedbackLearner:
        return FeedbackLearner(self, open_groups)


class FeedbackLearner(OfflineLearner):
    """The task with its model loaded.

    An example's second answer is one given to another prompt, from which the loss estimates its KL
    term.
    """

    settings: FeedbackTask

    def __init__(self, settings: FeedbackTask, open_groups: OpenGroups = no_groups) -> None:
        super().__init__(settings, open_groups, needs_reference=True)

    def encode(self, data: ClientData, unusable: list[Unusable] | None = None) -> OfflineShard:
        """Return a client's rows as tokens; see `Task.encode`.

        Raises:
            UserError: All training judgements are of one prompt.
        """
        (train, _), (test, _), (validation, _) = sides = [
            self._judged(rows, unusable) for rows in (data.train, data.test, data.validation)
        ]
        if train and len({asked for *_, asked in train}) == 1:
            raise UserError(
                f"client {data.name!r}: all {len(train)} judgements to train on are of one prompt, "
                "and KTO tells how far the policy has moved by answers to another one. Give each "
                "client judgements of two prompts or more, or leave it out (partition.min_rows)."
            )

        def beside(held_out: Judged) -> tuple[Example, ...]:
            # a single held-out prompt has the training rows' answers beside it
            others = [] if len({asked for *_, asked in held_out}) > 1 else train
            return tuple(self._paired([*held_out, *others])[: len(held_out)])

        return OfflineShard(
            data.name,
            tuple(self._paired(train)),
            beside(test),
            sum(cut for _, cut in sides),
            beside(validation),
        )

    def examples(
        self, rows: Sequence[Row], unusable: list[Unusable] | None = None
    ) -> tuple[list[Example], int]:
        judged, cut = self._judged(rows, unusable)
        return self._paired(judged), cut

    def _judged(self, rows: Sequence[Row], unusable: list[Unusable] | None) -> tuple[Judged, int]:
        """Return judged answers, and how many rows were cut."""
        judged: Judged = []
        cut = 0
        for row in rows:
            if isinstance(row, Preference):
                texts, labels = [row.chosen, row.rejected], [True, False]
            elif isinstance(row, Feedback):
                texts, labels = [row.completion], [row.label]
            else:
                raise UserError(
                    f"{row.where}: the row judges no answer; the task 'feedback' needs "
                    "completion and label, or chosen and rejected."
                )
            with kept(unusable):
                prompt, answers = self.tokens(row.prompt, texts, row.where)
                prompt, answers, shortened = self.fit(prompt, answers, row.where)
                asked = identity(row.prompt, "prompt")
                judged += [
                    (prompt, answer, label, self.messages(row.prompt), asked)
                    for answer, label in zip(answers, labels, strict=True)
                ]
                cut += shortened
        return judged, cut

    def _paired(self, judged: Judged) -> list[Example]:
        """Return judged answers, each with one to another prompt."""
        examples = []
        # an answer to the same prompt in another spelling is no answer to another one
        others = next_others([asked for *_, asked in judged])
        for (prompt, answer, label, text, _), index in zip(judged, others, strict=True):
            other = answer if index is None else judged[index][1][: self.max_length - len(prompt)]
            # of an answer that was cut before the assistant's turn nothing is scored
            second = other if scored_tokens(other) else answer
            examples.append(Example(prompt, (answer, second), desirable=label, text=text))
        return examples

    def measure(
        self, policy: Float[Tensor, "B 2"], explicit: Float[Tensor, "B 2"] | None, batch: Batch
    ) -> Mapping[str, PerExample]:
        """Return metrics of each answer; `loss` is differentiable.

        An answer is judged accurately if its reward is positive where it is desirable, negative
        where not; a tie counts as half. `rewards/margins` is the reward, negated where the answer
        is not desirable.
        """
        ratio, other = (policy - batch.reference).unbind(1)
        desirable = torch.tensor(
            [example.desirable for example in batch.examples], device=policy.device
        )
        signed = self.settings.loss.beta * torch.where(desirable, ratio, -ratio).detach()
        return {
            "loss": self.settings.loss(ratio, other.detach(), desirable),
            "rewards/margins": signed,
            "rewards/accuracies": (signed > 0).float() + 0.5 * (signed == 0).float(),
            "kl": self.settings.loss.kl(other.detach()).expand_as(signed),
        }


def next_others(values: Sequence[Any]) -> list[int | None]:
    """Return for each value the index of the next other one, around the end; None without one."""
    count = len(values)
    indices: list[int | None] = [None] * count
    for i in range(2 * count - 1, -1, -1):  # twice around, for the last ones look at the first
        here, following = i % count, (i + 1) % count
        indices[here] = following if values[following] != values[here] else indices[following]
    return indices
