"""Which rows are held out: by what a prompt says, not by its bytes."""

from __future__ import annotations

import hmac
import re
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b
from typing import Literal

from fedpref.data.preferences import Row, Side, Text, key

SplitBy = Literal["question", "prompt"]
# a dialogue in hh-rlhf's plain form, up to the answer
_DIALOGUE = re.compile(r"(?:.*\n\n)?\s*Human:(.*?)\n\nAssistant:\s*", re.DOTALL)


def question(prompt: Text) -> str:
    """Return what a prompt asks: a text, or the last user's turn of a conversation.

    The same question in another spelling is the same: Unicode is composed (NFC), white space is
    one space, and a dialogue of "Human:" and "Assistant:" is a conversation.
    """
    if isinstance(prompt, str):
        dialogue = _DIALOGUE.fullmatch(prompt)
        return spelled(dialogue[1] if dialogue else prompt)
    users = [message for message in prompt if message["role"] == "user"] or prompt
    return spelled(str(users[-1].get("content") or key(prompt)))


def spelled(text: str) -> str:
    """Return a text with its Unicode composed and its white space made one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def held_out(text: str, fraction: float = 0.2, seed: int = 0, purpose: str = "") -> bool:
    """Return whether a text is held out.

    It is a fixed function of the text, so that every run and every site has the same split.

    Args:
        text: What decides.
        fraction: The share of texts that are held out.
        seed: Another one gives another split; 0 is none.
        purpose: What it is held out for, where not for the test.
    """
    salt = f"{seed} {purpose}".encode() if seed or purpose else b""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, key=salt).digest()) < (
        fraction * 2**64
    )


def identity(prompt: Text, by: SplitBy) -> str:
    """Return what a prompt is told by: its question, or all that it says."""
    return question(prompt) if by == "question" else spelled(key(prompt))


def digest(prompt: Text, by: SplitBy) -> str:
    """Return a short hash of what a prompt is told by, for lists of prompts that hold no text."""
    return blake2b(identity(prompt, by).encode(), digest_size=8).hexdigest()


def keyed(prompt: Text, by: SplitBy, key: str) -> str:
    """Return an HMAC of what a prompt is told by, which says nothing to who lacks the key."""
    code = hmac.new(key.encode(), identity(prompt, by).encode(), "sha256")
    return code.hexdigest()[:32]


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
    said = [identity(row.prompt, by) for row in rows]
    tested = {
        words
        for row, words in zip(rows, said, strict=True)
        if row.side == "test" or (row.side is None and held_out(words, fraction, seed))
    }
    placed: list[tuple[Side, Row]] = []
    for row, words in zip(rows, said, strict=True):
        if row.side == "test" or (row.side is None and words in tested):
            placed.append(("test", row))
        elif words not in tested:
            placed.append(("train", row))
    return placed, len(rows) - len(placed)
