"""One root seed; every random draw has an address of its own, so that no draw depends on which others were made before it."""

from __future__ import annotations

from hashlib import blake2b

import torch


def seed(root: int, purpose: str, *, round: int = 0, call: int = 0, client: int = -1) -> int:
    """A 63-bit seed for the address (purpose, round, call, client); -1 stands for the coordinator."""
    address = f"{root}/{purpose}/{round}/{call}/{client}".encode()
    return int.from_bytes(blake2b(address, digest_size=8).digest()) >> 1


def generator(root: int, purpose: str, *, round: int = 0, call: int = 0, client: int = -1) -> torch.Generator:
    """A CPU generator seeded for the address."""
    return torch.Generator().manual_seed(seed(root, purpose, round=round, call=call, client=client))
