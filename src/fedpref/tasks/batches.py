"""Which examples make a batch: every one once in an epoch, or drawn anew each time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fedpref.data.placed import label
from fedpref.errors import UserError
from fedpref.numerics import seeds
from fedpref.privacy import Column

# a batch is drawn from this many times its size, so that its examples are of similar length
POOL = 4
SIMILAR = 0.25  # the relative difference up to which lengths are alike

GRAIN = 16  # sizes between one power of two and the next that private batches are told apart by


def chance_of(examples: int, batch: int) -> float:
    """Return the chance of each example to be in a private batch.

    Of sizes that are nearly the same it is the same, so that few kinds of noise are computed.

    Args:
        examples: How many there are.
        batch: How many a batch has, expected.
    """
    grain = 2 ** max(0, examples.bit_length() - GRAIN.bit_length())
    return min(1.0, batch / (examples // grain * grain)) if examples else 1.0


def numbered(values: Sequence[Hashable]) -> list[int]:
    """Return a number from 0 for each value, the same for those that are alike."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def numbered_by(unit: Column, columns: Sequence[Mapping[str, Any]], client: str) -> list[int]:
    """Return a number for each row, the same for those that agree in a column.

    Args:
        unit: Which column.
        columns: Of each row.
        client: Its name, for messages.

    Raises:
        UserError: Rows have no such column, or nothing in it, or no name or number.
    """
    if missing := sum(unit.column not in row for row in columns):
        raise UserError(
            f"privacy.unit.column: {missing} training rows of client {client!r} have no column "
            f"{unit.column!r}."
        )
    try:
        labels = [label(row[unit.column]) for row in columns]
    except ValueError as error:
        raise UserError(
            f"privacy.unit.column: {unit.column!r} of client {client!r}: {error}."
        ) from error
    if empty := labels.count(None):
        raise UserError(
            f"privacy.unit.column: {empty} training rows of client {client!r} have nothing in "
            f"{unit.column!r}, so that whose they are is not known. Fill it in, or leave them out."
        )
    return numbered(labels)


@dataclass(frozen=True)
class BatchSize:
    """The size of a training batch: examples, or tokens in all where `max_tokens` is given.

    There is one example at least.

    Attributes:
        examples: How many at most.
        max_tokens: Fill batches up to so many tokens in place of a number of examples.
        epochs: Where the client is in its data; None draws each batch by itself.
        is_by_prompt: Examples of one prompt come together, in place of those of similar length.
        seen: Which examples have been drawn, by their kind and number.
        kept: What the task keeps of the client from batch to batch and from round to round, by
            name; draws change it.
    """

    examples: int
    max_tokens: int | None = None
    epochs: Epochs | None = field(default=None, compare=False)
    is_by_prompt: bool = False
    seen: set[tuple[int, int]] = field(default_factory=set, compare=False)
    kept: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def note(self, indices: Iterable[int], kind: int = 0) -> None:
        """Keep in mind which examples were drawn."""
        self.seen.update((kind, index) for index in indices)


@dataclass(frozen=True)
class Examples:
    """What is known of examples when batches of them are drawn.

    Attributes:
        lengths: Tokens of each.
        prompts: Which prompt each is about, by number.
    """

    lengths: Sequence[int]
    prompts: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.lengths)


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

    def next(self, examples: Examples, size: BatchSize, kind: int = 0) -> tuple[list[int], float]:
        """Return the next batch as `draw_indices` does, and step on.

        Args:
            examples: The examples. They must stay the same, as must the size.
            size: How large the batch is.
            kind: Which kind of examples.
        """
        self.places += [(0, 0)] * (kind + 1 - len(self.places))
        epoch, drawn = self.places[kind]
        plan = self._plan(kind, epoch, examples, size)
        if drawn >= len(plan):
            epoch, drawn = epoch + 1, 0
            plan = self._plan(kind, epoch, examples, size)
        self.places[kind] = epoch, drawn + 1
        return plan[drawn], len(plan[drawn]) * len(plan) / len(examples)

    def _plan(self, kind: int, epoch: int, examples: Examples, size: BatchSize) -> list[list[int]]:
        if (kind, epoch) not in self._plans:
            rng = seeds.generator(self.seed, "epoch", round=epoch, call=kind)
            self._plans[kind, epoch] = planned(examples, size, rng)
        return self._plans[kind, epoch]


