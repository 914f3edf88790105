"""Given answers as tokens: an example, a client's shard of them, a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fedpref.tasks.batches import Examples
from fedpref.tasks.language import Tokens
from fedpref.types import Text


@dataclass(frozen=True)
class Piece:
    """What a unit has of one objective, and where its random numbers are found."""

    unit: int
    objective: int
    examples: list[Example]
    address: str


@dataclass(frozen=True)
class Example:
    """A prompt's tokens and two answers' tokens."""

    prompt: Tokens
    answers: tuple[Tokens, Tokens]
    desirable: bool = True
    """What was said of the first answer, where answers are not compared."""
    objective: int = 0
    """Of the task's, where there are several."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What else stands in its row."""
    text: Text = field(default="", compare=False, repr=False)
    """A prompt's messages, where somebody judges answers to it; otherwise its tokens say it."""

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and both answers."""
        return len(self.prompt) + sum(map(len, self.answers))

    @cached_property
    def keys(self) -> tuple[bytes, bytes]:
        """What tells each answer after its prompt from all others."""
        first, second = (
            # not the tokens' hash: whether one is scored is part of it
            blake2b(f"{self.prompt} {answer}".encode(), digest_size=16).digest()
            for answer in self.answers
        )
        return first, second


@dataclass(frozen=True)
class OfflineShard:
    """One client's examples."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    truncated: int = 0
    """Rows of which something was cut off."""
    validation: tuple[Example, ...] = ()

    def __len__(self) -> int:
        return len(self.train)

    def validating(self) -> OfflineShard:
        return replace(self, test=self.validation)

    @cached_property  # asked for in every draw
    def by_objective(self) -> dict[int, tuple[tuple[Example, ...], Examples]]:
        """Training examples of each objective, and what is known of each when batches are drawn."""
        objectives = dict.fromkeys(sorted({example.objective for example in self.train}))
        parts = {m: tuple(e for e in self.train if e.objective == m) for m in objectives}
        numbers: dict[Tokens, int] = {}
        return {
            m: (
                some,
                Examples(
                    tuple(e.tokens for e in some),
                    tuple(numbers.setdefault(e.prompt, len(numbers)) for e in some),
                ),
            )
            for m, some in parts.items()
        }


@dataclass(frozen=True)
class Batch:
    """B examples, and their scores under the reference (zeros where the loss needs none)."""

    examples: Sequence[Example]
    reference: Float[Tensor, "B 2"]
    weights: tuple[float, ...] = ()
    """Of each objective's mean in a sum over batches; one where there are none."""
