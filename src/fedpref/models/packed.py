"""The packed form: prompts and their answers in one row, each prompt encoded once, and nothing of vocabulary width kept.

A row is [prompt, answer, answer, ..., prompt, answer, ...]. Positions of each answer go on from its prompt's; an answer sees its
prompt and itself. Models of transformers take this form through the attention interface, without a line of theirs rewritten.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

ATTENTION = "fedpref_packed"
CHUNK = 2**23  # logits computed at a time: 32 MB in float32

Row = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt's tokens and its answers'


@dataclass(frozen=True)
class Layout:
    """Tokens as a model takes them, and where the log-probabilities of A answers with n tokens in all are read off."""

    ids: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    scored: Int[Tensor, " n"]  # places in the flattened ids whose next token belongs to an answer
    targets: Int[Tensor, " n"]  # that token
    counts: tuple[int, ...]  # tokens of each answer, in the order of the rows
    spans: tuple[tuple[int, tuple[int, ...]], ...] = ()  # tokens of each prompt and of its answers; empty in the padded form

    @staticmethod
    def packed(rows: Sequence[Row], device: torch.device) -> Layout:
        """One row for all."""
        ids: list[int] = []
        positions: list[int] = []
        scored: list[int] = []
        for prompt, answers in rows:
            last = len(ids) + len(prompt) - 1
            ids += prompt
            positions += range(len(prompt))
            for answer in answers:
                scored += [last, *range(len(ids), len(ids) + len(answer) - 1)]
                ids += answer
                positions += range(len(prompt), len(prompt) + len(answer))
        spans = tuple((len(prompt), tuple(map(len, answers))) for prompt, answers in rows)
        return Layout._of(rows, [ids], [positions], scored, spans, device)

    @staticmethod
    def padded(rows: Sequence[Row], device: torch.device) -> Layout:
        """A row for each answer, its prompt before it; on the right, token 0, which no real token sees under causal attention."""
        sequences = [[*prompt, *answer] for prompt, answers in rows for answer in answers]
        width = max(map(len, sequences))
        ids = [sequence + [0] * (width - len(sequence)) for sequence in sequences]
        begins = [len(prompt) for prompt, answers in rows for _ in answers]
        scored = [
            number * width + place
            for number, (begin, sequence) in enumerate(zip(begins, sequences, strict=True))
            for place in range(begin - 1, len(sequence) - 1)
        ]
        return Layout._of(rows, ids, [list(range(width))] * len(ids), scored, (), device)

    @staticmethod
    def _of(rows: Sequence[Row], ids: Any, positions: Any, scored: Any, spans: Any, device: torch.device) -> Layout:
        answers = [answer for _, answers in rows for answer in answers]
        targets = [token for answer in answers for token in answer]
        tensors = [torch.tensor(values, device=device) for values in (ids, positions, scored, targets)]
        return Layout(tensors[0], tensors[1], tensors[2], tensors[3], tuple(map(len, answers)), spans)

    def per_answer(self, tokens: Float[Tensor, " n"]) -> Float[Tensor, " A"]:
        """Sums over each answer's tokens."""
        return torch.stack([part.sum() for part in tokens.split(self.counts)])


# ---- attention

_BLOCKS: ContextVar[list[tuple[int, Tensor]] | None] = ContextVar("blocks", default=None)  # length and mask of each prompt with answers


@contextmanager
def packed_attention(layout: Layout, dtype: torch.dtype) -> Iterator[None]:
    """Within it, models whose attention implementation is ATTENTION see the layout's blocks; outside, they do as `sdpa` does."""
    masks = {span: _mask(span, dtype, layout.ids.device) for span in set(layout.spans)}
    token = _BLOCKS.set([(span[0] + sum(span[1]), masks[span]) for span in layout.spans])
    try:
        yield
    finally:
        _BLOCKS.reset(token)


def register() -> None:
    """Make ATTENTION known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        blocks = _BLOCKS.get()
        if blocks is None:
            output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
            return output
        scaling = settings.get("scaling") or query.shape[-1] ** -0.5
        return _block_attention(query, key, value, blocks, scaling, settings.get("sliding_window")), None

    def masking(*arguments: Any, **settings: Any) -> Tensor | None:
        return sdpa_mask(*arguments, **settings) if _BLOCKS.get() is None else None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, masking)


def _block_attention(
    query: Float[Tensor, "1 H T D"],
    key: Float[Tensor, "1 K T D"],
    value: Float[Tensor, "1 K T D"],
    blocks: Sequence[tuple[int, Tensor]],
    scaling: float,
    window: int | None,
) -> Float[Tensor, "1 T H D"]:
    """Each block by itself: matrix product, masked softmax, matrix product, which on a CPU beats the fused kernels in bfloat16."""
    groups = query.shape[1] // key.shape[1]
    lengths = [length for length, _ in blocks]
    outputs = []
    parts = (tensor[0].split(lengths, 1) for tensor in (query * scaling, key, value))
    for (length, mask), q, k, v in zip(blocks, *parts, strict=True):
        if window is not None and length > window:
            raise PackingError(f"a window of {window} tokens of attention is shorter than a pair of {length}")
        if groups > 1:
            k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        weights = torch.softmax(q @ k.transpose(1, 2) + mask, -1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)[None]


class PackingError(Exception):
    """The packed form cannot stand in for what this model does."""


def _mask(span: tuple[int, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "L L"]:
    """Zero where a token may look and -inf elsewhere: causal, and no answer sees another."""
    prompt, answers = span
    bounds = [prompt, *itertools.accumulate(answers, initial=prompt)][1:]
    length = bounds[-1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    for begin, end in itertools.pairwise(bounds):
        allowed[begin:end, prompt:begin] = False
    return torch.zeros(length, length, dtype=dtype, device=device).masked_fill(~allowed, float("-inf"))


# ---- the vocabulary head


def token_log_probabilities(
    hidden: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"] | None, targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probabilities of tokens under a frozen linear head; the gradient is formed in the same pass, so logits live for a chunk only."""
    scores: Float[Tensor, " n"] = _Head.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
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
            probabilities = torch.log_softmax(logits, -1)
            scores.append(probabilities.gather(1, t[:, None])[:, 0])
            if wanted:
                gradients.append(weight[t] - probabilities.exp_().to(weight.dtype) @ weight)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, " n"]) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None
