"""Messages between a coordinator and sites: a JSON header and a safetensors body.

Whoever receives a message checks it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedpref import __version__
from fedpref.numerics.trees import Tree

Header = dict[str, Any]
NO_TENSORS: Tree = {}


FORMAT = 3  # of messages; 1 did not say so, 2 had no labels of values and no `consent`
MOST_HEADER = 32 * 10**6  # bytes of a header, which takes some ten times as much when it is read


class RefusedError(Exception):
    """A receiver will not take or do something; the reason goes back to the sender."""


def pack(header: Mapping[str, Any], tensors: Tree = NO_TENSORS) -> bytes:
    """Return a message of a header and tensors."""
    return framed(header, body(tensors))


def framed(header: Mapping[str, Any], body: bytes) -> bytes:
    """Return a message of tensors that are bytes already, as they are for several receivers."""
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "big") + head + body


def body(tensors: Tree) -> bytes:
    """Return tensors as they travel."""
    return safetensors.torch.save(_apart(tensors)) if tensors else b""


def _apart(tensors: Tree) -> dict[str, Tensor]:
    """Return the tensors, no two of which share memory, as clients' that begin alike do."""
    whole_tensors, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        address = whole.untyped_storage().data_ptr()
        whole_tensors[name] = whole.clone() if address in seen else whole
        seen.add(address)
    return whole_tensors


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
    try:
        start = 8 + int.from_bytes(message[:8], "big")
        if start > MOST_HEADER:
            raise RefusedError(f"a header of {start} bytes is above the limit of {MOST_HEADER}")
        header = json.loads(message[8:start])
        tensors = safetensors.torch.load(message[start:]) if len(message) > start else {}
    except (ValueError, RecursionError, SafetensorError) as error:
        raise RefusedError(f"not a fedpref message: {error}") from error
    if not isinstance(header, dict):
        raise RefusedError(f"not a fedpref message, its header is no mapping: {str(header)[:40]!r}")
    return header, tensors


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
