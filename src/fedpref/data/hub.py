"""Whether the Hub can be reached, found out once and within seconds; whether a model came whole."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from fedpref.errors import UserError

SECONDS = 5.0  # in which a connection is there, or is given up
LOG = logging.getLogger(__name__)


def look_for_hub(path: str) -> None:
    """Let the Hub's libraries read what is kept on this machine alone, where it cannot be reached.

    Otherwise they would try again for a minute, for each file.

    Args:
        path: A Hub id, or a local file or folder, of which nothing is asked.
    """
    if Path(path).expanduser().exists() or _is_reached():
        return
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def refuse_partial(
    model: torch.nn.Module, said: Mapping[str, Any], setting: str, spare: str = ""
) -> None:
    """Refuse a model of transformers that did not come whole.

    What its files lack transformers draws at random, anew each time that it is loaded.

    Args:
        model: The model.
        said: What `from_pretrained` says of its loading.
        setting: Where the model is named, and its name.
        spare: What the name of a weight begins with that nobody needs.

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


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return f"{first!r} and {len(rest)} weights more" if rest else f"the weight {first!r}"


@cache
def _is_reached() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return True  # it is asked for, or a proxy knows the way
    server = urlsplit(constants.ENDPOINT)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((str(server.hostname), port), SECONDS).close()
    except OSError as error:
        LOG.warning("%s cannot be reached (%s)", constants.ENDPOINT, error)
        return False
    return True
