"""A chain of stages around an addition: encoded on clients, summed, decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch

from fedpref.numerics.trees import Tree


@dataclass(frozen=True)
class Sender:
    """Who encodes a message, in which round, and its random numbers."""

    client: int
    round: int
    rng: torch.Generator


@dataclass(frozen=True)
class Stage:
    """One step: clip, noise, quantize, mask. Between encode and decode there is only addition."""

    name: str
    encode: Callable[[Tree, Sender], Tree]
    """On the client."""
    decode: Callable[[Tree, int], Tree]
    """On the sum of so many clients."""
    needs: frozenset[str] = frozenset()
    """Properties that an earlier stage must give."""
    gives: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Chain:
    """Stages, applied left to right on a client and right to left on the sum.

    The empty chain is exact.

    Raises:
        ValueError: A stage needs what no earlier stage gives, as noise without a clip does.
    """

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        given: frozenset[str] = frozenset()
        for stage in self.stages:
            if missing := stage.needs - given:
                raise ValueError(
                    f"channel stage {stage.name!r} needs {sorted(missing)}, which no stage "
                    "before it gives"
                )
            given |= stage.gives

    def encode(self, tree: Tree, sender: Sender) -> Tree:
        """Return the message that a client sends for a tree."""
        return reduce(lambda message, stage: stage.encode(message, sender), self.stages, tree)

    def decode(self, total: Tree, count: int) -> Tree:
        """Return what a sum of messages stands for.

        Args:
            total: The sum.
            count: Number of clients whose messages were added.
        """
        return reduce(
            lambda message, stage: stage.decode(message, count), reversed(self.stages), total
        )
