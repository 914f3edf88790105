"""Which rows are held out: by what a prompt says, not by its bytes."""

from __future__ import annotations

import hmac
import re
import unicodedata
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpref.data.preferences import SIDES, Conversation, Row, Side, Text, key

SplitBy = Literal["question", "prompt"]
NONE = -1  # no side
REMEMBERED, SHORT = 2**12, 4000  # prompts, and their characters at most
_SPEAKER = re.compile(r"^[ \t]*(?:Human|Assistant):", re.MULTILINE)  # of hh-rlhf's plain form
# of no width: a mark of byte order, and spaces and joiners between words. Others, as soft hyphens
# and the joiners within words of Persian, stay: by these texts runs know what they have trained on
_INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u2060"))


def question(prompt: Text) -> str:
    """Return what a prompt asks: a text, or the last user's turn of a conversation.

    The same question in another spelling is the same: Unicode is composed (NFC), white space is
    one space, and a dialogue of "Human:" and "Assistant:" is a conversation.
    """
    if isinstance(prompt, str):
        plain = prompt.replace("\r\n", "\n")
        said = _last_human(plain)
        return spelled(plain if said is None else said)
    users = [message for message in prompt if message["role"] == "user"] or prompt
    return spelled(str(users[-1].get("content") or key(prompt)))


def _last_human(text: str) -> str | None:
    """Return the last turn of "Human:" in a dialogue up to an answer, or into it; else None."""
    end = text.rfind("\n\nAssistant:")
    begin = text.rfind("Human:", 0, max(end, 0))
    while begin >= 0 and text[:begin].rpartition("\n")[2].strip():  # not at a line's beginning
        begin = text.rfind("Human:", 0, begin)
    return None if begin < 0 else text[begin + len("Human:") : end]


def spelled(text: str) -> str:
    """Return a text with its Unicode composed and its white space made one space."""
    visible = text.translate(_INVISIBLE)
    return " ".join(unicodedata.normalize("NFC", visible).split())


def place(text: str, seed: int = 0, purpose: str = "") -> float:
    """Return where a text stands between 0 and 1, by its hash; what stands low is held out.

    Args:
        text: The text.
        seed: Another one gives other places; 0 is none.
        purpose: What it is held out for, where not for the test.
    """
    salt = f"{seed} {purpose}".encode() if seed or purpose else b""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, key=salt).digest()) / 2**64


def held_out(text: str, fraction: float = 0.2, seed: int = 0, purpose: str = "") -> bool:
    """Return whether a text is held out; see `place`.

    It is a fixed function of the text, so that every run and every site has the same split.
    """
    return place(text, seed, purpose) < fraction


def identity(prompt: Text, by: SplitBy) -> str:
    """Return what a prompt is told by: its question, or all that it says."""
    is_short = isinstance(prompt, str) and len(prompt) <= SHORT
    return _identity_of_text(prompt, by) if is_short else _identity(prompt, by)


@lru_cache(maxsize=REMEMBERED)  # it is asked for several times, and clients share prompts
def _identity_of_text(prompt: Text, by: SplitBy) -> str:
    return _identity(prompt, by)


def _identity(prompt: Text, by: SplitBy) -> str:
    if by == "question":
        return question(prompt)
    if isinstance(prompt, str):
        plain = prompt.replace("\r\n", "\n")
        return spelled(plain if _last_human(plain) is None else _SPEAKER.sub(" ", plain))
    said = [str(message.get("content") or key((message,))) for message in prompt]
    # tools belong to what is asked
    said += [key(Conversation((), prompt.given))] if isinstance(prompt, Conversation) else []
    return spelled(" ".join(said))


def digest(prompt: Text, by: SplitBy) -> str:
    """Return a short hash of what a prompt is told by, for lists of prompts that hold no text."""
    return f"{hashed(identity(prompt, by)):016x}"


def hashed(text: str) -> int:
    """Return a hash of 64 bits of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def keyed(prompt: Text, by: SplitBy, key: str) -> str:
    """Return an HMAC of what a prompt is told by, which says nothing to who lacks the key."""
    code = hmac.new(key.encode(), identity(prompt, by).encode(), "sha256")
    return code.hexdigest()[:32]


@dataclass(frozen=True)
class Outline:
    """What decides on which side rows stand, without the rows.

    Attributes:
        given: The side that the source says, a number in `SIDES`; NONE where it says none.
        asked: A hash of what the prompt is told by.
        places: Where that stands between 0 and 1, by what it may be held out for.
    """

    given: NDArray[np.int8]
    asked: NDArray[np.uint64]
    places: Mapping[str, NDArray[np.float64]]

    @classmethod
    def of(
        cls, rows: Iterable[Row], by: SplitBy, seed: int, purposes: Sequence[str] = ("test",)
    ) -> Outline:
        """Read rows once.

        Args:
            rows: The rows.
            by: What a prompt is told by.
            seed: Of the split.
            purposes: What prompts may be held out for.
        """
        given, asked = array("b"), array("Q")
        places = {purpose: array("d") for purpose in purposes}
        test = SIDES.index("test")
        for row in rows:
            told = identity(row.prompt, by)
            given.append(NONE if row.side is None else test * (row.side == "test"))
            asked.append(hashed(told))
            for purpose, values in places.items():
                values.append(place(told, seed, "" if purpose == "test" else purpose))
        return cls(
            np.array(given, dtype=np.int8),
            np.array(asked, dtype=np.uint64),
            {purpose: np.array(values) for purpose, values in places.items()},
        )

    def apart(self, groups: NDArray[np.int64]) -> Outline:
        """Return the same rows, where no group's prompts are those of another.

        Args:
            groups: Of each row a number.
        """
        pairs = np.column_stack([groups.astype(np.uint64), self.asked])
        _, numbers = np.unique(pairs, axis=0, return_inverse=True)
        return replace(self, asked=numbers.reshape(-1).astype(np.uint64))

    def is_low(self, purpose: str, fraction: float, also: Collection[int]) -> NDArray[np.bool_]:
        """Return which prompts are held out for a purpose, by their place or besides."""
        besides = np.isin(self.asked, np.array(sorted(also), dtype=np.uint64))
        return (self.places[purpose] < fraction) | besides

    def sides(self, fraction: float, also: Collection[int] = ()) -> NDArray[np.int8]:
        """Return rows' sides, as numbers in `SIDES`; NONE for those that are left out.

        A prompt of which the source has any row on the test side is a test prompt; its training
        rows are left out.

        Args:
            fraction: The share of prompts that are held out.
            also: Prompts that are held out besides, as they stand in `asked`.
        """
        train, test = map(SIDES.index, ("train", "test"))
        is_open = self.given == NONE
        is_held_out = (self.given == test) | (is_open & self.is_low("test", fraction, also))
        is_tested = np.isin(self.asked, self.asked[is_held_out])
        sides = np.full(len(self.given), train, dtype=np.int8)
        sides[is_tested] = NONE
        sides[(self.given == test) | (is_open & is_tested)] = test
        return sides


def split(
    rows: Iterable[Row], fraction: float, by: SplitBy = "question", seed: int = 0
) -> tuple[list[tuple[Side, Row]], int]:
    """Put each row on a side of the split, as its source says or by its prompt.

    A prompt of which the source has any row on the test side is a test prompt; its training rows
    are left out.

    Args:
        rows: All clients' rows.
        fraction: The share of prompts that are held out.
        by: What a prompt is told by.
        seed: Of the split.

    Returns:
        The rows that stay, with their sides, and how many were left out.
    """
    rows = list(rows)
    sides = Outline.of(rows, by, seed).sides(fraction).tolist()
    placed = [(SIDES[side], row) for side, row in zip(sides, rows, strict=True) if side != NONE]
    return placed, len(rows) - len(placed)
