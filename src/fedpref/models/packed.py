"""The packed form: each prompt in one row with its answers, encoded once, and nothing of vocabulary width kept.

A row is [prompt, answer, answer, ..., padding]. Positions of each answer go on from its prompt's; an answer sees its prompt and
itself. Models of transformers take this form through the attention interface, without a line of theirs rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

ATTENTION = "fedpref_packed"
WIDTHS = 16  # rows are as wide as the next multiple: a new shape costs a CPU's matrix kernels more than a few tokens
CHUNK = 2**23  # logits computed at a time: 32 MB in float32

Row = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt's tokens and its answers'


@dataclass(frozen=True)
class Layout:
    """Tokens as a model takes them, and where the log-probabilities of A answers with n tokens in all are read off."""

    ids: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    part: Int[Tensor, "R T"]  # 0 in the prompt, 1, 2, ... in its answers, then padding
    scored: Int[Tensor, " n"]  # places in the flattened ids whose next token belongs to an answer
    targets: Int[Tensor, " n"]  # that token
    counts: tuple[int, ...]  # tokens of each answer, in the order of the rows

    @staticmethod
    def of(rows: Sequence[Row], device: torch.device) -> Layout:
        """A row for each prompt with all its answers; under plain causal attention, give each answer a row of its own."""
        width = max(len(prompt) + sum(map(len, answers)) for prompt, answers in rows)
        width = -(-width // WIDTHS) * WIDTHS
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        parts: list[list[int]] = []
        scored: list[int] = []
        for number, (prompt, answers) in enumerate(rows):
            row, places, part = list(prompt), list(range(len(prompt))), [0] * len(prompt)
            for answer_number, answer in enumerate(answers, 1):
                begin = number * width + len(row)
                scored += [number * width + len(prompt) - 1, *range(begin, begin + len(answer) - 1)]
                row += answer
                places += range(len(prompt), len(prompt) + len(answer))
                part += [answer_number] * len(answer)
            rest = width - len(row)
            ids.append(row + [0] * rest)
            positions.append(places + [0] * rest)
            parts.append(part + [len(answers) + 1] * rest)
        targets = [token for _, answers in rows for answer in answers for token in answer]
        tensors = [torch.tensor(values, device=device) for values in (ids, positions, parts, scored, targets)]
        counts = tuple(len(answer) for _, answers in rows for answer in answers)
        return Layout(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], counts)

    def allowed(self) -> Bool[Tensor, "R T T"]:
        """Which token (second axis) sees which: what came before, in the prompt or in its own part."""
        before = torch.ones(self.ids.shape[1], self.ids.shape[1], dtype=torch.bool, device=self.ids.device).tril()
        return before & ((self.part[:, None, :] == 0) | (self.part[:, None, :] == self.part[:, :, None]))

    def per_answer(self, tokens: Float[Tensor, " n"]) -> Float[Tensor, " A"]:
        """Sums over each answer's tokens."""
        return torch.stack([part.sum() for part in tokens.split(self.counts)])


# ---- attention

_BIAS: ContextVar[Float[Tensor, "R 1 T T"] | None] = ContextVar("bias", default=None)  # 0 where a token may look, -inf elsewhere


@contextmanager
def packed_attention(layout: Layout, dtype: torch.dtype) -> Iterator[None]:
    """Within it, models whose attention implementation is ATTENTION attend as the layout allows; outside, they do as `sdpa` does."""
    allowed = layout.allowed()[:, None]
    token = _BIAS.set(torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf")))
    try:
        yield
    finally:
        _BIAS.reset(token)


def register() -> None:
    """Make ATTENTION known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        bias = _BIAS.get()
        if bias is None:
            output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
            return output
        window = settings.get("sliding_window")
        if window is not None and window < bias.shape[-1]:
            raise PackingError(f"attention reaches {window} tokens back, a pair is {bias.shape[-1]} long")
        if settings.get("softcap") is not None or settings.get("s_aux") is not None:
            raise PackingError("its attention has a soft cap or sinks")
        return _attend(query, key, value, bias, settings.get("scaling") or query.shape[-1] ** -0.5), None

    def masking(*arguments: Any, **settings: Any) -> Tensor | None:
        return sdpa_mask(*arguments, **settings) if _BIAS.get() is None else None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, masking)


class PackingError(Exception):
    """The packed form cannot stand in for what this model does."""


def _attend(
    query: Float[Tensor, "R H T D"],
    key: Float[Tensor, "R K T D"],
    value: Float[Tensor, "R K T D"],
    bias: Float[Tensor, "R 1 T T"],
    scaling: float,
) -> Float[Tensor, "R T H D"]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if query.dtype == torch.bfloat16 and not query.is_cuda:  # the fused kernel's backward is slow in bfloat16 on a CPU
        weights = torch.softmax(query @ key.transpose(2, 3) * scaling + bias, -1)
        return (weights @ value).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scaling).transpose(1, 2)


# ---- the vocabulary head


def token_log_probabilities(
    hidden: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"] | None, targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probabilities of tokens under a frozen linear head; the gradient is formed in the same pass, so logits live for a chunk only."""
    extra = -len(hidden) % (4 * WIDTHS)
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
            logits = nn.functional.linear(h, weight, bias).float()
            total = logits.logsumexp(-1, keepdim=True)
            scores.append((logits.gather(1, t[:, None]) - total)[:, 0])
            if wanted:
                gradients.append(weight[t] - logits.sub_(total).exp_().to(weight.dtype) @ weight)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, " n"]) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None
