"""Attention over the packed form, through transformers' attention interface.

No model is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedpref.models.packed import Layout

ATTENTION = "fedpref_packed"
# query [1, H, N, D], key and value [1, K, N, D], scaling -> [1, N, H, D]
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Kernel(Protocol):
    """A way to attend: a function from a layout to an attention over it."""

    __name__: str

    def __call__(self, layout: Layout) -> Attend: ...


# and how far back it may reach
# a context variable, because a layout belongs to one call of a model that is shared
_ATTEND: ContextVar[tuple[Attend, int] | None] = ContextVar("attend", default=None)


@contextmanager
def packed_attention(layout: Layout, kernel: Kernel) -> Iterator[None]:
    """Let models attend as a layout says, within a `with`; outside they do as `sdpa` does.

    Args:
        layout: The packed row.
        kernel: How to attend.
    """
    token = _ATTEND.set((kernel(layout), int(layout.positions.max()) + 1))
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
        (by_variable_length, by_sequence)
        if device.type == "cuda" and dtype != torch.float32
        else (by_sequence,)
    )


def by_sequence(layout: Layout) -> Attend:
    """Return an attention that takes one sequence after the other, each under its own mask."""
    bounds = [(ends[0], ends[-1]) for ends in layout.sequences]
    widest = max(end - begin for begin, end in bounds)
    causal = torch.full((widest, widest), float("-inf"), device=layout.ids.device).triu(1)
    exact = [_mask(causal, ends) for ends in layout.sequences]

    @cache
    def of(dtype: torch.dtype) -> list[Float[Tensor, "t t"]]:
        return [mask.to(dtype) for mask in exact]

    def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        masks = of(query.dtype)
        # the fused kernel's backward is slow in bfloat16 on a CPU
        if query.dtype == torch.bfloat16 and not query.is_cuda:
            plain: Any = _Attention.apply
            mixed: Tensor = plain(query[0], key[0], value[0], scaling, bounds, masks)
            return mixed[None].transpose(1, 2)
        widths = [end - begin for begin, end in bounds]
        # the row's padding, whose output is zero
        widths.append(query.shape[2] - sum(widths))
        rows = zip(*(tensor.split(widths, 2) for tensor in (query, key, value)), strict=True)
        fused = nn.functional.scaled_dot_product_attention
        mixed_rows = [
            fused(q, k, v, mask, scale=scaling)
            for (q, k, v), mask in zip(rows, masks, strict=False)
        ]
        return torch.cat([*mixed_rows, torch.zeros_like(query[:, :, : widths[-1]])], 2).transpose(
            1, 2
        )

    return attend


def _mask(causal: Float[Tensor, "T T"], ends: tuple[int, ...]) -> Float[Tensor, "t t"]:
    """Return a sequence's mask: 0 where a token (first axis) may look, -inf elsewhere.

    A token sees the prompt and its own part, not what comes after it.
    """
    _, opening, *rest = (end - ends[0] for end in ends)
    mask = causal[: rest[-1], : rest[-1]].clone()
    for end in rest[:-1]:
        # later answers do not see this one
        mask[end:, opening:end] = float("-inf")
    return mask


class _Attention(torch.autograd.Function):
    """Softmax attention of H heads within sequences, by plain matrix products."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "H N D"],
        key: Float[Tensor, "H N D"],
        value: Float[Tensor, "H N D"],
        scaling: float,
        bounds: Sequence[tuple[int, int]],
        masks: Sequence[Float[Tensor, "t t"]],
    ) -> Float[Tensor, "H N D"]:
        mixed = torch.zeros_like(query)
        kept = []
        for (begin, end), mask in zip(bounds, masks, strict=True):
            weights = torch.baddbmm(
                mask, query[:, begin:end], key[:, begin:end].transpose(1, 2), alpha=scaling
            ).softmax(-1)
            mixed[:, begin:end].baddbmm_(weights, value[:, begin:end])
            kept.append(weights)
        ctx.scaling, ctx.bounds = scaling, bounds
        ctx.save_for_backward(query, key, value, *kept)
        return mixed

    @staticmethod
    def backward(
        ctx: Any, upstream: Float[Tensor, "H N D"]
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        gradients = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (begin, end), weights in zip(ctx.bounds, kept, strict=True):
            part = slice(begin, end)
            slope = torch.bmm(upstream[:, part], value[:, part].transpose(1, 2))
            # weights * (slope - sum(slope * weights)) in one kernel, for which there is no public
            # name
            slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype)
            gradients[0][:, part].baddbmm_(slope, key[:, part], alpha=ctx.scaling)
            gradients[1][:, part].baddbmm_(slope.transpose(1, 2), query[:, part], alpha=ctx.scaling)
            gradients[2][:, part].baddbmm_(weights.transpose(1, 2), upstream[:, part])
        return *gradients, None, None, None


def by_variable_length(layout: Layout) -> Attend:
    """Return an attention that takes all sequences in one call of a GPU's kernel.

    The queries of each part meet the keys of its prompt and its own.
    """
    from torch.nn.attention.varlen import varlen_attn

    knows_groups = "enable_gqa" in signature(varlen_attn).parameters  # not before PyTorch 2.12
    positions: list[int] = []
    queries, keys = [0], [0]
    for begin, opening, *ends in layout.sequences:
        for first, last in zip((begin, opening, *ends), (opening, *ends), strict=False):
            if first < last:
                # an answer's keys are its prompt's, then its own; a prompt's are its own alone
                positions += [*range(begin, min(first, opening)), *range(first, last)]
                queries.append(last)
                keys.append(len(positions))
    device = layout.ids.device
    seen = torch.tensor(positions, device=device)
    starts = [torch.tensor(values, dtype=torch.int32, device=device) for values in (queries, keys)]
    longest = [max(end - begin for begin, end in pairwise(values)) for values in (queries, keys)]

    def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        settings: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
        if knows_groups:
            settings["enable_gqa"] = groups > 1
        elif groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        arguments: list[Any] = [
            rows[0][: queries[-1]],
            rows[1][seen],
            rows[2][seen],
            *starts,
            *longest,
        ]
        mixed: Any = varlen_attn(*arguments, **settings)
        return nn.functional.pad(mixed, (0, 0, 0, 0, 0, query.shape[2] - queries[-1]))[None]

    return attend