def planned(examples: Examples, size: BatchSize, rng: torch.Generator) -> list[list[int]]:
    """Return the batches of an epoch: all indices, each once.

    Examples are shuffled and cut into pools, and each pool into batches of similar length; or
    prompts are shuffled, and their examples cut into batches as they come. Batches of a number of
    examples differ by one at most.
    """
    order: list[int] = torch.randperm(len(examples), generator=rng).tolist()
    # close lengths in another order each time, or a small client's batches would stay the same
    jitter = 1 + SIMILAR * (2 * torch.rand(len(examples), generator=rng, dtype=torch.double) - 1)
    blurred = [n * by for n, by in zip(examples.lengths, jitter.tolist(), strict=True)]
    if size.is_by_prompt:
        first: dict[int, int] = {}
        for place, i in enumerate(order):
            first.setdefault(examples.prompts[i], place)
        order.sort(key=lambda i: first[examples.prompts[i]])
    plan: list[list[int]] = []
    if size.max_tokens is not None:
        for pool in _filled(order, examples.lengths, POOL * size.max_tokens):
            if not size.is_by_prompt:
                pool.sort(key=blurred.__getitem__)
            some = list(_filled(pool, examples.lengths, size.max_tokens))
            plan += [some[i] for i in _shuffled(len(some), rng)]
        return plan
    count = -(-len(order) // size.examples)
    sizes = [len(order) // count + (i < len(order) % count) for i in _shuffled(count, rng)]
    ends = [0, *accumulate(sizes)]
    for low in range(0, count, POOL):
        high = min(low + POOL, count)
        pool = order[ends[low] : ends[high]]
        if not size.is_by_prompt:
            pool.sort(key=blurred.__getitem__)
        bounds = [end - ends[low] for end in ends[low : high + 1]]
        some = [pool[a:b] for a, b in pairwise(bounds)]
        plan += [some[i] for i in _shuffled(len(some), rng)]
    return plan


def draw_indices(
    examples: Examples, size: BatchSize, rng: torch.Generator, kind: int = 0
) -> tuple[list[int], float]:
    """Return indices of a batch, and the weight of its mean.

    By these weights, each example counts as much as any other over many batches, whatever is
    beside it. Without epochs, a random pool is cut by length into batches, of which one is drawn
    with a probability proportional to its number of examples; its weight is one.

    Args:
        examples: What there is.
        size: How large the batch is, and where in its epochs the client is.
        rng: Random numbers, where there are no epochs.
        kind: Which kind of examples; each has epochs of its own.
    """
    if size.epochs is not None:
        indices, weight = size.epochs.next(examples, size, kind)
    else:
        indices, weight = _drawn_anew(examples, size, rng), 1.0
    size.note(indices, kind)
    return indices, weight


def _drawn_anew(examples: Examples, size: BatchSize, rng: torch.Generator) -> list[int]:
    """Return a batch that does not depend on those before it; see `draw_indices`."""
    lengths = examples.lengths
    # not the whole order as a list: there may be many examples, and this is done in every step
    most = POOL * (size.max_tokens or size.examples)
    order: list[int] = torch.randperm(len(lengths), generator=rng)[:most].tolist()
    # no smaller batch at the end: whoever is in it would have more weight
    count = min(size.examples, len(lengths))
    pool = (
        order[: count * (len(order) // count)]
        if size.max_tokens is None
        else next(_filled(order, lengths, POOL * size.max_tokens))
    )
    pool.sort(key=lambda i: (lengths[i], i))
    if size.max_tokens is not None:
        batches = list(_filled(pool, lengths, size.max_tokens))
    else:
        batches = [pool[first : first + count] for first in range(0, len(pool), count)]
    wanted = pool[int(torch.randint(len(pool), (), generator=rng))]
    return next(batch for batch in batches if wanted in batch)


def _shuffled(count: int, rng: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(count, generator=rng).tolist()
    return order


def _filled(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield indices in runs of so many tokens at most, or of a single one."""
    run: list[int] = []
    tokens = 0
    for i in order:
        if run and tokens + lengths[i] > most:
            yield run
            run, tokens = [], 0
        run.append(i)
        tokens += lengths[i]
    if run:
        yield run
