"""One reward of several groups' rewards: mean, least, greatest, or leaning to the worse off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedpref.types import Fraction, Positive, Share


@dataclass(frozen=True)
class Mean:
    """All groups count alike."""

    name: Literal["mean"] = "mean"

    def __call__(self, rewards: Float[Tensor, "G n"]) -> Float[Tensor, " n"]:
        """Return one reward for each answer [n] from each group's [G, n]."""
        return rewards.mean(0)


@dataclass(frozen=True)
class Minimum:
    """The group that likes an answer least decides."""

    name: Literal["min"] = "min"

    def __call__(self, rewards: Float[Tensor, "G n"]) -> Float[Tensor, " n"]:
        """Return one reward for each answer [n] from each group's [G, n]."""
        return rewards.amin(0)


@dataclass(frozen=True)
class Maximum:
    """The group that likes an answer best decides."""

    name: Literal["max"] = "max"

    def __call__(self, rewards: Float[Tensor, "G n"]) -> Float[Tensor, " n"]:
        """Return one reward for each answer [n] from each group's [G, n]."""
        return rewards.amax(0)


@dataclass
class AdaptiveAlpha:
    """Groups that have fared badly count more, unless all fare alike.

    Where the mean fairness of a batch, 1 / (1 + CoV^2) of an answer's rewards over groups, is at
    least `threshold`: the mean. Else log mean exp(alpha_g r_g), alpha a softmax of (1 - h_g) /
    `temperature` and h_g the group's history ("Systematic Evaluation of Preference Aggregation in
    Federated RLHF", arXiv 2512.08786). As published that is about sum alpha_g r_g / G, G times less
    than the mean: `rescale`, which is ours, takes sum alpha_g r_g. With `decay` 0.8 the history is
    APPA's moving average (arXiv 2604.04261, which shows 1 / (1 + CoV), `fairness: cov`, and a
    threshold of 0.99); without, the mean of all batches, which is ours: the paper does not say. A
    batch counts in it by its mean rewards (`fares_by: mean`), or by those of the answer that the
    combination likes best (`winner`, ours): the shares of one prompt's answers sum to one for every
    group, their means tell none from another. Histories begin at 0. Fairness is no quality: groups
    that fare equally badly are at 1. Rewards should be between 0 and 1.
    """

    name: Literal["alpha"] = "alpha"
    threshold: Share = 0.9
    """The mean fairness of a batch from which on the mean is taken."""
    temperature: Positive = 0.1
    """How strongly groups that fare badly are favoured; more strongly the lower it is."""
    rescale: bool = True
    """Take the weighted sum of rewards, in place of the published form, which is smaller by the
    number of groups."""
    decay: Fraction | None = None
    """The share of a group's history that stays; null takes the mean of all batches."""
    fares_by: Literal["mean", "winner"] = "winner"
    """A batch counts in a group's history by its mean reward, or by that of the answer liked
    best."""
    fairness: Literal["cov-squared", "cov"] = "cov-squared"
    """Which index of fairness: of the squared coefficient of variation, or of the plain one."""
    history: list[float] = field(default_factory=list, init=False)
    """Of each group."""
    batches: int = field(default=0, init=False)

    def index(self, rewards: Float[Tensor, "G n"]) -> float:
        """Return how alike groups fare, 1 at most."""
        spread = rewards.std(0, correction=0) / rewards.mean(0).abs().clamp(min=1e-12)
        return float(
            (1 / (1 + (spread.square() if self.fairness == "cov-squared" else spread))).mean()
        )

    def __call__(self, rewards: Float[Tensor, "G n"]) -> Float[Tensor, " n"]:
        """Return one reward for each answer [n] from each group's [G, n], and remember how groups
        fared.
        """
        known = torch.tensor(self.history or [0.0] * len(rewards), dtype=rewards.dtype)
        fair = self.index(rewards) >= self.threshold
        alpha = torch.softmax((1 - known) / self.temperature, 0)[:, None]
        self.batches += 1
        leaning = (
            (alpha * rewards).sum(0) if self.rescale else (alpha * rewards).exp().mean(0).log()
        )
        reward = rewards.mean(0) if fair else leaning
        now, rate = (
            rewards[:, reward.argmax()] if self.fares_by == "winner" else rewards.mean(1),
            1 / self.batches,
        )
        self.history = torch.lerp(
            known, now, rate if self.decay is None else 1 - self.decay
        ).tolist()
        return reward


Combine = Annotated[Mean | Minimum | Maximum | AdaptiveAlpha, Field(discriminator="name")]
