"""Arithmetic on trees: flat, named tensors, the only currency of a federation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from hashlib import blake2b
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedpref.errors import UserError
from fedpref.numerics import files

Tree = Mapping[str, Tensor]
BESIDE = "probe/"  # begins the names of figures that travel beside a value


class MismatchError(UserError, ValueError):
    """Two trees are not of the same names and shapes."""


def is_down(name: str) -> bool:
    """Return whether a factor of an adapter is A, [r, in], and not B, [out, r], by its name."""
    return "_A" in name.rsplit("lora", 1)[-1]


def add(a: Tree, b: Tree) -> Tree:
    """Return a + b, name by name; raises MismatchError where names or shapes differ."""
    _refuse_others(a, b)
    return {name: a[name] + b[name] for name in a}


def add_to(total: Tree, tree: Tree) -> Tree:
    """Return total + tree, which takes the place of total; see `add`."""
    _refuse_others(total, tree)
    return {name: total[name].add_(tree[name]) for name in total}


def subtract(a: Tree, b: Tree) -> Tree:
    """Return a - b, name by name; see `add`."""
    _refuse_others(a, b)
    return {name: a[name] - b[name] for name in a}


def scale(tree: Tree, factor: float) -> Tree:
    """Return the tree with every tensor multiplied by a number."""
    return {name: tensor * factor for name, tensor in tree.items()}


def to(tree: Tree, device: torch.device) -> Tree:
    """Return the tree on a device; tensors that are there already are not copied."""
    return {name: tensor.to(device) for name, tensor in tree.items()}


def select(tree: Tree, names: Iterable[str], after: str = "") -> Tree:
    """Return the tensors that go by some names.

    Args:
        tree: The tree.
        names: Wanted ones; those that are not there are passed over.
        after: With a mark, the part of a tensor's name behind the first such mark is what must
            match.
    """
    wanted = set(names)
    return {
        name: tensor
        for name, tensor in tree.items()
        if (name.split(after, 1)[-1] if after else name) in wanted
    }


def nest(trees: Mapping[Any, Tree]) -> Tree:
    """Return several trees as one, in which KEY/NAME is the tensor NAME of the tree under KEY."""
    return {f"{key}/{name}": tensor for key, tree in trees.items() for name, tensor in tree.items()}


def part(tree: Tree, key: Any) -> Tree:
    """Return the tree that was nested under a key; empty if there is none."""
    start = f"{key}/"
    return {
        name.removeprefix(start): tensor for name, tensor in tree.items() if name.startswith(start)
    }


def merge(*trees: Tree) -> Tree:
    """Return all tensors in one tree; where a name is in several, the last one's."""
    return {name: tensor for tree in trees for name, tensor in tree.items()}


def apart(*trees: Tree) -> Tree:
    """Return all tensors in one tree; raises ValueError where a name is in several.

    What is shared and what is private are taken apart by their names, so that one must not pass
    for the other.
    """
    whole = merge(*trees)
    if len(whole) < sum(map(len, trees)):
        twice = next(name for name in whole if sum(name in tree for tree in trees) > 1)
        raise ValueError(f"two trees have a tensor {twice!r}")
    return whole


def total(trees: Iterable[Tree]) -> Tree:
    """Return the sum of trees, added from left to right.

    Floating-point sums depend on their order, so the caller's order is kept.
    """
    return reduce(add, trees)


