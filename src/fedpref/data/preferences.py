"""Rows of data: their formats, how one is read, and on which side of the split it stands."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from fedpref.errors import UserError

# plain, or a conversation of {"role", "content"} messages
Text = str | tuple[Mapping[str, str], ...]
Side = Literal["train", "test"]
TURN = "\n\nAssistant:"


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
    train: tuple[Row, ...]
    test: tuple[Row, ...]

    @property
    def digest(self) -> str:
        """A hash of all texts, by which a run recognises its data."""
        hasher = blake2b(digest_size=16)
        for row in self.train + self.test:
            hasher.update("\0".join((key(row.prompt), *row.said)).encode())
        return hasher.hexdigest()

    @property
    def conversations(self) -> int:
        """The number of rows whose prompts are conversations, not plain text."""
        return sum(not isinstance(row.prompt, str) for row in self.train + self.test)


def parse(
    record: Mapping[str, Any],
    where: str,
    *,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
) -> Preference:
    """Read a row in any of TRL's preference formats.

    Prompts may be explicit, or implicit, what chosen and rejected begin with in common; texts may
    be plain or conversations.

    Args:
        record: The row, by column.
        where: File and row, for messages.
        prompt: The column of prompts.
        chosen: The column of better answers.
        rejected: The column of worse answers.

    Raises:
        UserError: The row is not in one of these formats; the message names it.
    """
    for column in (chosen, rejected):
        if column not in record:
            raise UserError(
                f"{where}: no column {column!r}; the row has {sorted(map(str, record))}. "
                f"Expected TRL's columns {prompt!r} (optional), {chosen!r} and {rejected!r}, or "
                "set data.chosen_column and the like."
            )
    rest = {name: value for name, value in record.items() if name not in (prompt, chosen, rejected)}
    better, worse = text(record[chosen], chosen, where), text(record[rejected], rejected, where)
    if prompt in record:
        question = text(record[prompt], prompt, where)
    else:
        question, better, worse = _split_common(better, worse, where)
    if len({isinstance(part, str) for part in (question, better, worse)}) > 1:
        raise UserError(
            f"{where}: {prompt!r}, {chosen!r} and {rejected!r} must all be text or all be "
            "conversations."
        )
    if better == worse:
        raise UserError(
            f"{where}: the two answers are identical, so the row states no preference. Remove it."
        )
    return Preference(question, better, worse, where, rest)


def parse_feedback(
    record: Mapping[str, Any], where: str, *, prompt: str, completion: str, label: str
) -> Feedback:
    """Read a row in TRL's unpaired format: a prompt, an answer, and whether it is desirable.

    Args:
        record: The row, by column.
        where: File and row, for messages.
        prompt: The column of prompts.
        completion: The column of answers.
        label: The column of labels.

    Raises:
        UserError: The row is not in this format; the message names it.
    """
    if prompt not in record:
        raise UserError(
            f"{where}: no column {prompt!r}; the row has {sorted(map(str, record))}. Judgements "
            "need their prompt apart."
        )
    rest = {
        name: value for name, value in record.items() if name not in (prompt, completion, label)
    }
    question, answer = (
        text(record[prompt], prompt, where),
        text(record[completion], completion, where),
    )
    if isinstance(question, str) != isinstance(answer, str):
        raise UserError(
            f"{where}: {prompt!r} and {completion!r} must both be text or both be conversations."
        )
    desirable = {"true": True, "1": True, "false": False, "0": False}.get(
        str(record[label]).strip().lower()
    )
    if desirable is None:
        raise UserError(
            f"{where}, column {label!r}: expected true or false, found {record[label]!r}."
        )
    return Feedback(question, answer, desirable, where, rest)


def parse_prompt(record: Mapping[str, Any], where: str, *, prompt: str) -> Prompt:
    """Read a row in TRL's prompt-only format; raises UserError, which names the row."""
    return Prompt(
        text(record[prompt], prompt, where),
        where,
        {name: value for name, value in record.items() if name != prompt},
    )


def held_out(prompt: str, fraction: float = 0.2) -> bool:
    """Return whether a prompt is held out.

    It is a fixed function of the text, so that every seed and every run has the same split.
    """
    return int.from_bytes(blake2b(prompt.encode(), digest_size=8).digest()) < fraction * 2**64


def split(rows: Iterable[Row], fraction: float) -> tuple[list[tuple[Side, Row]], int]:
    """Put each row on a side of the split, as its source says or by its prompt.

    A prompt of which the source has any row on the test side is a test prompt; its training rows
    are left out.

    Args:
        rows: All clients' rows.
        fraction: The share of prompts that are held out.

    Returns:
        The rows that stay, with their sides, and how many were left out.
    """
    rows = list(rows)
    tested = {
        key(row.prompt)
        for row in rows
        if row.side == "test" or (row.side is None and held_out(key(row.prompt), fraction))
    }
    placed: list[tuple[Side, Row]] = []
    for row in rows:
        if row.side == "test" or (row.side is None and key(row.prompt) in tested):
            placed.append(("test", row))
        elif key(row.prompt) not in tested:
            placed.append(("train", row))
    return placed, len(rows) - len(placed)


def key(text: Text) -> str:
    """Return a text or conversation as one string, by which prompts are compared."""
    return (
        text
        if isinstance(text, str)
        else "\n".join(f"{message['role']}: {message['content']}" for message in text)
    )


def text(value: Any, column: str, where: str) -> Text:
    """Return the text or conversation in a column; raises UserError for anything else."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list | tuple) and value:
        for message in value:
            said = (
                isinstance(message, Mapping)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
            )
            if not said or not message["content"].strip():
                raise UserError(
                    f'{where}, column {column!r}: expected messages {{"role": ..., "content": '
                    f"...}} with text, found {message!r}."
                )
        return tuple({"role": message["role"], "content": message["content"]} for message in value)
    raise UserError(
        f"{where}, column {column!r}: expected text or a list of messages, found {value!r}. Fill "
        "it in or remove the row."
    )


def _split_common(better: Text, worse: Text, where: str) -> tuple[Text, Text, Text]:
    """Cut off what both answers begin with, and return it as the prompt, with the rest of both.

    It ends with the last assistant turn in hh-rlhf's format, otherwise with the last whole word.
    """
    if isinstance(better, str) and isinstance(worse, str):
        common = os.path.commonprefix([better, worse])
        cut = (
            common.rfind(TURN) + len(TURN)
            if TURN in common
            else common.rfind(" ")
            if " " in common
            else 0
        )
        if not better[:cut].strip() or not better[cut:].strip() or not worse[cut:].strip():
            raise UserError(
                f"{where}: there is no prompt column, and the two answers do not begin with a "
                "common prompt that both continue. "
                "Add a column 'prompt', or write the whole conversation into both answers."
            )
        return better[:cut], better[cut:], worse[cut:]
    shared = 0
    while shared < min(len(better), len(worse)) and better[shared] == worse[shared]:
        shared += 1
    if not 0 < shared < min(len(better), len(worse)):
        raise UserError(
            f"{where}: there is no prompt column, and the two conversations share no opening "
            "that both continue."
        )
    # both are conversations here
    turns: tuple[Any, Any] = better, worse
    return tuple(turns[0][:shared]), tuple(turns[0][shared:]), tuple(turns[1][shared:])
