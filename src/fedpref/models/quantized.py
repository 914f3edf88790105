"""A frozen backbone in four or eight bits, by bitsandbytes; adapters on it stay in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedpref.errors import require


def options(bits: int, dtype: Any) -> dict[str, Any]:
    """Return what `from_pretrained` is given to load a model in so many bits.

    Args:
        bits: 4 (NF4, with scales that are quantised too) or 8 (LLM.int8).
        dtype: What products are computed in, or "auto" where that is not known yet.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    require(f"task.model.load_in_{bits}bit", "quantized", "bitsandbytes", "accelerate")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32 if dtype == "auto" else dtype,
        )
    # not on a GPU yet: an open one cannot be forked
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Let four-bit layers compute in a dtype, training and evaluation alike."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # a form for evaluation alone, which rounds otherwise, and replaces the weights
            module.support_avx512bf16_for_cpu = False


def size(parameter: Tensor) -> int:
    """Return how many numbers a parameter stands for; of four bits, two share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def scales(module: nn.Module) -> dict[str, Tensor]:
    """Return what a quantised layer's integers are multiplied by; empty for any other layer."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        found = {"absmax": state.absmax}
        return found | ({"absmax2": state.state2.absmax} if state.nested else {})
    # the first product takes it from the weight
    scale = getattr(weight, "SCB", None)
    if scale is None:
        scale = getattr(getattr(module, "state", None), "SCB", None)
    return {} if scale is None else {"scale": scale}
