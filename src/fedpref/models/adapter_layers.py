"""Where an adapter sits in a model: which layers have one, and which cannot."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedpref.errors import UserError
from fedpref.models.model_settings import ALL_LINEAR, Model
from fedpref.models.trunk import row_of_layers

if TYPE_CHECKING:
    from peft import PeftModel

    from fedpref.models.backbone import Backbone

# of the models of `_SSM_TYPES`: what PEFT refuses, and what is read without being called
_SSM = frozenset({"out_proj", "conv1d", "dt_proj"})
_SSM_TYPES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})  # which decide where a token goes


def with_adapter(backbone: Backbone, settings: Model) -> PeftModel:
    """Return the backbone with a fresh adapter of PEFT on its layers.

    Args:
        backbone: The model, whose layers are wrapped.
        settings: What the adapter is, and where.

    Raises:
        UserError: It cannot be on the layers that are named.
    """
    from peft import LoraConfig, get_peft_model

    width = backbone.model.config.get_text_config().hidden_size
    if settings.lora_r > width:
        raise UserError(
            f"task.model.lora_r: a rank of {settings.lora_r} is above the model's width, {width}, "
            "which holds any change of its layers. Take a lower one."
        )
    targets = settings.lora_target_modules
    where = placed(backbone.model, targets, settings.lora_layers_to_transform)
    lora = partial(
        LoraConfig,
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        lora_dropout=settings.lora_dropout,
        base_model_name_or_path=backbone.base,
        revision=backbone.revision,
    )
    adapter = lora(**where)
    try:
        with warnings.catch_warnings():
            # of GPT-2's transposed weights, which PEFT handles, and of its own deprecations
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", category=FutureWarning)
            # an adapter on the ends of a tied model, which merging unties
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            model: PeftModel = get_peft_model(backbone.model, adapter)
            # PEFT has all experts' factors in two matrices, whose product is nobody's change
            if adapter.target_parameters:
                if targets != ALL_LINEAR:
                    raise ValueError(
                        "it would be on a mixture's experts or router. Name others, such as "
                        "q_proj and v_proj"
                    )
                others = {**where, "target_modules": sorted(adapter.target_modules)}
                model = get_peft_model(model.unload(), lora(**others))
    except (ValueError, re.error) as error:
        raise UserError(
            f"model.lora_target_modules: {targets!r} does not fit the model: {error}"
        ) from error
    return model.eval()


def placed(
    model: Any, targets: Sequence[str] | str, layers: Sequence[int] | str | None
) -> dict[str, Any]:
    """Return where an adapter sits, in the words of PEFT's LoraConfig.

    Args:
        model: The backbone.
        targets: Names of layers, a regular expression, or `all-linear`.
        layers: In which decoder layers alone, by number or as `last-8`; None for all.

    Raises:
        UserError: The model does not have them.
    """
    from transformers.pytorch_utils import Conv1D

    left = left_out(model, targets) or None
    names = targets if isinstance(targets, str) else list(targets)
    if layers is None:
        return {"target_modules": names, "exclude_modules": left}
    if isinstance(names, str) and names != ALL_LINEAR:
        raise UserError(
            "model.lora_layers_to_transform: a regular expression in lora_target_modules names "
            "layers by itself. Give names such as q_proj, or all-linear."
        )
    row = row_of_layers(model)
    count = len(row[1]) if row else 0
    if isinstance(layers, str):
        wanted = int(layers.removeprefix("last-"))
        numbers = list(range(count - wanted, count)) if wanted <= count else []
    else:
        numbers = sorted(set(layers))
    if row is None or not numbers or min(numbers) < 0 or max(numbers) >= count:
        raise UserError(
            f"model.lora_layers_to_transform: {layers!r} does not fit the model, which has "
            f"{count} layers."
        )
    if names == ALL_LINEAR:
        names = sorted(
            {
                name.rsplit(".", 1)[-1]
                for number in numbers
                for name, module in row[1][number].named_modules()
                if isinstance(module, nn.Linear | Conv1D)
            }
        )
    return {
        "target_modules": names,
        "exclude_modules": left,
        "layers_to_transform": numbers,
        "layers_pattern": row[0].rsplit(".", 1)[-1],
    }


def left_out(model: Any, targets: Sequence[str] | str) -> list[str]:
    """Return the linear layers that targets do not mean.

    Names do not mean those of towers that no text passes through, such as a vision model's.
    `all-linear` also leaves out routers, other layers that return more than a tensor, and those
    that PEFT refuses. A regular expression means what it says.

    Args:
        model: The backbone.
        targets: Names of layers, a regular expression, or `all-linear`.

    Raises:
        UserError: The model does not run on text alone.
    """
    if targets != ALL_LINEAR and isinstance(targets, str):
        return []
    from transformers.pytorch_utils import Conv1D

    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    seen: dict[str, bool] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = isinstance(output, torch.Tensor)

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in linear.items()]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    # whatever a model's own code makes of a plain text
    except Exception as error:
        raise UserError(
            f"model.path: the model does not run on text alone: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    idle = {name for name in linear if name not in seen and _is_in_idle_tower(name, seen)}
    if targets != ALL_LINEAR:
        return sorted(name for name in idle if f".{name}".endswith(tuple(f".{t}" for t in targets)))
    is_ssm = model.config.model_type in _SSM_TYPES
    return sorted(
        name
        for name in linear
        if not seen.get(name, True)
        or name.rsplit(".", 1)[-1] in _ROUTERS
        or name in idle
        or (is_ssm and name.rsplit(".", 1)[-1] in _SSM)
    )


def _is_in_idle_tower(name: str, seen: Mapping[str, bool]) -> bool:
    """Return whether no layer is called of a layer's whole part of the model.

    Parts are the model's own and those of its inner model. An expert to which no token happened to
    be sent is not idle: others of its part are called.
    """
    part = name.split(".")
    return any(
        not any(other.startswith(".".join(part[:depth]) + ".") for other in seen)
        for depth in (1, 2)
        if len(part) > depth
    )
