"""Which examples make a batch: every one once in an epoch, or drawn anew each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

import torch
from jaxtyping import Int
from torch import Tensor

from fedpref.numerics import seeds

POOL = (
    4  # a batch is drawn from this many times its size, so that its examples are of similar length
)


@dataclass(frozen=True)
class BatchSize:
    """The size of a training batch: examples, or tokens in all where `max_tokens` is given.

    There is one example at least.

    Attributes:
        examples: How many.
        max_tokens: Fill batches up to so many tokens in place of a number of examples.
        epochs: Where the client is in its data; None draws each batch by itself.
    """

    examples: int
    max_tokens: int | None = None
    epochs: Epochs | None = field(default=None, compare=False)


@dataclass
class Epochs:
    """Where a client is in its data: each example comes once in an epoch.

    The order is drawn for each client and epoch. Several kinds of examples, such as those of
    several objectives, have epochs of their own.

    Attributes:
        seed: Of the orders.
        places: Of each kind of examples, the epoch and how many of its batches have been drawn.
    """

    seed: int
    places: list[tuple[int, int]] = field(default_factory=list)
    _plans: dict[tuple[int, int], list[list[int]]] = field(default_factory=dict, repr=False)

    @staticmethod
    def begin(rng: torch.Generator) -> Epochs:
        """Return the beginning of the first epoch, in an order that is drawn."""
        return Epochs(int(torch.randint(2**62, (), generator=rng)))

    @staticmethod
    def restore(state: Int[Tensor, " n"]) -> Epochs:
        """Return the place that `state` has written."""
        seed, *numbers = state.tolist()
        return Epochs(seed, list(zip(numbers[::2], numbers[1::2], strict=True)))

    @property
    def state(self) -> Int[Tensor, " n"]:
        """The place as whole numbers, of which `restore` makes it again."""
        return torch.tensor([self.seed, *(number for place in self.places for number in place)])

    def next(self, lengths: Sequence[int], size: BatchSize, kind: int = 0) -> list[int]:
        """Return the indices of the next batch, and step on.

        Args:
            lengths: Tokens of each example.
            size: How large the batch is. It must stay the same, as must the examples.
            kind: Which kind of examples.
        """
        self.places += [(0, 0)] * (kind + 1 - len(self.places))
        epoch, drawn = self.places[kind]
        plan = self._plan(kind, epoch, lengths, size)
        if drawn >= len(plan):
            epoch, drawn = epoch + 1, 0
            plan = self._plan(kind, epoch, lengths, size)
        self.places[kind] = epoch, drawn + 1
        return plan[drawn]

    def _plan(
        self, kind: int, epoch: int, lengths: Sequence[int], size: BatchSize
    ) -> list[list[int]]:
        if (kind, epoch) not in self._plans:
            rng = seeds.generator(self.seed, "epoch", round=epoch, call=kind)
            self._plans[kind, epoch] = planned(lengths, size, rng)
        return self._plans[kind, epoch]


def planned(lengths: Sequence[int], size: BatchSize, rng: torch.Generator) -> list[list[int]]:
    """Return the batches of an epoch: all indices, each once.

    Examples are shuffled, cut into pools, and each pool into batches of similar length, which come
    in an order that is drawn.
    """
    order: list[int] = torch.randperm(len(lengths), generator=rng).tolist()
    batches: list[list[int]] = []
    while order:
        pool = order[: _pool(order, lengths, size)]
        order = order[len(pool) :]
        some = _cut(pool, lengths, size)
        batches += [some[i] for i in torch.randperm(len(some), generator=rng).tolist()]
    return batches


def draw_indices(
    lengths: Sequence[int], size: BatchSize, rng: torch.Generator, kind: int = 0
) -> list[int]:
    """Return indices of a batch.

    Without epochs, a random pool is cut by length into batches, of which one is drawn with a
    probability proportional to its number of examples.

    Args:
        lengths: Tokens of each example.
        size: How large the batch is, and where in its epochs the client is.
        rng: Random numbers, where there are no epochs.
        kind: Which kind of examples; each has epochs of its own.
    """
    if size.epochs is not None:
        return size.epochs.next(lengths, size, kind)
    # not the whole order as a list: there may be many examples, and this is done in every step
    most = POOL * (size.max_tokens or size.examples)
    order: list[int] = torch.randperm(len(lengths), generator=rng)[:most].tolist()
    pool = order[: _pool(order, lengths, size)]
    if size.max_tokens is None:
        # no smaller batch at the end: whoever is in it would have more weight
        count = min(size.examples, len(lengths))
        pool = pool[: count * (len(pool) // count)]
    batches = _cut(pool, lengths, size)
    wanted = sorted(pool, key=lambda i: (lengths[i], i))[
        int(torch.randint(len(pool), (), generator=rng))
    ]
    return next(batch for batch in batches if wanted in batch)


def _pool(order: Sequence[int], lengths: Sequence[int], size: BatchSize) -> int:
    """Return how many of the next examples make a pool."""
    if size.max_tokens is None:
        return min(len(order), POOL * size.examples)
    most = POOL * size.max_tokens
    # each example has a token at least, so that no more can fit
    fitting = takewhile(most.__ge__, accumulate(lengths[i] for i in order[:most]))
    return max(1, sum(1 for _ in fitting))


def _cut(pool: Sequence[int], lengths: Sequence[int], size: BatchSize) -> list[list[int]]:
    """Return a pool as batches of similar length."""
    ranked = sorted(pool, key=lambda i: (lengths[i], i))
    if size.max_tokens is None:
        return [
            ranked[first : first + size.examples] for first in range(0, len(ranked), size.examples)
        ]
    batches: list[list[int]] = [[]]
    tokens = 0
    for i in ranked:
        if batches[-1] and tokens + lengths[i] > size.max_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches
