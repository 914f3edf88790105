"""Parameters in the arithmetic and on the device of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedpref.numerics.trees import Tree


def cast(params: Tree, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return parameters on a device, in its arithmetic."""
    if device.type == "cuda" and all(tensor.is_cuda for tensor in params.values()) and params:
        made = _Cast.apply(dtype, *params.values())  # type: ignore[no-untyped-call]
        return dict(zip(params, made, strict=True))
    return {name: aligned(tensor.to(device, dtype)) for name, tensor in params.items()}


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, copied unless its memory is 64-byte aligned.

    CPU kernels round differently on unaligned memory, and received tensors may be unaligned.
    """
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


class _Cast(torch.autograd.Function):
    """Tensors in another arithmetic, all in few launches."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kinds = [tensor.dtype for tensor in tensors]
        return tuple(_copies(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        known = [(s, kind) for s, kind in zip(upstream, ctx.kinds, strict=True) if s is not None]
        each = iter(_copies([slope for slope, _ in known], [kind for _, kind in known]))
        return (None, *(None if slope is None else next(each) for slope in upstream))


def _copies(tensors: Sequence[Tensor], kinds: Sequence[torch.dtype]) -> list[Tensor]:
    made = [
        torch.empty_like(tensor, dtype=kind, memory_format=torch.contiguous_format)
        for tensor, kind in zip(tensors, kinds, strict=True)
    ]
    torch._foreach_copy_(made, list(tensors))
    return made
