"""Policy gradients from sampled answers: from rewards to advantages and a loss.

The n tokens of A answers stand in one row, answer after answer; `owner` says whose answer each
token belongs to. Answers to one prompt follow one another, S to a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedpref.types import NonNegative, Share

PerToken = Float[Tensor, " n"]
PerAnswer = Float[Tensor, " A"]


@dataclass(frozen=True)
class Sampled:
    """Tokens' log-probabilities when drawn and under the reference, and whose they are."""

    old: PerToken
    reference: PerToken
    counts: tuple[int, ...]
    """Tokens of each answer."""
    samples: int
    """Answers to each prompt."""

    @property
    def owner(self) -> Int[Tensor, " n"]:
        return torch.arange(len(self.counts), device=self.old.device).repeat_interleave(
            torch.tensor(self.counts, device=self.old.device)
        )

    def summed(self, tokens: PerToken) -> PerAnswer:
        """Return the sum over each answer's tokens [A]."""
        return tokens.new_zeros(len(self.counts)).index_add(0, self.owner, tokens)


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Proximal policy optimisation with a critic (Schulman et al. 2017); advantages by GAE.

    An answer's reward comes with its last token; each token pays `kl` times its log-ratio to the
    reference when it was drawn.
    """

    name: Literal["ppo"] = "ppo"
    epsilon: NonNegative = 0.2
    """How far the ratio of new to old probability may leave one before it is clipped."""
    kl: NonNegative = 0.05
    """What a token pays for its log-ratio to the reference."""
    gamma: Share = 1.0
    """The discount of later rewards."""
    gae_lambda: Share = 0.95
    """The lambda of generalised advantage estimation."""
    vf_coef: NonNegative = 0.1
    """The weight of the critic's loss."""
    normalize: bool = True
    """Bring advantages to mean 0 and deviation 1 over the batch."""
    needs_critic: ClassVar[bool] = True

    def advantages(
        self, rewards: PerAnswer, sampled: Sampled, values: PerToken | None
    ) -> tuple[PerToken, PerToken]:
        """Return advantages, and the returns that the critic should predict, of each token [n].

        Args:
            rewards: Of each answer [A].
            sampled: The tokens.
            values: The critic's value of the state before each token [n].
        """
        if values is None:
            raise ValueError("PPO needs a critic's values")
        paid = -self.kl * (sampled.old - sampled.reference)
        ends = torch.tensor(sampled.counts, device=paid.device).cumsum(0) - 1
        paid = paid.index_add(0, ends, rewards)
        estimates = gae(paid, values, sampled.counts, self.gamma, self.gae_lambda)
        return (whitened(estimates) if self.normalize else estimates), estimates + values


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """An answer against the mean of the other answers to its prompt (Ahmadian et al. 2024); no
    critic.

    Rewards pay for the answer's KL.
    """

    name: Literal["rloo"] = "rloo"
    epsilon: NonNegative = 0.2
    """How far the ratio of new to old probability may leave one before it is clipped."""
    kl: NonNegative = 0.05
    """What an answer pays for its log-ratio to the reference."""
    normalize: bool = True
    """Divide advantages by their deviation over the batch."""
    needs_critic: ClassVar[bool] = False

    def advantages(
        self, rewards: PerAnswer, sampled: Sampled, values: PerToken | None
    ) -> tuple[PerToken, None]:
        net = (rewards - self.kl * sampled.summed(sampled.old - sampled.reference)).view(
            -1, sampled.samples
        )
        centered = (net - net.mean(1, keepdim=True)) * (sampled.samples / (sampled.samples - 1))
        if self.normalize:
            centered = centered / (centered.square().mean().sqrt() + 1e-4)
        return centered.flatten()[sampled.owner], None


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """An answer against its group, in deviations of the group's rewards (Shao et al. 2024); no
    critic.

    The loss pays for the KL.
    """

    name: Literal["grpo"] = "grpo"
    epsilon: NonNegative = 0.2
    """How far the ratio of new to old probability may leave one before it is clipped."""
    kl: NonNegative = 0.05
    """The weight of the KL term in the loss."""
    loss_type: Literal["grpo", "dapo"] = "dapo"
    """`grpo`: the mean over answers of each answer's mean over its tokens (Shao et al. 2024, eq.
    3). `dapo`: the mean over all tokens, so that a long answer weighs more (Yu et al. 2025)."""
    needs_critic: ClassVar[bool] = False

    def advantages(
        self, rewards: PerAnswer, sampled: Sampled, values: PerToken | None
    ) -> tuple[PerToken, None]:
        groups = rewards.view(-1, sampled.samples)
        standardized = (groups - groups.mean(1, keepdim=True)) / (
            groups.std(1, keepdim=True) + 1e-4
        )
        return standardized.flatten()[sampled.owner], None


Estimator = PPO | RLOO | GRPO


def surrogate(
    new: PerToken, advantages: PerToken, sampled: Sampled, settings: Estimator
) -> Float[Tensor, ""]:
    """Return the clipped surrogate's loss, a mean over tokens, or over answers as GRPO has it.

    GRPO's has the estimate exp(-x) - 1 + x of each token's KL in it, x its log-ratio. At the policy
    that drew the tokens the ratio is one, and the gradient that of -advantage times
    log-probability.

    Args:
        new: Log-probabilities under the policy that is trained [n].
        advantages: Of each token [n].
        sampled: The tokens as they were drawn.
        settings: The estimator.
    """
    ratio = (new - sampled.old).exp()
    gain = torch.minimum(
        ratio * advantages, ratio.clamp(1 - settings.epsilon, 1 + settings.epsilon) * advantages
    )
    if isinstance(settings, GRPO) and settings.kl:
        apart = new - sampled.reference
        gain = gain - settings.kl * (torch.exp(-apart) - 1 + apart)
    if isinstance(settings, GRPO) and settings.loss_type == "grpo":
        counts = torch.tensor(sampled.counts, device=gain.device)
        return -(sampled.summed(gain) / counts).mean()
    return -gain.mean()


def gae(
    rewards: PerToken, values: PerToken, counts: tuple[int, ...], gamma: float, lambda_: float
) -> PerToken:
    """Return generalised advantage estimates within each answer [n].

    They are sums of (gamma lambda)^k of the steps' errors r + gamma V' - V. Source: Schulman et al.
    2016, eq. 16.

    Args:
        rewards: Of each token [n].
        values: What the critic predicts before each token [n].
        counts: Tokens of each answer, in the order of n.
        gamma: The discount of a token.
        lambda_: 0 takes one step's error, 1 the whole return.
    """
    r, v = (pad_sequence(list(part.split(counts)), batch_first=True) for part in (rewards, values))
    following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1)
    errors = r + gamma * following - v
    advantages = torch.zeros_like(errors)
    carried = torch.zeros_like(errors[:, 0])
    for t in reversed(range(errors.shape[1])):
        carried = errors[:, t] + gamma * lambda_ * carried
        advantages[:, t] = carried
    return torch.cat([row[:count] for row, count in zip(advantages, counts, strict=True)])


def whitened(values: PerToken) -> PerToken:
    """Return the values scaled to mean 0 and standard deviation 1 [n]; zeros if all are equal."""
    centered = values - values.mean()
    return centered / (centered.square().mean().sqrt() + 1e-8)
