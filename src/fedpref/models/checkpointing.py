"""Gradient checkpointing: a layer's inner states are computed again in the backward pass.

transformers' own would compute them with the adapter that the module has then, for a client's is
passed in for the forward pass alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class _Whole(nn.Module):
    """A layer with the forward that it had."""

    def __init__(self, layer: nn.Module, usual: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self._usual = layer, usual

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        return self._usual(*arguments, **settings)


def checkpoint_layers(layers: Iterable[Any]) -> None:
    """Let layers keep nothing but their input for the backward pass."""
    for layer in layers:
        layer.forward = _computed_again(_Whole(layer, layer.forward))


def _computed_again(whole: _Whole) -> Callable[..., Any]:
    def forward(*arguments: Any, **settings: Any) -> Any:
        if not torch.is_grad_enabled():
            return whole(*arguments, **settings)
        # as they are now: the client's adapter, and where the parts of packed rows lie
        named = {name: p for name, p in whole.named_parameters() if p.requires_grad}
        context = copy_context()

        def run(*given: Tensor) -> Any:
            parameters = dict(zip(named, given, strict=True))
            return context.run(functional_call, whole, parameters, arguments, settings)

        return checkpoint(run, *named.values(), use_reentrant=False)

    return forward
