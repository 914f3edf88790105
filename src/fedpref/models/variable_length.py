"""Attention of all sequences of a packed row in one call of a GPU's kernel of variable length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fedpref.models.packed import Layout, on_device

Parts = Sequence[tuple[range, range]]


@dataclass(frozen=True)
class Size:
    """How large a packed row is, for a kernel: what `Places` of other rows must share with it."""

    tokens: int
    keys: int
    """Keys that all sequences meet; an answer's are its prompt's and its own."""
    sequences: int
    longest: tuple[int, int]
    """Tokens, and keys, that a sequence has at most."""
    answers: int
    """That a prompt has at most."""

    @staticmethod
    def of(parts: Parts, tokens: int) -> Size:
        """Return the size of a row as it is.

        Args:
            parts: Of its layout; prompts without tokens are none.
            tokens: That are computed; those beyond the parts fill up the row.
        """
        mine = [(len(before), len(own)) for before, own in [*parts, *_rest(parts, tokens, tokens)]]
        answers = Counter(before.start for before, _ in parts if before)
        return Size(
            tokens,
            sum(before + own for before, own in mine),
            len(mine),
            (max(own for _, own in mine), max(before + own for before, own in mine)),
            max(answers.values(), default=0),
        )

    def rounded(self, parts: Parts) -> Size:
        """Return one of few sizes into which a row fits, with a token or more to fill it up."""
        # eight sizes from a power of two to the next: one in sixteen tokens fills up, on average
        step = max(64, 2 ** (self.tokens.bit_length() - 4))
        tokens = (self.tokens // step + 1) * step
        longest = (_power(self.longest[0]), _power(self.longest[1]))
        rest = _rest(parts, tokens, longest[0])
        return Size(
            tokens,
            _power(self.keys + tokens - self.tokens),
            -(-(self.sequences + len(rest)) // 16) * 16,
            longest,
            self.answers,
        )


def _power(number: int) -> int:
    """Return the power of two that is not below a number; 64 at least."""
    return max(64, 1 << (number - 1).bit_length())


def _rest(parts: Parts, tokens: int, longest: int) -> list[tuple[range, range]]:
    """Return sequences of what fills up a row, so that nothing there is left without a number."""
    end = max((own.stop for _, own in parts), default=0)
    return [
        (range(0), range(first, min(first + longest, tokens)))
        for first in range(end, tokens, longest)
    ]


@dataclass(frozen=True)
class Places:
    """Where a kernel finds a row's sequences, on a device."""

    size: Size
    seen: Int[Tensor, " K"]
    """The place of each key in the row."""
    own: Int[Tensor, " T"]
    """The key that is each place's own."""
    again: Int[Tensor, "J T"]
    """The key that is a prompt's place, for its j-th answer."""
    is_again: Bool[Tensor, "J T 1 1"]
    """Whether there is one."""
    starts: tuple[Int[Tensor, " s"], Int[Tensor, " s"]]
    """Where each sequence's tokens begin, and its keys, and where the last end."""

    @staticmethod
    def of(parts: Parts, size: Size, device: torch.device) -> Places:
        """Return the places of a row's parts, in a size into which they fit.

        Args:
            parts: Of its layout, in the order of their places.
            size: Of the row, or a larger one.
            device: Where tensors are.
        """
        own, seen = np.zeros(size.tokens, np.int64), np.zeros(size.keys, np.int64)
        again = np.zeros((size.answers, size.tokens), np.int64)
        is_again = np.zeros((size.answers, size.tokens), bool)
        starts = np.zeros((2, size.sequences + 1), np.int32)
        met: Counter[int] = Counter()
        keys = 0
        sequences = [*parts, *_rest(parts, size.tokens, size.longest[0])]
        for i, (before, mine) in enumerate(sequences):
            end = keys + len(before)
            seen[keys:end] = np.arange(before.start, before.stop)
            seen[end : end + len(mine)] = np.arange(mine.start, mine.stop)
            own[mine.start : mine.stop] = np.arange(end, end + len(mine))
            if before:
                answer = met[before.start]
                met[before.start] += 1
                again[answer, before.start : before.stop] = np.arange(keys, end)
                is_again[answer, before.start : before.stop] = True
            keys = end + len(mine)
            starts[:, i + 1 :] = [[mine.stop], [keys]]
        arrays: list[NDArray[Any]] = [seen, own, again, is_again[:, :, None, None], *starts]
        tensors = [on_device(array, device) for array in arrays]
        return Places(
            size, tensors[0], tensors[1], tensors[2], tensors[3], (tensors[4], tensors[5])
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of it that differs between rows of one size."""
        return [self.seen, self.own, self.again, self.is_again, *self.starts]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend: every token of a sequence meets the sequence's keys up to its own."""
        from torch.nn.attention.varlen import varlen_attn

        settings: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
        if _knows_groups(varlen_attn):
            settings["enable_gqa"] = query.shape[1] > key.shape[1]
        queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        gather: Any = _Gather.apply
        mixed: Any = varlen_attn(
            queries,
            gather(keys, self),
            gather(values, self),
            *self.starts,
            *self.size.longest,
            **settings,
        )
        whole: Tensor = mixed[None]
        return whole


def by_variable_length(layout: Layout) -> Any:
    """Return an attention that takes all sequences in one call of a GPU's kernel.

    The queries of each part meet the keys of its prompt and its own.
    """
    size = Size.of(layout.parts, layout.ids.numel())
    return Places.of(layout.parts, size, layout.ids.device).attend


@cache
def _knows_groups(kernel: Any) -> bool:
    """Return whether a kernel asks to be told of heads that share a key; before PyTorch 2.12 it
    takes them as they come.
    """
    return "enable_gqa" in signature(kernel).parameters


class _Gather(torch.autograd.Function):
    """The keys that sequences meet; a prompt's gradient is summed in the order of its answers.

    Indexing's own gradient sorts all indices, and reads what a kernel has not written.
    """

    @staticmethod
    def forward(ctx: Any, rows: Float[Tensor, "T H D"], places: Places) -> Float[Tensor, "K H D"]:
        ctx.places = places
        return rows.index_select(0, places.seen)

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, "K H D"]) -> tuple[Tensor, None]:
        places: Places = ctx.places
        slope = upstream.index_select(0, places.own)
        zero = slope.new_zeros(())
        for again, is_again in zip(places.again, places.is_again, strict=True):
            slope = slope + torch.where(is_again, upstream.index_select(0, again), zero)
        return slope, None
