"""Attention over the packed form, through transformers' attention interface.

No model is rewritten.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedpref.models.packed import Layout
from fedpref.models.variable_length import by_variable_length

ATTENTION = "fedpref_packed"
WIDTH = 32  # a new shape costs a CPU's matrix kernels more than a few tokens
# query [1, H, N, D], key and value [1, K, N, D], scaling -> [1, N, H, D]
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Kernel(Protocol):
    """A way to attend: a function from a layout to an attention over it."""

    __name__: str

    def __call__(self, layout: Layout) -> Attend: ...


# How to attend and how far back, in the call at work: a context variable, because one model serves
# several calls, each with a layout of its own.
_ATTEND: ContextVar[tuple[Attend, int] | None] = ContextVar("attend", default=None)


@contextmanager
def packed_attention(layout: Layout, kernel: Kernel) -> Iterator[None]:
    """Let models attend as a layout says, within a `with`; outside they do as `sdpa` does.

    Args:
        layout: The packed row.
        kernel: How to attend.
    """
    reach = max(len(before) + len(own) for before, own in layout.parts)
    token = _ATTEND.set((kernel(layout), reach))
    try:
        yield
    finally:
        _ATTEND.reset(token)


def register() -> None:
    """Make the packed form's attention known to transformers, under the name `ATTENTION`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        packed = _ATTEND.get()
        if packed is None:
            output: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, **settings
            )
            return output
        attend, reach = packed
        window = settings.get("sliding_window")
        if window is not None and window < reach:
            raise PackingError(f"attention reaches {window} tokens back, a pair is {reach} long")
        # the kernels below know neither
        if settings.get("softcap") is not None or settings.get("s_aux") is not None:
            raise PackingError("its attention has a soft cap or sinks")
        return attend(query, key, value, settings.get("scaling") or query.shape[-1] ** -0.5), None

    # no mask of the whole row's width is built: it would be quadratic in all tokens together
    def masking(*arguments: Any, **settings: Any) -> Tensor | None:
        return sdpa_mask(*arguments, **settings) if _ATTEND.get() is None else None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, masking)


class PackingError(Exception):
    """The packed form cannot stand in for what this model does."""


def kernels(device: torch.device, dtype: torch.dtype) -> tuple[Kernel, ...]:
    """Return the ways to attend on a device, the fastest first."""
    return (
        (by_variable_length, by_part)
        if device.type == "cuda" and dtype != torch.float32
        else (by_part,)
    )


def by_part(layout: Layout) -> Attend:
    """Return an attention that takes one prompt or answer after the other.

    Each meets what comes before it and itself, whatever else is in the row, so that its bits do
    not depend on that.
    """
    parts = layout.parts
    device = layout.ids.device

    @cache
    def masks(dtype: torch.dtype, unit: int) -> list[Float[Tensor, "q k"]]:
        return [_mask(len(before), len(own), unit, dtype, device) for before, own in parts]

    def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        # the fused kernel's backward is slow in bfloat16 on a CPU
        if query.dtype == torch.bfloat16 and not query.is_cuda:
            plain: Any = _Attention.apply
            mixed: Tensor = plain(
                query[0], key[0], value[0], scaling, parts, masks(query.dtype, WIDTH)
            )
            return mixed[None].transpose(1, 2)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        fused = nn.functional.scaled_dot_product_attention
        widths = [len(own) for _, own in parts]
        widths.append(query.shape[2] - sum(widths))  # the row's padding, whose output is zero
        # cut once: the gradient of a slice is as large as the whole
        *rows, rest = query.split(widths, 2)
        keys, values = key.split(widths, 2), value.split(widths, 2)
        openings = [i for i, (before, _) in enumerate(parts) if not before]
        mixed_parts = []
        for i, mask in enumerate(masks(query.dtype, 1)):
            opening = openings[bisect_right(openings, i) - 1]
            seen = [opening, i] if opening != i else [i]
            k, v = (torch.cat([tensors[j] for j in seen], 2) for tensors in (keys, values))
            mixed_parts.append(fused(rows[i], k, v, mask, scale=scaling))
        return torch.cat([*mixed_parts, torch.zeros_like(rest)], 2).transpose(1, 2)

    return attend


def _slice(places: range) -> slice:
    return slice(places.start, places.stop)


