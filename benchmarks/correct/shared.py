"""What the parts share: random models, and where an exception came from."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 4096  # of the shipped tokenizer
BUILTIN = str(files("fedpref.models") / "builtin")


def random_model(
    folder: Path,
    settings: Any,
    tokenizer: Any,
    change: Callable[[Any], None] = lambda model: None,
    scale: float = 10.0,
) -> str:
    """Save a model with weights large enough for attention and logits to be far from uniform.

    Vectors (biases, norms, sinks) get noise, so that one that is left out is noticed.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif not name.endswith("A_log"):  # of state spaces: logarithms of decay
                parameter.mul_(scale)
        change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def last_frames(frames: Sequence[traceback.FrameSummary]) -> str:
    """Return where a traceback ends, and the last line of fedpref that led there."""
    others = [f for f in frames if f.filename != __file__ and "hypothesis" not in f.filename]
    ours = [frame for frame in others if "fedpref/" in frame.filename]
    told = [
        f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} {frame.name}"
        for frame in [*others[-1:], *ours[-1:]]
    ]
    return " from ".join(dict.fromkeys(told))


def origin(error: BaseException) -> str:
    """Return where an exception was raised."""
    return last_frames(traceback.extract_tb(error.__traceback__))


def sentence(error: BaseException) -> str:
    """Return an exception in a line."""
    text = " ".join(str(error).encode("ascii", "backslashreplace").decode().split())
    return f"{type(error).__name__}: {text[:120]}"


def said(role: str, content: str) -> dict[str, str]:
    """Return a message."""
    return {"role": role, "content": content}


SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


TURNS = (said("user", "Why is it dark?"), said("assistant", "It is night."))


QUESTION = said("user", "And when is it light again?")
