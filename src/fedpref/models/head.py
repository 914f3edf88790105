"""Log-probabilities under a vocabulary head, with nothing of the vocabulary's width kept.

The gradient is written by hand, and in the same pass where the head is frozen: autograd would keep
logits of all tokens.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# rows come in multiples: of few, a product takes other ways, and its bits would depend on how many
# there are; kernels for bfloat16 are compiled anew for each shape on a CPU, and kept
SCORED = {torch.float32: 16, torch.bfloat16: 64}
# rows whose logits are computed at a time, at least: with fewer, a product is bound by reading the
# head's weight (with 21 rows of 49,152 it took twice as long)
ROWS = 128
# of the vocabulary at a time on a CPU, and logits that stay in its cache
BLOCK, CACHED = 2048, 2**19
# bytes that a row's logits take, in both precisions, and what part of a GPU's memory they may have
BYTES, SHARE = 10, 1 / 32


def token_log_probabilities(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " n"],
    change: tuple[Float[Tensor, "r D"], Float[Tensor, "V r"]] | None = None,
) -> Float[Tensor, " n"]:
    """Return the log-probability of each token under a linear head.

    Logits live for a chunk only. Under a frozen head the gradient is formed in the same pass; under
    one that is trained, logits are computed twice.

    Args:
        hidden: States that come to the head [n, D].
        weight: The head's W [V, D].
        bias: The head's bias [V].
        targets: The tokens [n].
        change: A low-rank change of W, as (D, U) for W + U D.
    """
    rows = even(hidden)
    wanted = nn.functional.pad(targets, (0, len(rows) - len(hidden)))
    trained: Any = _TrainedHead.apply
    scores: Float[Tensor, " n"]
    if change is not None:
        down, up = change
        scores = trained(rows, weight, bias, rows @ down.T, up, wanted)
    elif weight.requires_grad:
        scores = trained(rows, weight, bias, None, None, wanted)
    else:
        scores = _Head.apply(rows, weight, bias, wanted)  # type: ignore[no-untyped-call]
    return scores[: len(hidden)]


def even(rows: Float[Tensor, "n D"]) -> Float[Tensor, "m D"]:
    """Return the rows, and zeros up to a multiple that products take well."""
    return nn.functional.pad(rows, (0, 0, 0, -len(rows) % SCORED.get(rows.dtype, 64)))


def _chunks(count: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = max(ROWS, _logits(device) // vocabulary)
    return [slice(first, first + size) for first in range(0, count, size)]


@cache
def _logits(device: torch.device) -> int:
    """Return how many logits are computed at a time, where they are of more than `ROWS` rows."""
    if device.type != "cuda":
        return CACHED
    # a GPU is busy with few large launches
    return int(torch.cuda.get_device_properties(device).total_memory * SHARE / BYTES)


class _Head(torch.autograd.Function):
    """A frozen head; the gradient of the hidden state is W[target] - softmax(W h) W."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        targets: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        wanted = ctx.needs_input_grad[0]
        block = BLOCK if hidden.device.type == "cpu" else len(weight)
        scores, gradients = [], []
        for part in _chunks(len(hidden), min(len(weight), block), hidden.device):
            h, t = hidden[part], targets[part]
            if len(weight) > block:
                some, gradient = _in_blocks(h, weight, bias, t, block, wanted)
            else:
                some, gradient = _at_once(h, weight, bias, t, wanted)
            scores.append(some)
            gradients.append(gradient)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, " n"]) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # the upstream gradient is one number a token, so that the rest could be formed in the
        # forward pass
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