def _mask(
    before: int, own: int, unit: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "q k"]:
    """Return a part's mask, 0 where a token (first axis) may look and -inf elsewhere.

    Args:
        before: How many tokens come before the part.
        own: How many tokens it has.
        unit: Both axes are as long as the next multiple of it. What fills up the first sees
            everything, so that it is a number.
        dtype: Of the mask.
        device: Of the mask.
    """
    rows, columns = (-(-count // unit) * unit for count in (own, before + own))
    mask = torch.full((rows, columns), float("-inf"), dtype=dtype, device=device).triu_(before + 1)
    mask[:, before + own :] = float("-inf")
    return mask


class _Attention(torch.autograd.Function):
    """Softmax attention of H heads, by plain matrix products for each part of the row.

    Queries of the heads that share a key are rows of one product. Sizes are multiples of `WIDTH`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "H N D"],
        key: Float[Tensor, "K N D"],
        value: Float[Tensor, "K N D"],
        scaling: float,
        parts: Sequence[tuple[range, range]],
        masks: Sequence[Float[Tensor, "q k"]],
    ) -> Float[Tensor, "H N D"]:
        mixed = torch.zeros_like(query)
        kept = []
        for (before, own), mask in zip(parts, masks, strict=True):
            q, k, v = _padded(query, key, value, before, own, mask)
            groups = q.shape[1] // len(mask)
            weights = torch.baddbmm(
                mask.repeat(groups, 1), q, k.transpose(1, 2), alpha=scaling
            ).softmax(-1)
            _unpadded(torch.bmm(weights, v), len(query), len(mask), mixed[:, _slice(own)])
            kept.append(weights)
        ctx.scaling, ctx.parts = scaling, parts
        ctx.save_for_backward(query, key, value, *kept)
        return mixed

    @staticmethod
    def backward(
        ctx: Any, upstream: Float[Tensor, "H N D"]
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        slopes = torch.zeros_like(query)
        # sums over all answers of a prompt
        key_slopes, value_slopes = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        groups = len(query) // len(key)
        for (before, own), weights in zip(ctx.parts, kept, strict=True):
            rows = weights.shape[1] // groups
            q, k, v = _padded(query, key, value, before, own, weights[0, :rows])
            above = _rows(upstream, own, rows, len(key))
            slope = torch.bmm(above, v.transpose(1, 2))
            # weights * (slope - sum(slope * weights)) in one kernel, for which there is no public
            # name
            slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype)
            _unpadded(
                torch.bmm(slope, k).mul_(ctx.scaling), len(query), rows, slopes[:, _slice(own)]
            )
            for sums, found, factor in (
                (key_slopes, torch.bmm(slope.transpose(1, 2), q), ctx.scaling),
                (value_slopes, torch.bmm(weights.transpose(1, 2), above), 1.0),
            ):
                end = len(before) + len(own)
                sums[:, _slice(before)].add_(found[:, : len(before)], alpha=factor)
                sums[:, _slice(own)].add_(found[:, len(before) : end], alpha=factor)
        return slopes, key_slopes.to(key.dtype), value_slopes.to(value.dtype), None, None, None


def _padded(
    query: Float[Tensor, "H N D"],
    key: Float[Tensor, "K N D"],
    value: Float[Tensor, "K N D"],
    before: range,
    own: range,
    like: Float[Tensor, "q k"],
) -> tuple[Float[Tensor, "K g D"], Float[Tensor, "K k D"], Float[Tensor, "K k D"]]:
    """Return a part's queries, and the keys and values that they meet, in the mask's sizes."""
    rows, columns = like.shape
    padded = []
    for tensor in (key, value):
        met = tensor.new_zeros(len(tensor), columns, tensor.shape[-1])
        met[:, : len(before)] = tensor[:, _slice(before)]
        met[:, len(before) : len(before) + len(own)] = tensor[:, _slice(own)]
        padded.append(met)
    return _rows(query, own, rows, len(key)), padded[0], padded[1]


def _rows(
    tensor: Float[Tensor, "H N D"], own: range, rows: int, heads: int
) -> Float[Tensor, "K g D"]:
    """Return a part's rows of all heads, those that share a key below each other."""
    wide = tensor.new_zeros(len(tensor), rows, tensor.shape[-1])
    wide[:, : len(own)] = tensor[:, _slice(own)]
    return wide.view(heads, -1, tensor.shape[-1])


def _unpadded(
    wide: Float[Tensor, "K g D"], heads: int, rows: int, into: Float[Tensor, "H n D"]
) -> None:
    """Write what `_rows` has padded, without the padding."""
    into.copy_(wide.view(heads, rows, -1)[:, : into.shape[1]])