def is_finite(tree: Tree) -> bool:
    """Return whether all numbers of a tree are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tree.values())


def norm(tree: Tree) -> float:
    """Return the Euclidean norm over all entries, whatever the order of the names."""
    return (
        torch.stack([tree[name].double().square().sum() for name in sorted(tree)])
        .sum()
        .sqrt()
        .item()
        if tree
        else 0.0
    )


def largest(tensor: Tensor, fraction: float) -> Tensor:
    """Return the places of a share of a tensor's entries, those of the largest magnitude, in order.

    Args:
        tensor: Of any shape; places are those in its flat form.
        fraction: Of the entries; the number is rounded up.
    """
    flat = tensor.flatten().abs()
    return flat.topk(math.ceil(fraction * len(flat)), sorted=False).indices.sort().values


def sparse(tree: Tree, fraction: float) -> Tree:
    """Return a tree with zeros in place of all but each tensor's largest entries."""
    found = {}
    for name, tensor in tree.items():
        places = largest(tensor, fraction)
        kept = torch.zeros_like(tensor).flatten()
        kept[places] = tensor.flatten()[places]
        found[name] = kept.view(tensor.shape)
    return found


def is_thin(shape: Sequence[int], rank: int) -> bool:
    """Return whether a tensor's factors of a rank are fewer numbers than it has itself.

    Args:
        shape: The tensor's; as a matrix it has one row for each of the first dimension.
        rank: Of the product.
    """
    if len(shape) < 2:
        return False
    rows, columns = shape[0], math.prod(shape[1:])
    return rank * (rows + columns) < rows * columns


def factors(tensor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the two factors whose product is the nearest of a rank, (m, rank) and (rank, n).

    Args:
        tensor: A matrix, or more dimensions, of which those behind the first are one.
        rank: How many singular values are kept, the largest ones.
    """
    left, values, right = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
    # products depend on the order in memory, which a message does not keep
    return (left[:, :rank] * values[:rank]).contiguous(), right[:rank].clone().contiguous()


def low_rank(tree: Tree, rank: int) -> Tree:
    """Return a tree with each matrix as the nearest of a rank, where that is fewer numbers.

    One that is not finite stays as it is.
    """
    found = {}
    for name, tensor in tree.items():
        if is_thin(tensor.shape, rank) and bool(tensor.isfinite().all()):
            left, right = factors(tensor, rank)
            found[name] = (left @ right).view(tensor.shape)
        else:
            found[name] = tensor
    return found


def size(tree: Tree) -> int:
    """Return the bytes of all tensors together, without names."""
    return sum(tensor.nbytes for tensor in tree.values())


def with_figures(tree: Tree) -> tuple[Tree, Tree]:
    """Return a value, and the figures that travel beside it."""
    beside = {name: tensor for name, tensor in tree.items() if name.startswith(BESIDE)}
    return {name: tensor for name, tensor in tree.items() if name not in beside}, beside


def digest(tree: Tree) -> bytes:
    """Return a hash of a tree's names, shapes and bits."""
    found = blake2b(digest_size=16)
    for name, tensor in sorted(tree.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if len(flat):
            bits: Any = flat.view(torch.uint8).numpy()
            found.update(bits)
    return found.digest()


def save(tree: Tree, path: Path, *, lasting: bool = False) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        tree: What is written.
        path: The file.
        lasting: Wait until it is on the disk, and read it back.

    Raises:
        UserError: It cannot be written, as on a full disk, or is not read back as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tree.items()}
    try:
        safetensors.torch.save_file(whole, beside)
        if lasting:
            files.sync(beside)
            if digest(load(beside)) != digest(whole):
                raise OSError("what was read back is something else")
        beside.replace(path)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise files.unwritten(path, error) from error


def load(path: Path) -> Tree:
    """Return the tree that `save` has written; raises UserError where the file is damaged."""
    try:
        return dict(safetensors.torch.load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{path}: this file of tensors cannot be read: {reason}") from error


def _refuse_others(a: Tree, b: Tree) -> None:
    if a.keys() != b.keys():
        raise MismatchError(f"trees differ in names: {sorted(a.keys() ^ b.keys())[:4]}")
    # which would be spread over the larger one
    for name, tensor in a.items():
        if tensor.shape != b[name].shape:
            raise MismatchError(
                f"trees differ in {name!r}: {tuple(tensor.shape)} in one and "
                f"{tuple(b[name].shape)} in the other"
            )
