"""Which device computes, and in which arithmetic.

Nothing here opens a CUDA context before a worker moves to its device: an open one cannot be forked.
"""

from __future__ import annotations

import math
import os
import time
from functools import cache

import torch

from fedpref.errors import UserError

SIDE, TURNS = 512, 5  # of products by which two kinds of numbers are compared


def wanted(name: str) -> torch.device:
    """Return the device that a setting means, a GPU without a number for any of them.

    Raises:
        UserError: There is no such device.
    """
    # count GPUs without opening one: an open one cannot be forked
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f'model.device: {name!r} is no device; expected "auto", "cpu", "cuda" or "cuda:0".'
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f'model.device: {name!r} is not supported; expected "auto", "cpu", "cuda" or "cuda:0".'
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"model.device: {name!r} was asked for, but this PyTorch sees no CUDA GPU. Set "
            'model.device to "cpu" or "auto".'
        )
    return device


def count(device: torch.device) -> int:
    """Return how many workers have a processor, or a GPU, of their own."""
    if device.type == "cuda":
        return 1 if device.index is not None else torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def of_worker(device: torch.device, worker: int) -> torch.device:
    """Return the device of a worker; GPUs are dealt out in turn."""
    return (
        torch.device("cuda", worker % torch.cuda.device_count())
        if device == torch.device("cuda")
        else device
    )


def arithmetic(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a setting means on a device.

    `auto` is bfloat16 where the device computes faster in it.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else _processor_is_fast()
    return torch.bfloat16 if fast else torch.float32


@cache
def _processor_is_fast() -> bool:
    """Return whether products in bfloat16 are faster than in float32.

    Where there are tiles for them (AMX) they are, by far. Other processors that know bfloat16
    differ: it takes half the time on some and twice as long on others, so that it is tried.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    seconds = dict.fromkeys((torch.bfloat16, torch.float32), math.inf)
    for _ in range(TURNS):
        for dtype, before in seconds.items():
            matrix = torch.ones(SIDE, SIDE, dtype=dtype)
            begun = time.thread_time()
            torch.mm(matrix, matrix)
            seconds[dtype] = min(before, time.thread_time() - begun)
    return seconds[torch.bfloat16] < seconds[torch.float32]