def _at_once(
    hidden: Float[Tensor, "m D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " m"],
    wanted: bool,
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m D"]]:
    """Return log-probabilities and, if wanted, their gradient."""
    # float32 inside the softmax alone: over a whole vocabulary bfloat16 loses the small
    # probabilities
    tokens = nn.functional.linear(hidden, weight, bias).log_softmax(-1, torch.float32)
    scores = tokens.gather(1, targets[:, None])[:, 0]
    if not wanted:
        return scores, hidden
    # in place: the log-probabilities of all tokens are not needed again
    return scores, weight[targets] - tokens.exp_().to(weight.dtype) @ weight


def _in_blocks(
    hidden: Float[Tensor, "m D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " m"],
    block: int,
    wanted: bool,
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m D"]]:
    """Return the same, from a block of the vocabulary at a time.

    The softmax is the running one (Milakov and Gimelshein 2018): what was summed is scaled anew
    when a block has a higher logit. Logits never leave the cache, and W is read once.
    """
    rows = len(hidden)
    highest = hidden.new_full((rows,), -torch.inf, dtype=torch.float32)
    total, right = torch.zeros_like(highest), torch.zeros_like(highest)
    # the mean of W's rows under the softmax, times `total`
    mean = hidden.new_zeros(rows if wanted else 0, hidden.shape[1], dtype=torch.float32)
    for first in range(0, len(weight), block):
        some = weight[first : first + block]
        logits = nn.functional.linear(
            hidden, some, None if bias is None else bias[first : first + block]
        ).float()
        place = targets - first
        inside = (place >= 0) & (place < len(some))
        found = logits.gather(1, place.clamp(0, len(some) - 1)[:, None])[:, 0]
        right = torch.where(inside, found, right)
        before, highest = highest, torch.maximum(highest, logits.amax(-1))
        exps = logits.sub_(highest[:, None]).exp_()
        scale = (before - highest).exp_()
        total.mul_(scale).add_(exps.sum(-1))
        if wanted:
            mean.mul_(scale[:, None]).add_(exps.to(weight.dtype) @ some)
    scores = right - highest - total.log()
    if not wanted:
        return scores, hidden
    return scores, weight[targets] - (mean / total[:, None]).to(weight.dtype)


class _TrainedHead(torch.autograd.Function):
    """A head that is trained, with logits W h + U d.

    The gradient of a token's logits is one at its target less their softmax, computed anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        inner: Float[Tensor, "n r"] | None,
        up: Float[Tensor, "V r"] | None,
        targets: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        ctx.save_for_backward(hidden, weight, bias, inner, up, targets)
        parts = _chunks(len(hidden), len(weight), hidden.device)
        return torch.cat(
            [
                _tokens(hidden, weight, bias, inner, up, part).gather(1, targets[part, None])[:, 0]
                for part in parts
            ],
        )

    @staticmethod
    def backward(
        ctx: Any, upstream: Float[Tensor, " n"]
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, Tensor | None, None]:
        hidden, weight, bias, inner, up, targets = ctx.saved_tensors
        hidden_slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_slope = (
            # in float32, because it is a sum over many chunks
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        inner_slope = None if inner is None else torch.empty_like(inner)
        up_slope = None if up is None else torch.zeros_like(up, dtype=torch.float32)
        for part in _chunks(len(hidden), len(weight), hidden.device):
            slope = _tokens(hidden, weight, bias, inner, up, part).exp_().neg_()
            # the target's one, added to what is less the softmax
            slope.scatter_add_(1, targets[part, None], torch.ones_like(slope[:, :1]))
            slope = slope.mul_(upstream[part, None]).to(weight.dtype)
            if hidden_slope is not None:
                hidden_slope[part] = slope @ weight
            if weight_slope is not None:
                weight_slope += slope.T @ hidden[part]
            if (
                inner is not None
                and inner_slope is not None
                and up is not None
                and up_slope is not None
            ):
                inner_slope[part] = slope @ up
                up_slope += slope.T @ inner[part]
        narrow = None if weight_slope is None else weight_slope.to(weight.dtype)
        return (
            hidden_slope,
            narrow,
            None,
            inner_slope,
            None if up_slope is None else up_slope.to(up.dtype),
            None,
        )


def _tokens(
    hidden: Float[Tensor, "n D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    inner: Float[Tensor, "n r"] | None,
    up: Float[Tensor, "V r"] | None,
    part: slice,
) -> Float[Tensor, "m V"]:
    """Return the log-probabilities of all tokens, in float32 [m, V]."""
    logits = nn.functional.linear(hidden[part], weight, bias)
    if inner is not None and up is not None:
        # the change of the head is never formed: it would be as large as the head
        logits = logits.addmm_(inner[part], up.T)
    return logits.log_softmax(-1, torch.float32)
