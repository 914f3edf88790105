"""Compression of messages: the largest entries alone, few bits an entry, or thin factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedpref.channel.chain import Sender, Stage
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.types import Count, Portion

MOST = 2**28  # numbers that a sparse message may stand for: 1 GB
DIMENSIONS = 8  # of a tensor
VALUES, PLACES, SHAPE, LEVELS, SCALE = "values/", "places/", "shape/", "levels/", "scale/"
LEFT, RIGHT, WHOLE = "left/", "right/", "whole/"
CUT = 16  # bits of a float32 behind those of a bfloat16


@dataclass(frozen=True)
class TopK:
    """The entries of largest magnitude of each tensor, with their places."""

    name: Literal["top-k"] = "top-k"
    fraction: Portion = 0.1
    """The share of entries that is sent."""
    contracts: ClassVar[bool] = True

    def stage(self) -> Stage:
        """Return the stage of a channel."""
        return Stage(self.name, self._encode, self._decode)

    def _encode(self, tree: Tree, sender: Sender) -> Tree:
        message: dict[str, Tensor] = {}
        for name, tensor in tree.items():
            places = trees.largest(tensor, self.fraction)
            message |= {
                VALUES + name: tensor.flatten()[places],
                PLACES + name: places.int(),
                SHAPE + name: _shape(tensor),
            }
        return message

    def _decode(self, message: Tree, count: int) -> Tree:
        names = [key.removeprefix(VALUES) for key in message if key.startswith(VALUES)]
        if message.keys() != {part + name for name in names for part in (VALUES, PLACES, SHAPE)}:
            raise ValueError("a tensor has not all of its values, places and shape")
        # few entries stand for many, which are made before anything else is known of them
        if sum(_size(message[SHAPE + name]) for name in names) > MOST:
            raise ValueError(f"it stands for more than {MOST} numbers")
        for name in names:
            self._check(*(message[part + name] for part in (VALUES, PLACES, SHAPE)))
        tree = {}
        for name in names:
            values, shape = message[VALUES + name], message[SHAPE + name].tolist()
            dense = values.new_zeros(math.prod(shape))
            tree[name] = dense.index_put_((message[PLACES + name].long(),), values).view(shape)
        return tree

    def _check(self, values: Tensor, places: Tensor, shape: Tensor) -> None:
        """Raise ValueError where a message's parts do not fit one another: it may be hostile."""
        size = _size(shape)
        if (
            values.shape != (math.ceil(self.fraction * size),)
            or places.shape != values.shape
            or places.dtype != torch.int32
            or values.dtype != torch.float32
            or (len(places) and (int(places[0]) < 0 or int(places[-1]) >= size))
            or bool((places[1:] <= places[:-1]).any())
        ):
            raise ValueError("values, places and shape of a tensor do not fit one another")


