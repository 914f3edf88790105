"""The packed form: every prompt with its answers in one long row, encoded once.

The row is [prompt, answer, answer, ..., padding, prompt, ...]. Positions of each answer go on from
its prompt's; an answer sees its prompt and itself. Models of transformers take this form through
the attention interface, without a line of theirs rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

# on a CPU rows are as wide as the next multiple: a new shape costs its matrix kernels more than a
# few tokens
ROW = 128

Row = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt's tokens and its answers'


class Unscored(int):
    """A token of an answer that is read but not scored, such as a user's in between."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"~{int(self)}"


def scored_tokens(tokens: Sequence[int]) -> int:
    """Return how many of an answer's tokens are scored."""
    return sum(not isinstance(token, Unscored) for token in tokens)


@dataclass(frozen=True)
class Layout:
    """Tokens as a model takes them, and where the log-probabilities of answers are read off.

    There are A answers with n tokens in all.
    """

    ids: Int[Tensor, "R T"]
    positions: Int[Tensor, "R T"]
    scored: Int[Tensor, " n"]
    """Places in the flattened ids whose next token belongs to an answer."""
    targets: Int[Tensor, " n"]
    """That token."""
    last: Int[Tensor, " A"]
    """Place of each answer's last token."""
    counts: tuple[int, ...]
    """Scored tokens of each answer, in the order of the rows."""
    parts: tuple[tuple[range, range], ...] = ()
    """Of each prompt and each answer, in the order of the rows: the places of what comes before it,
    and its own."""

    @staticmethod
    def packed(rows: Sequence[Row], device: torch.device) -> Layout:
        """Return the layout of all prompts with their answers in one row."""
        # a GPU's kernels take any shape alike
        whole = 1 if device.type == "cuda" else ROW
        return _layout(rows, [_length(row) for row in rows], whole, device)

    @staticmethod
    def padded(rows: Sequence[Row], device: torch.device) -> Layout:
        """Return the layout of a row for each answer, its prompt before it, under causal masks."""
        alone: list[Row] = [(prompt, (answer,)) for prompt, answers in rows for answer in answers]
        widest = max(map(_length, alone))
        layout = _layout(alone, [widest] * len(alone), 1, device)
        return Layout(
            layout.ids.view(-1, widest),
            layout.positions.view(-1, widest),
            layout.scored,
            layout.targets,
            layout.last,
            layout.counts,
            layout.parts,
        )

    def per_answer(self, tokens: Float[Tensor, " n"]) -> Float[Tensor, " A"]:
        """Return the sum over each answer's tokens [A]."""
        if tokens.is_cuda:  # a launch for each answer takes longer than some for all
            return sums_at_once(tokens, self.counts)
        return torch.stack([part.sum() for part in tokens.split(self.counts)])


def _layout(rows: Sequence[Row], widths: Sequence[int], whole: int, device: torch.device) -> Layout:
    ids: list[int] = []
    positions: list[int] = []
    scored: list[int] = []
    last: list[int] = []
    parts: list[tuple[range, range]] = []
    for (prompt, answers), width in zip(rows, widths, strict=True):
        if not prompt or not all(map(scored_tokens, answers)):
            # its first token would be told from the neighbour's last
            raise ValueError("a prompt has no token, or an answer none that is scored")
        begin = len(ids)
        ids += prompt
        positions += range(len(prompt))
        opening = range(begin, len(ids))
        parts.append((opening[:0], opening))
        for answer in answers:
            # every answer's first token is predicted from the prompt's last, not from the answer
            # before it
            before = [begin + len(prompt) - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            scored += [
                place
                for place, token in zip(before, answer, strict=True)
                if not isinstance(token, Unscored)
            ]
            ids += answer
            # as if it followed the prompt alone
            positions += range(len(prompt), len(prompt) + len(answer))
            parts.append((opening, range(len(ids) - len(answer), len(ids))))
            last.append(len(ids) - 1)
        rest = begin + width - len(ids)
        ids += [0] * rest
        positions += [0] * rest
    # what fills up the row belongs to no sequence, so that attention leaves it out
    rest = -len(ids) % whole
    targets = [
        t
        for _, answers in rows
        for answer in answers
        for t in answer
        if not isinstance(t, Unscored)
    ]
    tensors = [
        on_device(np.array(values, np.int64), device)
        for values in (ids + [0] * rest, positions + [0] * rest, scored, targets, last)
    ]
    counts = tuple(scored_tokens(answer) for _, answers in rows for answer in answers)
    return Layout(
        tensors[0][None],
        tensors[1][None],
        tensors[2],
        tensors[3],
        tensors[4],
        counts,
        tuple(parts),
    )


def sums_at_once(tokens: Float[Tensor, " n"], counts: Sequence[int]) -> Float[Tensor, " A"]:
    """Return sums over so many tokens each [A], all in one."""
    owners = np.repeat(np.arange(len(counts)), counts)
    answers = torch.arange(len(counts), device=tokens.device)
    mine = answers[:, None] == on_device(owners, tokens.device)
    return torch.where(mine, tokens, tokens.new_zeros(())).sum(1)


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return a tensor with an array's content."""
    tensor = torch.from_numpy(array)
    # from other memory a copy would wait for all that a GPU was asked before
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _length(row: Row) -> int:
    return len(row[0]) + sum(map(len, row[1]))
