"""Log-probabilities under a frozen vocabulary head, with nothing of the vocabulary's width kept."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

SCORED = 64  # rows come in multiples: a new shape costs a CPU's matrix kernels more than a few tokens
CHUNK = 2**20  # logits computed at a time: 4 MB in float32


def token_log_probabilities(
    hidden: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"] | None, targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probabilities of tokens under a frozen linear head; the gradient is formed in the same pass, so logits live for a chunk only."""
    extra = -len(hidden) % SCORED
    padded = nn.functional.pad(hidden, (0, 0, 0, extra)), nn.functional.pad(targets, (0, extra))
    scores: Float[Tensor, " n"] = _Head.apply(padded[0], weight, bias, padded[1])[: len(hidden)]  # type: ignore[no-untyped-call]
    return scores


class _Head(torch.autograd.Function):
    """The gradient with respect to the hidden state is W[target] - softmax(W h) W."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"] | None, targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        wanted = ctx.needs_input_grad[0]
        scores, gradients = [], []
        for h, t in zip(hidden.split(max(1, CHUNK // len(weight))), targets.split(max(1, CHUNK // len(weight))), strict=True):
            tokens = nn.functional.linear(h, weight, bias).log_softmax(-1, torch.float32)
            scores.append(tokens.gather(1, t[:, None])[:, 0])
            if wanted:
                gradients.append(weight[t] - tokens.exp_().to(weight.dtype) @ weight)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, " n"]) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None
