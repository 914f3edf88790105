"""A predictor of opinions as a reward: what a group would choose among answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.data.preferences import key
from fedpref.errors import UserError
from fedpref.numerics.trees import Tree
from fedpref.rewards.combine import AdaptiveAlpha, Combine
from fedpref.tasks.opinion import OpinionLearner, Question, asking
from fedpref.types import Text

Kind = Literal["share", "logit"]


@dataclass(frozen=True)
class GroupReward:
    """One group's reward, with the signature of TRL's reward functions.

    `share`: the share of the group that would choose this completion among all of the same prompt
    in the call, between 0 and 1. `logit`: what the shares are a softmax of; only differences
    between completions of one prompt mean anything.
    """

    learner: OpinionLearner
    params: Tree
    context: Sequence[Question]
    group: str
    kind: Kind = "share"
    asks: bool = False
    """Whether prompts are surveys' questions and completions their options, as in the context."""

    @property
    def __name__(self) -> str:  # by which TRL logs it
        return f"reward/{self.group}"

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any
    ) -> list[float]:
        """Return a reward for each completion to the prompt in the same place.

        Raises:
            UserError: A share would mean nothing, or there is nothing to score.
        """
        asked = by_prompt(prompts)
        alone = next((prompt for prompt, numbers in asked.items() if len(numbers) < 2), None)
        if (self.kind == "share" or self.asks) and alone is not None:
            ways = (
                "Give more: this run was trained on questions with their options."
                if self.asks
                else "Give more, or take logits."
            )
            raise UserError(
                f"reward: a share is one among completions, and {alone[:60]!r} has only one. {ways}"
            )
        said = [_said(completion) for completion in completions]
        if empty := next(
            (
                prompt
                for prompt, numbers in asked.items()
                for i in numbers
                if not (prompt + said[i]).strip()
            ),
            None,
        ):
            raise UserError(
                "reward: there is nothing to score in a prompt and completion that are both "
                f"empty ({empty!r})."
            )
        texts = {
            prompt: asking(prompt, [said[i] for i in numbers])
            if self.asks
            else tuple(prompt + said[i] for i in numbers)
            for prompt, numbers in asked.items()
        }
        questions = [
            Question(self.group, of_prompt, (0.0,) * len(of_prompt)) for of_prompt in texts.values()
        ]
        self.learner.embed(self.context)
        new = self.learner.embed(questions)
        predicted = self.learner.predict(
            self.params, self.context, questions, logits=self.kind == "logit"
        )[0]
        self.learner.forget(new)
        rewards = [0.0] * len(said)
        for numbers, values in zip(asked.values(), predicted, strict=True):
            for number, value in zip(numbers, values.tolist(), strict=True):
                rewards[number] = value
        return rewards


@dataclass(frozen=True)
class CombinedReward:
    """Several groups' rewards as one, prompt by prompt, with the same signature.

    Raises:
        UserError: The combination weighs groups by rewards between 0 and 1, and these are logits.
    """

    groups: Mapping[str, GroupReward]
    combine: Combine

    def __post_init__(self) -> None:
        if isinstance(self.combine, AdaptiveAlpha) and any(
            reward.kind == "logit" for reward in self.groups.values()
        ):
            raise UserError(
                "combine: alpha weighs groups by rewards between 0 and 1, which logits are not. "
                "Take shares, or mean, min or max."
            )

    @property
    def __name__(self) -> str:
        return f"reward/{self.combine.name}"

    def of_groups(
        self, prompts: Sequence[Text], completions: Sequence[Text]
    ) -> Float[Tensor, "G n"]:
        """Return each group's rewards [G, n]."""
        return torch.tensor(
            [reward(prompts, completions) for reward in self.groups.values()], dtype=torch.float64
        )

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any
    ) -> list[float]:
        """Return a reward for each completion to the prompt in the same place."""
        rewards, combined = self.of_groups(prompts, completions), [0.0] * len(prompts)
        for numbers in by_prompt(prompts).values():
            for number, value in zip(
                numbers, self.combine(rewards[:, numbers]).tolist(), strict=True
            ):
                combined[number] = value
        return combined


def by_prompt(prompts: Sequence[Text]) -> dict[str, list[int]]:
    """Return the indices of each prompt's completions."""
    asked: dict[str, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        asked[_said(prompt)].append(number)
    return asked


def _said(text: Text) -> str:
    return text if isinstance(text, str) else key(tuple(text))
