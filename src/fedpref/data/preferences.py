"""Rows of data, and the rows of one client."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any, Literal

Message = Mapping[str, Any]  # "role", "content", and what else chat templates read of it
Text = str | tuple[Message, ...]  # plain, or a conversation
Side = Literal["train", "test", "validation"]
SIDES: tuple[Side, ...] = ("train", "test", "validation")


class Conversation(tuple[Message, ...]):
    """Messages of a prompt, with what else the chat template is given, such as tools.

    Args:
        messages: The messages.
        given: Names of the template, with their values.
    """

    given: Mapping[str, Any]

    def __new__(cls, messages: Iterable[Message], given: Mapping[str, Any]) -> Conversation:
        conversation = super().__new__(cls, messages)
        conversation.given = given
        return conversation

    def __getnewargs__(self) -> tuple[tuple[Message, ...], Mapping[str, Any]]:
        return tuple(self), self.given


@dataclass(frozen=True, slots=True)
class Preference:
    """One comparison: two answers to a prompt, the better one first."""

    prompt: Text
    chosen: Text
    rejected: Text
    where: str
    """File and row, for messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Everything else the source says of it."""
    side: Side | None = None
    """Where the source itself says so."""

    @property
    def said(self) -> tuple[str, ...]:
        """What the row says about its prompt, as text."""
        return key(self.chosen), key(self.rejected)


@dataclass(frozen=True, slots=True)
class Feedback:
    """One judgement: an answer to a prompt, desirable or not."""

    prompt: Text
    completion: Text
    label: bool
    where: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    side: Side | None = None

    @property
    def said(self) -> tuple[str, ...]:
        return key(self.completion), str(self.label)


@dataclass(frozen=True, slots=True)
class Opinion:
    """A group's answer to a question: the share of its people that chose each option."""

    prompt: str
    options: tuple[str, ...]
    shares: tuple[float, ...]
    """Of each option; they sum to one."""
    where: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    side: Side | None = None

    @property
    def said(self) -> tuple[str, ...]:
        return (*self.options, *map(str, self.shares))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt alone, to be answered."""

    prompt: Text
    where: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    side: Side | None = None

    @property
    def said(self) -> tuple[str, ...]:
        return ()


Row = Preference | Feedback | Opinion | Prompt


@dataclass(frozen=True)
class ClientData:
    """One client's rows; no training row's prompt, of any client, is that of a held-out row."""

    name: str
    train: Sequence[Row]
    """Rows to train on; of many rows, these and others lie in a file and are read when asked for,
    each time anew."""
    test: Sequence[Row]
    validation: Sequence[Row] = ()
    """Held out to choose by, where anything is chosen while the test's rows are left unread."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows."""
        return tuple(self.each())

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(self.train) + len(self.test) + len(self.validation)

    def each(self) -> Iterator[Row]:
        """Go through all rows, of which those in a file are read one after the other."""
        return chain(self.train, self.test, self.validation)

    def about(self) -> tuple[int, str]:
        """Look at each row once.

        Returns:
            The number of rows whose prompts are conversations, not plain text; and a hash of all
            texts, by which a run recognises its data.
        """
        hasher, conversations = blake2b(digest_size=16), 0
        for row in self.each():
            conversations += not isinstance(row.prompt, str)
            hasher.update("\0".join((key(row.prompt), *row.said)).encode())
        return conversations, hasher.hexdigest()

    @property
    def digest(self) -> str:
        """A hash of all texts, by which a run recognises its data."""
        return self.about()[1]


def key(text: Text) -> str:
    """Return a text or conversation as one string, with all that its messages say."""
    if isinstance(text, str):
        return text
    given = []
    if isinstance(text, Conversation):
        given = [json.dumps(text.given, sort_keys=True, default=str)]
    return "\n".join([*given, *map(_line, text)])


def _line(message: Message) -> str:
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    line = f"{message['role']}: {message.get('content') or ''}"
    return f"{line} {json.dumps(more, sort_keys=True, default=str)}" if more else line
