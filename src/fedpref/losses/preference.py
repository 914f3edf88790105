"""Losses of preference pairs, from log-probabilities: DPO and its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedpref.types import NonNegative, Open, Positive

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
PerPair = Float[Tensor, " B"]


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of B pairs of answers, summed over tokens, and the numbers of tokens."""

    chosen: PerPair
    rejected: PerPair
    chosen_tokens: PerPair
    rejected_tokens: PerPair

    def per_token(self) -> tuple[PerPair, PerPair]:
        """Mean log-probabilities of a token, (chosen, rejected)."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


class PreferenceLoss(ABC):
    """A loss of preference pairs: a frozen dataclass of its settings, with a name for tables."""

    name: str
    needs_reference: ClassVar[bool] = True
    """Whether it reads log-probabilities under the reference, which are zeros where it does not."""

    @abstractmethod
    def __call__(self, policy: PairScores, reference: PairScores) -> PerPair:
        """Return each pair's loss [B].

        Args:
            policy: Log-probabilities under the policy, of B pairs.
            reference: The same under the reference.
        """

    @abstractmethod
    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[PerPair, PerPair]:
        """Return the implicit rewards of the chosen and of the rejected answers, [B] each.

        A pair counts as right where the first is larger.
        """


@dataclass(frozen=True, kw_only=True)
class DPO(PreferenceLoss):
    """Direct preference optimisation: -log sigmoid(beta margin over the reference).

    Source: Rafailov et al. 2023, eq. 7.
    """

    name: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: Smoothing = 0.0
    """The share of pairs taken to be labelled the wrong way round."""
    smoothing: Literal["conservative", "robust"] = "conservative"
    """What label smoothing means: the conservative loss, or the robust one, whose expectation under
    such labels is that of clean ones."""

    def __call__(self, policy: PairScores, reference: PairScores) -> PerPair:
        chosen, rejected = self.rewards(policy, reference)
        return self.of_margin(chosen - rejected)

    def of_margin(self, margin: PerPair) -> PerPair:
        """Return the loss of each reward margin [B]."""
        kept, flipped = -logsigmoid(margin), -logsigmoid(-margin)
        e = self.label_smoothing
        if self.smoothing == "conservative":
            return (1 - e) * kept + e * flipped
        return ((1 - e) * kept - e * flipped) / (1 - 2 * e)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[PerPair, PerPair]:
        return _over_reference(self.beta, policy, reference)


@dataclass(frozen=True, kw_only=True)
class IPO(PreferenceLoss):
    """Identity preference optimisation: the margin over the reference is regressed on 1 / (2 beta).

    Log-probabilities are means over tokens, as in TRL. Source: Azar et al. 2023, eq. 17.
    """

    name: Literal["ipo"] = "ipo"
    beta: Positive = 0.1
    """The margin is regressed on 1 / (2 beta)."""

    def __call__(self, policy: PairScores, reference: PairScores) -> PerPair:
        chosen, rejected = self.rewards(policy, reference)
        return ((chosen - rejected) / self.beta - 1 / (2 * self.beta)) ** 2

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[PerPair, PerPair]:
        (chosen, rejected), (reference_chosen, reference_rejected) = (
            policy.per_token(),
            reference.per_token(),
        )
        return self.beta * (chosen - reference_chosen), self.beta * (rejected - reference_rejected)


@dataclass(frozen=True, kw_only=True)
class Hinge(PreferenceLoss):
    """The hinge on the same margin as DPO's: max(0, 1 - beta margin).

    Source: SLiC (Zhao et al. 2023), with a reference as in RSO.
    """

    name: Literal["hinge"] = "hinge"
    beta: Positive = 0.1
    """What the margin is multiplied by."""

    def __call__(self, policy: PairScores, reference: PairScores) -> PerPair:
        chosen, rejected = self.rewards(policy, reference)
        return self.of_margin(chosen - rejected)

    def of_margin(self, margin: PerPair) -> PerPair:
        """Return the loss of each reward margin [B]."""
        return torch.relu(1 - margin)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[PerPair, PerPair]:
        return _over_reference(self.beta, policy, reference)


@dataclass(frozen=True, kw_only=True)
class SimPO(PreferenceLoss):
    """SimPO: a loss without a reference, on mean log-probabilities of tokens, with a target margin.

    Source: Meng et al. 2024, eq. 6.
    """

    name: Literal["simpo"] = "simpo"
    beta: Positive = 2.0
    """What the mean log-probabilities are multiplied by."""
    gamma: NonNegative = 0.5
    """The target margin."""
    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: PairScores, reference: PairScores) -> PerPair:
        chosen, rejected = self.rewards(policy, reference)
        return -logsigmoid(chosen - rejected - self.gamma)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[PerPair, PerPair]:
        chosen, rejected = policy.per_token()
        return self.beta * chosen, self.beta * rejected


@dataclass(frozen=True, kw_only=True)
class ORPO(PreferenceLoss):
    """No reference: the likelihood of the chosen answer plus `beta` times a log odds ratio.

    Source: Hong et al. 2024, eq. 6 and 7.
    """

    name: Literal["orpo"] = "orpo"
    beta: Positive = 0.1
    """The weight of the odds ratio, the paper's lambda."""
    needs_reference: ClassVar[bool] = False

    def __call__(self, policy: PairScores, reference: PairScores) -> PerPair:
        chosen, rejected = policy.per_token()
        log_odds_ratio = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
        return -chosen - self.beta * logsigmoid(log_odds_ratio)

    def rewards(self, policy: PairScores, reference: PairScores) -> tuple[PerPair, PerPair]:
        chosen, rejected = policy.per_token()
        return self.beta * chosen, self.beta * rejected


Loss = Annotated[
    DPO | IPO | Hinge | SimPO | ORPO,
    Field(discriminator="name"),
    Open("fedpref.losses", PreferenceLoss),
]


def _over_reference(
    beta: float, policy: PairScores, reference: PairScores
) -> tuple[PerPair, PerPair]:
    return beta * (policy.chosen - reference.chosen), beta * (policy.rejected - reference.rejected)


def _log_complement(log_probability: PerPair) -> PerPair:
    """log(1 - p) from log p, stable at both ends; p is kept one part in ten million below 1."""
    return torch.log(-torch.expm1(log_probability.clamp(max=-1e-7)))
