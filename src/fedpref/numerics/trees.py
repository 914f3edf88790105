"""Arithmetic on trees: flat, named tensors, the only currency between clients and coordinator."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

Tree = Mapping[str, Tensor]


def add(a: Tree, b: Tree) -> Tree:
    """A + b; the names must agree."""
    _same_names(a, b)
    return {name: a[name] + b[name] for name in a}


def subtract(a: Tree, b: Tree) -> Tree:
    """A - b; the names must agree."""
    _same_names(a, b)
    return {name: a[name] - b[name] for name in a}


def scale(tree: Tree, factor: float) -> Tree:
    """Factor * tree."""
    return {name: tensor * factor for name, tensor in tree.items()}


def to(tree: Tree, device: torch.device) -> Tree:
    """The tree on a device; tensors that are there already are not copied."""
    return {name: tensor.to(device) for name, tensor in tree.items()}


def select(tree: Tree, names: Iterable[str], after: str = "") -> Tree:
    """What of a tree goes by these names; with `after`, what has one of them behind the first such mark."""
    wanted = set(names)
    return {name: tensor for name, tensor in tree.items() if (name.split(after, 1)[-1] if after else name) in wanted}


def nest(trees: Mapping[Any, Tree]) -> Tree:
    """Several trees as one, in which KEY/NAME is the tensor NAME of the tree under KEY."""
    return {f"{key}/{name}": tensor for key, tree in trees.items() for name, tensor in tree.items()}


def part(tree: Tree, key: Any) -> Tree:
    """The tree that was nested under this key; empty if there is none."""
    start = f"{key}/"
    return {name.removeprefix(start): tensor for name, tensor in tree.items() if name.startswith(start)}


def merge(*trees: Tree) -> Tree:
    """All tensors in one tree; where a name is in several, the last one's."""
    return {name: tensor for tree in trees for name, tensor in tree.items()}


def total(trees: Iterable[Tree]) -> Tree:
    """The sum, added from left to right: floating-point sums depend on their order, so the caller's order is kept."""
    return reduce(add, trees)


def norm(tree: Tree) -> float:
    """The Euclidean norm over all entries, whatever the order of the names."""
    return torch.stack([tree[name].double().square().sum() for name in sorted(tree)]).sum().sqrt().item() if tree else 0.0


def size(tree: Tree) -> int:
    """Bytes of all tensors together, without names."""
    return sum(tensor.nbytes for tensor in tree.values())


def save(tree: Tree, path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.torch.save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tree.items()}, beside)
    beside.replace(path)


def load(path: Path) -> Tree:
    """Read what `save` wrote."""
    return dict(safetensors.torch.load_file(path))


def _same_names(a: Tree, b: Tree) -> None:
    if a.keys() != b.keys():
        raise ValueError(f"trees differ in names: {sorted(a.keys() ^ b.keys())[:4]}")