@dataclass(frozen=True)
class Quantize:
    """Each entry as one of 2^bits - 1 levels between plus and minus the tensor's largest magnitude.

    Entries are rounded at random, so that the mean is right: the form of QSGD (Alistarh et al.
    2017) with the largest magnitude as scale.
    """

    name: Literal["quantize"] = "quantize"
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    """Bits of an entry; below eight, entries share bytes."""

    @property
    def contracts(self) -> bool:
        """Whether what arrives of normal entries is nearer to what was sent than nothing is.

        With two bits their random rounding has twice their own squared norm. Where one entry is far
        larger than all others, more bits are needed for it.
        """
        return self.bits > 2

    def stage(self) -> Stage:
        """Return the stage of a channel."""
        return Stage(self.name, self._encode, self._decode)

    def _encode(self, tree: Tree, sender: Sender) -> Tree:
        message: dict[str, Tensor] = {}
        highest = 2 ** (self.bits - 1) - 1
        for name, tensor in sorted(tree.items()):
            scale = tensor.abs().max() if tensor.numel() else tensor.new_zeros(())
            unit = tensor / scale.clamp(min=torch.finfo(tensor.dtype).tiny) * highest
            levels = (unit + torch.rand(unit.shape, generator=sender.rng)).floor().clamp(
                -highest, highest
            ) + highest
            message |= {
                LEVELS + name: _packed(levels.flatten().byte(), self.bits),
                SCALE + name: scale[None],
            }
            message[SHAPE + name] = _shape(tensor)
        return message

    def _decode(self, message: Tree, count: int) -> Tree:
        tree = {}
        highest = 2 ** (self.bits - 1) - 1
        names = [key.removeprefix(SCALE) for key in message if key.startswith(SCALE)]
        if message.keys() != {part + name for name in names for part in (LEVELS, SCALE, SHAPE)}:
            raise ValueError("a tensor has not all of its levels, scale and shape")
        for name in names:
            self._check(*(message[part + name] for part in (LEVELS, SCALE, SHAPE)))
            shape = message[SHAPE + name].tolist()
            levels = (
                _unpacked(message[LEVELS + name], self.bits, math.prod(shape)).float() - highest
            )
            tree[name] = (levels * (message[SCALE + name] / highest)).view(shape)
        return tree

    def _check(self, levels: Tensor, scale: Tensor, shape: Tensor) -> None:
        """Raise ValueError where a message's parts do not fit one another: it may be hostile."""
        wanted = -(-_size(shape) * self.bits // 8)
        if (
            levels.dtype != torch.uint8
            or levels.shape != (wanted,)
            or scale.dtype != torch.float32
            or scale.shape != (1,)
        ):
            raise ValueError("levels, scale and shape of a tensor do not fit one another")


@dataclass(frozen=True)
class Bfloat16:
    """Each entry as a bfloat16, rounded at random, so that the mean is right."""

    name: Literal["bfloat16"] = "bfloat16"
    contracts: ClassVar[bool] = True

    def stage(self) -> Stage:
        """Return the stage of a channel."""
        return Stage(self.name, self._encode, self._decode)

    def _encode(self, tree: Tree, sender: Sender) -> Tree:
        message = {}
        for name, tensor in sorted(tree.items()):
            # a bfloat16 is the upper half of a float32: what is added to the lower half carries
            bits = tensor.float().view(torch.int32)
            random = torch.randint(2**CUT, bits.shape, generator=sender.rng, dtype=torch.int32)
            message[name] = ((bits + random) >> CUT << CUT).view(torch.float32).bfloat16()
        return message

    def _decode(self, message: Tree, count: int) -> Tree:
        if any(tensor.dtype != torch.bfloat16 for tensor in message.values()):
            raise ValueError("a tensor is not of bfloat16")
        return {name: tensor.float() for name, tensor in message.items()}


@dataclass(frozen=True)
class LowRank:
    """Each matrix as the product of two thin ones, by its largest singular values."""

    name: Literal["low-rank"] = "low-rank"
    rank: Count = 2
    """How many singular values; a tensor whose factors would be more numbers is sent whole."""
    contracts: ClassVar[bool] = True

    def stage(self) -> Stage:
        """Return the stage of a channel."""
        return Stage(self.name, self._encode, self._decode)

    def _encode(self, tree: Tree, sender: Sender) -> Tree:
        message: dict[str, Tensor] = {}
        for name, tensor in tree.items():
            if trees.is_thin(tensor.shape, self.rank) and bool(tensor.isfinite().all()):
                message[LEFT + name], message[RIGHT + name] = trees.factors(tensor, self.rank)
                message[SHAPE + name] = _shape(tensor)
            else:
                message[WHOLE + name] = tensor
        return message

    def _decode(self, message: Tree, count: int) -> Tree:
        names = [key.removeprefix(LEFT) for key in message if key.startswith(LEFT)]
        whole = [key.removeprefix(WHOLE) for key in message if key.startswith(WHOLE)]
        parts = {part + name for name in names for part in (LEFT, RIGHT, SHAPE)}
        if message.keys() != parts | {WHOLE + name for name in whole} or {*names} & {*whole}:
            raise ValueError("a tensor has not all of its factors and shape")
        # thin factors stand for many entries, which are made before anything else is known of them
        if sum(_size(message[SHAPE + name]) for name in names) > MOST:
            raise ValueError(f"it stands for more than {MOST} numbers")
        tree = {name: message[WHOLE + name] for name in whole}
        for name in names:
            left, right = message[LEFT + name], message[RIGHT + name]
            shape = message[SHAPE + name].tolist()
            is_thin = trees.is_thin(shape, self.rank)
            if (
                not is_thin
                or left.shape != (shape[0], self.rank)
                or right.shape != (self.rank, math.prod(shape[1:]))
                or {left.dtype, right.dtype} != {torch.float32}
            ):
                raise ValueError("factors and shape of a tensor do not fit one another")
            tree[name] = (left @ right).view(shape)
        return tree


Compression = Annotated[TopK | Quantize | Bfloat16 | LowRank, Field(discriminator="name")]


def alike(message: Tree, other: Tree) -> bool:
    """Return whether two messages, compressed or not, stand for trees of equal names and shapes."""
    return message.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and (not name.startswith(SHAPE) or torch.equal(tensor, other[name]))
        for name, tensor in message.items()
    )


def _shape(tensor: Tensor) -> Tensor:
    """Return a tensor's shape as it goes into a message; of a single number too."""
    return torch.tensor(tensor.shape, dtype=torch.int64)


def _size(shape: Tensor) -> int:
    """Return how many entries a tensor of a shape has that came with a message.

    Raises:
        ValueError: It is no shape. Products of many numbers, or of large ones, are not formed.
    """
    is_one = shape.dim() == 1 and shape.dtype == torch.int64 and len(shape) <= DIMENSIONS
    sizes = shape.tolist() if is_one else [-1]
    if not all(0 <= size <= MOST for size in sizes):
        raise ValueError("a tensor's shape is none")
    return math.prod(sizes)


def _packed(levels: Tensor, bits: int) -> Tensor:
    """Return levels of `bits` bits each, the highest bit first, one after the other in bytes."""
    if bits == 8:
        return levels
    single = (levels[:, None] >> torch.arange(bits - 1, -1, -1, dtype=torch.uint8)) & 1
    single = torch.nn.functional.pad(single.flatten(), (0, -single.numel() % 8)).view(-1, 8)
    return (single << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1).to(torch.uint8)


def _unpacked(content: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` levels that `_packed` has packed."""
    if bits == 8:
        return content
    single = (
        ((content[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1)
        .flatten()[: bits * count]
        .view(count, bits)
    )
    return (single.int() << torch.arange(bits - 1, -1, -1)).sum(1)
