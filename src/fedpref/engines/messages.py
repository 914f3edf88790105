"""Messages between a coordinator and sites: safetensors, with a JSON header among the metadata.

Whoever receives a message checks it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from fedpref import __version__
from fedpref.numerics.trees import Tree

Header = dict[str, Any]
NO_TENSORS: Tree = {}


# of messages; 1 did not say so, 2 had no labels of values and no `consent`, in 3 the header stood
# before the safetensors, 4 had no sums with noise, in 5 a site shared masks with every other one
FORMAT = 6
HEADER = "fedpref"  # among the metadata
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MOST_HEADER = 32 * 10**6  # bytes of a header, which takes some ten times as much when it is read


class RefusedError(Exception):
    """A receiver will not take or do something; the reason goes back to the sender."""


def pack(header: Mapping[str, Any], tensors: Tree = NO_TENSORS) -> bytes:
    """Return a message of a header and tensors, whose numbers are copied once."""
    index: dict[str, Any] = {"__metadata__": {HEADER: json.dumps(header)}}
    buffers: list[memoryview] = []
    end = 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        start, end = end, end + len(flat)
        index[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        buffers.append(flat.data)
    head = json.dumps(index).encode()
    head += b" " * (-len(head) % 8)  # numbers begin at a multiple of their size
    return b"".join([len(head).to_bytes(8, "little"), head, *buffers])


def unpack(message: bytes, limit: int | None = None) -> tuple[Header, Tree]:
    """Return a message's header and tensors.

    Args:
        message: The bytes.
        limit: The largest message that is taken, in bytes.

    Raises:
        RefusedError: It is not a fedpref message, or too large.
    """
    if limit is not None and len(message) > limit:
        raise RefusedError(f"a message of {len(message)} bytes is above the limit of {limit}")
    header = head_of(message)
    try:
        tensors = safetensors.torch.load(message)
    except Exception as error:  # of several kinds, for what somebody has made up
        raise RefusedError(f"not a fedpref message: {error}") from error
    if strange := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES]:
        raise RefusedError(f"the tensor {strange[0][:80]!r} is of a type that does not travel")
    return header, tensors


def head_of(message: bytes) -> Header:
    """Return a message's header; its tensors are not read.

    Raises:
        RefusedError: It is not a fedpref message.
    """
    end = 8 + int.from_bytes(message[:8], "little")
    if end > MOST_HEADER:
        raise RefusedError(
            f"not a fedpref message, or its header of {end} bytes is above the limit of "
            f"{MOST_HEADER}"
        )
    try:
        header = json.loads(json.loads(message[8:end])["__metadata__"][HEADER])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RefusedError(f"not a fedpref message: {error}") from error
    if not isinstance(header, dict):
        raise RefusedError(f"not a fedpref message, its header is no mapping: {str(header)[:40]!r}")
    return header


def version() -> Header:
    """Return what `open` and every answer say of whoever sends them."""
    return {"format": FORMAT, "fedpref": __version__}


def refuse_other_format(header: Header, sender: str) -> None:
    """Take the version out of a header.

    Args:
        header: Of a message; `format` and `fedpref` are removed.
        sender: Who sent it, for the error.

    Raises:
        RefusedError: The message is of another format; the text says which side is older.
    """
    format, theirs = header.pop("format", 1), header.pop("fedpref", "0.1.0 or older")
    if format != FORMAT:
        is_older = not isinstance(format, int) or format < FORMAT
        raise RefusedError(
            f"{sender} has messages of format {str(format)[:20]} (fedpref {str(theirs)[:20]}), "
            f"this side has those of format {FORMAT} (fedpref {__version__}): "
            f"{sender if is_older else 'this side'} is older. Install one version on both sides."
        )


def finite(tree: Tree) -> Tree:
    """Return the tree; raises RefusedError where it holds a number that is not finite."""
    for name, tensor in tree.items():
        if (
            tensor.is_floating_point()
            and not bool(tensor.sum().isfinite())
            and not bool(torch.isfinite(tensor).all())
        ):
            raise RefusedError(f"the tensor {name!r} holds a number that is not finite")
    return tree


Shape = tuple[tuple[str, str, tuple[int, ...]], ...]


def shape(tree: Tree) -> Shape:
    """Return names, types and sizes, by which trees are compared without their numbers."""
    return tuple(
        (name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in sorted(tree.items())
    )
