"""Models of transformers: loaded one at a time, and whole."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch

from fedpref.errors import UserError

Load = TypeVar("Load", bound=Callable[..., Any])
_LOADING = threading.RLock()
NO_LENGTH = 10**9  # and more is what tokenizers of transformers say that know none


def one_at_a_time(load: Load) -> Load:
    """Return a function that loads a model, for which threads wait for one another.

    While transformers loads, it changes its classes for the whole process; two threads at once
    leave them changed.
    """

    @functools.wraps(load)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _LOADING:
            return load(*args, **kwargs)

    return cast(Load, alone)


def refuse_partial(
    model: torch.nn.Module, said: Mapping[str, Any], setting: str, spare: str = ""
) -> None:
    """Refuse a model of transformers that did not come whole.

    What its files lack transformers draws at random, anew each time that it is loaded.

    Args:
        model: The model.
        said: What `from_pretrained` says of its loading.
        setting: Where the model is named, and its name.
        spare: What stands in the names of weights that nobody needs.

    Raises:
        UserError: Weights are missing, or hold what is no number.
    """
    missing = sorted(name for name in said["missing_keys"] if not spare or spare not in name)
    if missing:
        raise UserError(
            f"{setting}: its files lack {_some(missing)}, which would be random numbers, others "
            "each time. Fetch the folder anew, or save the whole model (save_pretrained)."
        )
    broken = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point()
        and weight.numel()
        and not all(map(torch.isfinite, weight.detach().aminmax()))
    ]
    if broken:
        raise UserError(
            f"{setting}: {_some(broken)} hold numbers that are not finite. The file is damaged, or "
            "the model's training diverged; take another."
        )


def longest_input(model: Any, tokenizer: Any) -> int | None:
    """Return how many tokens a model reads at once; None where neither it nor its tokenizer says.

    RoBERTa and its like count positions from behind the padding's, which no token has.
    """
    said = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    said += [
        len(part.weight) - part.padding_idx - 1
        for name, part in model.named_modules()
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None
    ]
    said.append(tokenizer.model_max_length)
    known = [int(one) for one in said if one and 0 < one < NO_LENGTH]
    return min(known, default=None)


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first!r} and {len(rest)} weights more" if rest else f"the weight {first!r}"
