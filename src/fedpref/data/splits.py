"""Which rows are held out: by what a prompt says, not by its bytes."""

from __future__ import annotations

import hmac
import re
import unicodedata
from collections.abc import Collection, Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

from fedpref.data.preferences import Conversation, Row, Side, Text, key

SplitBy = Literal["question", "prompt"]
_SPEAKER = re.compile(r"^[ \t]*(?:Human|Assistant):", re.MULTILINE)  # of hh-rlhf's plain form
# of no width: a mark of byte order, and spaces and joiners between words
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
    # at the beginning of a line
    if begin < 0 or text[:begin].rpartition("\n")[2].strip():
        return None
    return text[begin + len("Human:") : end]


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
    return _identity_of_text(prompt, by) if isinstance(prompt, str) else _identity(prompt, by)


@lru_cache(maxsize=2**17)  # it is asked for several times, and clients share prompts
def _identity_of_text(prompt: str, by: SplitBy) -> str:
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
    return blake2b(identity(prompt, by).encode(), digest_size=8).hexdigest()


def keyed(prompt: Text, by: SplitBy, key: str) -> str:
    """Return an HMAC of what a prompt is told by, which says nothing to who lacks the key."""
    code = hmac.new(key.encode(), identity(prompt, by).encode(), "sha256")
    return code.hexdigest()[:32]


def split(
    rows: Iterable[Row],
    fraction: float,
    by: SplitBy = "question",
    seed: int = 0,
    also: Collection[str] = (),
) -> tuple[list[tuple[Side, Row]], int]:
    """Put each row on a side of the split, as its source says or by its prompt.

    A prompt of which the source has any row on the test side is a test prompt; its training rows
    are left out.

    Args:
        rows: All clients' rows.
        fraction: The share of prompts that are held out.
        by: What a prompt is told by.
        seed: Of the split.
        also: What else is held out, by `identity`.

    Returns:
        The rows that stay, with their sides, and how many were left out.
    """
    rows = list(rows)
    said = [identity(row.prompt, by) for row in rows]
    tested = {
        words
        for row, words in zip(rows, said, strict=True)
        if row.side == "test"
        or (row.side is None and (held_out(words, fraction, seed) or words in also))
    }
    placed: list[tuple[Side, Row]] = []
    for row, words in zip(rows, said, strict=True):
        if row.side == "test" or (row.side is None and words in tested):
            placed.append(("test", row))
        elif words not in tested:
            placed.append(("train", row))
    return placed, len(rows) - len(placed)
