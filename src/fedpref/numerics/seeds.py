"""Seeds: every random draw has an address, so that none depends on which others were made."""

from __future__ import annotations

from hashlib import blake2b

import torch


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
