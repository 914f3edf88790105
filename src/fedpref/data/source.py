"""What a source of rows offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from fedpref.data.preferences import Row, Side
from fedpref.data.splits import SplitBy, held_out
from fedpref.data.unusable import Policy, Unusable
from fedpref.types import Fraction, WholeNumber


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """Where rows come from: a frozen dataclass of settings."""

    name: str
    unusable: Policy = "refuse"
    """What becomes of rows that state no preference, are empty, too long or nobody's: an error that
    counts them all, or they are left out and counted."""
    split_by: SplitBy = "question"
    """What a prompt is told by where sides are not given: its last question, in whatever spelling,
    or all of its turns."""

    split_seed: WholeNumber = 0
    """Salts the hash by which prompts are held out: another one gives another split."""
    validation_fraction: Fraction = 0.0
    """The share of training prompts that are set aside to choose settings by; see `evaluate_on`."""

    @property
    def test_fraction(self) -> float:
        """The share of prompts that are held out, where the source does not say which are."""
        return 0.2

    @property
    def location(self) -> str | None:
        """The file, folder or Hub id that is read; None where it is part of this package."""
        return None

    def with_paths(self, renamed: Callable[[str], str]) -> Self:
        """Return the same source with `renamed` applied to its location, if it has one."""
        return self

    def at_its_state(self) -> Self:
        """Return the source as it is now, of one that grows: what it reads stays the same."""
        return self

    def is_later_than(self, other: DataSource) -> bool:
        """Return whether another source is this one, as it was at some time."""
        return False

    def _side_of(self, text: str) -> Side:
        """Return the side on which a text stands that decides for its rows."""
        is_held_out = held_out(text, self.test_fraction, self.split_seed)
        return "test" if is_held_out else "train"

    @property
    def known_tastes(self) -> Mapping[str, Sequence[float]]:
        """Clients' tastes, each a vector, where they are known; empty elsewhere."""
        return {}

    @property
    def known_accuracies(self) -> Mapping[str, tuple[float, int]]:
        """How often the tastes agree with the held-out preferences that were drawn by them, and of
        how many preferences that is.

        By client, where rows were drawn by tastes that are known; empty elsewhere.
        """
        return {}

    @abstractmethod
    def read(self) -> Iterator[Row | Unusable]:
        """Yield the rows, and what is wrong with those that cannot be used.

        Raises:
            UserError: There is nothing there, or its form is another; it names the row.
        """


@dataclass(frozen=True, kw_only=True)
class PathSource(DataSource):
    """A source that reads a file, a folder or a dataset of the Hub."""

    path: str
    """The file, folder or Hub id."""

    @property
    def location(self) -> str:
        return self.path

    def with_paths(self, renamed: Callable[[str], str]) -> Self:
        return replace(self, path=renamed(self.path))
