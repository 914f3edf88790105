"""Losses of answers judged one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedpref.types import Positive


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Kahneman-Tversky optimisation of single answers (Ethayarajh et al. 2024, eq. 7).

    An answer's log-ratio over the reference is pushed away from a point of indifference: the
    policy's KL divergence, which a batch estimates from answers to other prompts, so that a batch
    should hold several examples. The paper advises weights for which desirable_weight times the
    number of desirable answers is 1 to 4/3 of undesirable_weight times that of the others.
    """

    name: Literal["kto"] = "kto"
    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: Positive = 1.0
    """The weight of desirable answers."""
    undesirable_weight: Positive = 1.0
    """The weight of undesirable answers."""

    def __call__(
        self,
        ratio: Float[Tensor, " B"],
        mismatched: Float[Tensor, " B"],
        desirable: Bool[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        """Return the loss of each answer.

        Args:
            ratio: log pi(y|x) - log reference(y|x) of each answer [B].
            mismatched: The same of an answer to another prompt after this one [B].
            desirable: Whether the answer is desirable [B].
        """
        gain = self.beta * (ratio - self.kl(mismatched))
        value = torch.where(
            desirable,
            self.desirable_weight * torch.sigmoid(gain),
            self.undesirable_weight * torch.sigmoid(-gain),
        )
        return torch.where(desirable, self.desirable_weight, self.undesirable_weight) - value

    def kl(self, mismatched: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """Return the batch's estimate of the KL divergence, never negative; no gradient flows
        through it.
        """
        return mismatched.detach().mean().clamp(min=0)
