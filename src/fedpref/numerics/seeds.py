"""Seeds: every random draw has an address, so that none depends on which others were made."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch

Draws = Callable[[str], torch.Generator]
"""draws(address): a CPU generator whose numbers hang on the address, not on what else is drawn."""


def seed(root: int, purpose: str, *, round: int = 0, call: int = 0, client: int = -1) -> int:
    """Return a 63-bit seed.

    Args:
        root: The experiment's seed.
        purpose: What is drawn.
        round: From 0.
        call: The number of the verb within the round.
        client: The client's number; -1 for the coordinator.
    """
    address = f"{root}/{purpose}/{round}/{call}/{client}".encode()
    return int.from_bytes(blake2b(address, digest_size=8).digest()) >> 1


def generator(
    root: int, purpose: str, *, round: int = 0, call: int = 0, client: int = -1
) -> torch.Generator:
    """Return a CPU generator seeded for an address; see `seed`."""
    return torch.Generator().manual_seed(seed(root, purpose, round=round, call=call, client=client))


def of_device(device: torch.device) -> torch.Generator:
    """Return what dropout draws from on a device."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    found: torch.Generator = torch.cuda.default_generators[index]
    return found
