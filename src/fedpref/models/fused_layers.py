"""Layers as one operation each: a linear layer with a LoRA adapter, and GPT-2's GELU.

PEFT and transformers compute these in pieces; on a small model the pieces cost more than the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Spans = tuple[tuple[int, int], ...]
# where each unit's tokens begin and end, while gradients are taken apart by units
_SPANS: ContextVar[tuple[int, Spans] | None] = ContextVar("spans", default=None)


@contextmanager
def taken_apart(tokens: int, spans: Spans) -> Iterator[None]:
    """Let adapters come as a copy for each unit of a row's tokens, within a `with`.

    Each copy's gradient is that of its unit's tokens alone.

    Args:
        tokens: Of the whole row.
        spans: Where each unit's begin and end.
    """
    token = _SPANS.set((tokens, spans))
    try:
        yield
    finally:
        _SPANS.reset(token)


def fuse(model: nn.Module) -> None:
    """Replace the forward of layers that have a form in one operation.

    These are PEFT's plain LoRA layers over `nn.Linear` and GPT-2's `Conv1D` where no dropout is
    drawn, and activations that write out GELU's approximation by tanh, which PyTorch has in one.
    """
    from peft.tuners.lora.layer import Linear
    from transformers.activations import FastGELUActivation, NewGELUActivation
    from transformers.pytorch_utils import Conv1D

    modules: list[Any] = list(model.modules())
    # the type itself: subclasses of PEFT's layer quantise or scatter
    layers = [layer for layer in modules if type(layer) is Linear and "default" in layer.lora_A]
    for layer in layers:
        base = layer.base_layer
        # the type itself again: a subclass may quantise in its forward, which would be skipped
        if type(base) in (nn.Linear, Conv1D) and "forward" not in vars(base):
            layer.forward = _forward(layer, type(base) is Conv1D)
    for activation in modules:
        # the type itself: a subclass may compute something else
        if type(activation) in (NewGELUActivation, FastGELUActivation):
            activation.forward = partial(nn.functional.gelu, approximate="tanh")
    for norm in modules:
        if _is_plain_norm(norm):
            norm.forward = _normed(norm)


def _is_plain_norm(module: Any) -> bool:
    """Return whether a module divides by the root mean square and multiplies by its weight."""
    weight, small = (getattr(module, name, None) for name in ("weight", "variance_epsilon"))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(small, float):
        return False
    if not isinstance(weight, Tensor) or weight.dim() != 1 or _hooks(module):
        return False
    # some add one to the weight
    x = torch.linspace(-2, 2, 3 * len(weight), device=weight.device).view(3, -1)
    with torch.no_grad():
        expected = nn.functional.rms_norm(x, weight.shape, weight.float(), small)
        return bool((module(x).float() - expected).norm() <= 0.01 * expected.norm())


def _normed(norm: Any) -> Callable[[Tensor], Tensor]:
    usual: Callable[[Tensor], Tensor] = norm.forward

    def forward(x: Tensor) -> Tensor:
        # on a CPU it is written out anyway
        if not x.is_cuda or x.dtype != norm.weight.dtype:
            return usual(x)
        return nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    return forward


def _hooks(module: nn.Module) -> bool:
    """Return whether anything is called beside a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _forward(layer: Any, transposed: bool) -> Callable[..., Tensor]:
    usual: Callable[..., Tensor] = layer.forward

    def forward(x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        down, up, dropout = (
            part["default"] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout)
        )
        # dropout acts on what goes into the adapter alone, for which this form has no place
        random = dropout.training and not isinstance(dropout, nn.Identity)
        if (
            random
            or _hooks(layer.base_layer)
            or layer.disable_adapters
            or arguments
            or settings
            or down.weight.dtype != x.dtype
        ):
            return usual(x, *arguments, **settings)
        weight = layer.base_layer.weight.T if transposed else layer.base_layer.weight
        scaling = layer.scaling["default"]
        flat = x.flatten(0, -2)
        output: Tensor = _LoRA.apply(
            flat,
            weight,
            layer.base_layer.bias,
            down.weight,
            up.weight,
            scaling,
            _spans(flat) if down.weight.dim() + up.weight.dim() > 4 else None,
        )  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], len(weight))

    return forward


def _spans(flat: Float[Tensor, "n i"]) -> Spans:
    tokens, spans = _SPANS.get() or (0, ())
    if len(flat) != tokens:
        # a layer that sees some of the tokens, as an expert does
        raise ValueError(f"a layer has {len(flat)} rows, and the tokens are {tokens}")
    return spans


class _LoRA(torch.autograd.Function):
    """x W' + b + s (x A') B' of a frozen W and b, with its gradient.

    A and B may be given as equal copies, one for each span of rows; each copy's gradient is then
    that of its span.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "n i"],
        weight: Float[Tensor, "o i"],
        bias: Float[Tensor, " o"] | None,
        down: Float[Tensor, "r i"] | Float[Tensor, "U r i"],
        up: Float[Tensor, "o r"] | Float[Tensor, "U o r"],
        scaling: float,
        spans: Spans | None,
    ) -> Float[Tensor, "n o"]:
        down, up = (one[0] if one.dim() == 3 else one for one in (down, up))
        inner = x @ down.T
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scaling, ctx.spans = scaling, spans
        # in place: the frozen layer's output is of no use by itself
        return nn.functional.linear(x, weight, bias).addmm_(inner, up.T, alpha=scaling)

    @staticmethod
    def backward(
        ctx: Any, upstream: Float[Tensor, "n o"]
    ) -> tuple[Tensor, None, None, Tensor | None, Tensor | None, None, None]:
        x, weight, down, up, inner = ctx.saved_tensors
        slope = (upstream @ up).mul_(ctx.scaling)
        gradient = (upstream @ weight).addmm_(slope, down)
        if ctx.spans is None:
            own = slope.T @ x, (upstream.T @ inner).mul_(ctx.scaling)
            return gradient, None, None, *own, None, None
        downs = ups = None
        if ctx.needs_input_grad[3]:
            downs = torch.stack([slope[a:b].T @ x[a:b] for a, b in ctx.spans])
        if ctx.needs_input_grad[4]:
            ups = torch.stack([upstream[a:b].T @ inner[a:b] for a, b in ctx.spans])
            ups.mul_(ctx.scaling)
        return gradient, None, None, downs, ups, None, None
