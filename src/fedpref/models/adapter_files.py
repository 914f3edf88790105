"""An adapter as the folder that PEFT reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpref.models.backbone import PREFIX, side_by_side
from fedpref.models.own_parts import NAMES, OWN_ADAPTER, combined_adapter
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree, is_down


def write_adapter(config: Any, params: Tree, merged: Tree, folder: Path) -> None:
    """Write an adapter, with PEFT's config of it; two of one client are written as one.

    Args:
        config: PEFT's, of the adapter that is trained.
        params: An adapter, with parts of a client's own, of which only a second adapter is written.
        merged: An adapter that the backbone was loaded with, which is written beside it; empty if
            there was none.
        folder: Where to.
    """
    adapter = combined_adapter(
        {name: tensor for name, tensor in params.items() if name not in NAMES}
    )
    scale = scale_of(config)
    if any(name.startswith(OWN_ADAPTER) for name in params):  # two as one of twice the rank
        config = replace(config, r=2 * config.r, lora_alpha=2 * config.lora_alpha)
        if config.use_rslora:  # whose scale falls with the root of the rank
            config = replace(config, lora_alpha=scale * config.r, use_rslora=False)
    if merged:
        # on the same base, as one adapter whose scale is in its factors
        scaled = {n: t if is_down(n) else t * scale for n, t in adapter.items()}
        adapter = side_by_side(merged, scaled)
        layers = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in adapter}
        rank = next(t.shape[0] for name, t in adapter.items() if is_down(name))
        config = replace(
            config,
            r=rank,
            lora_alpha=rank,
            use_rslora=False,
            target_modules=sorted(layers),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    config = replace(config)
    # PEFT writes a set as it comes, in another order in each process
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))
    trees.save(adapter, folder / "adapter_model.safetensors")


def scale_of(config: Any) -> float:
    """Return what an adapter's product is multiplied by, by PEFT's config of it."""
    return float(config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))
