"""How a row of a file is read: TRL's formats, and others that are plainly meant."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, TypeVar

from fedpref.data.preferences import Conversation, Feedback, Message, Preference, Prompt, Text
from fedpref.data.unusable import MISSING, Unusable
from fedpref.errors import UserError

R = TypeVar("R", Preference, Feedback)
TURN = "\n\nAssistant:"
# what prompts are also called
QUESTIONS = (
    *("instruction", "question", "query", "input", "problem"),
    *("context", "post", "messages", "conversations", "conversation"),
)
# who speaks, in ShareGPT's format of {"from", "value"}
SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
}
BLANKS = (" ", "\n", "\t")
SHP = ("human_ref_A", "human_ref_B")
# what a conversation that is written as text begins with, and has
ARRAY = re.compile(r"array\((\[.*\]),\s*dtype=object\)", re.DOTALL)
MESSAGE = re.compile(r"""["'](role|from)["']\s*:""")
# how one begins, be it broken: with who speaks and what is said, or the other way round
BEGINS = re.compile(
    r"""\[?\s*\{\s*(["'](role|from)["']\s*:\s*["'][^"']*["']\s*,\s*)?["'](content|value)["']\s*:"""
)
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


# columns of rows that are kept once: so many of them at most, of texts so long, and so many rows
SHARED_COLUMNS, SHARED_LENGTH, SHARED_MOST = 8, 64, 2**18
PLAIN = (str, int, float, bool, type(None))
_COLUMNS: dict[tuple[tuple[str, type, Any], ...], dict[str, Any]] = {}


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
    be plain or conversations. A plain prompt beside answers that are messages is a user's turn, and
    stands at the head of answers that are whole conversations.

    Args:
        record: The row, by column.
        where: File and row, for messages.
        prompt: The column of prompts.
        chosen: The column of better answers.
        rejected: The column of worse answers.

    Raises:
        Unusable: The row states no preference, or a text is empty.
        UserError: The row is not in one of these formats; the message names it.
    """
    _refuse_missing(record, where, prompt, chosen, rejected)
    given, rest = _given(record, (prompt, chosen, rejected), where)
    better, worse = text(record[chosen], chosen, where), text(record[rejected], rejected, where)
    if isinstance(better, str) != isinstance(worse, str):
        # an answer may show a conversation, beside one that is none
        better, worse = (
            one if isinstance(one, str) or not isinstance(record[column], str) else record[column]
            for one, column in ((better, chosen), (worse, rejected))
        )
    if better == worse:
        raise Unusable(
            "no preference",
            where,
            "the two answers are identical, so the row states no preference",
        )
    if prompt in record:
        question = text(record[prompt], prompt, where)
        question, better, worse = _answers_alone(question, better, worse, where)
    else:
        question, better, worse = _split_common(better, worse, where)
    if len({isinstance(part, str) for part in (question, better, worse)}) > 1:
        raise UserError(
            f"{where}: {prompt!r}, {chosen!r} and {rejected!r} must all be text or all be "
            "conversations."
        )
    return Preference(_with(question, given, where), better, worse, where, rest)


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
        Unusable: A text is empty.
        UserError: The row is not in this format; the message names it.
    """
    if prompt not in record:
        raise UserError(
            f"{where}: no column {prompt!r}; the row has {_columns(record)}. Judgements need "
            "their prompt apart."
        )
    given, rest = _given(record, (prompt, completion, label), where)
    question, answer = (
        text(record[prompt], prompt, where),
        text(record[completion], completion, where),
    )
    if isinstance(question, str) and not isinstance(answer, str):
        question = ({"role": "user", "content": question},)
    if isinstance(question, str) != isinstance(answer, str):
        raise UserError(
            f"{where}: {prompt!r} and {completion!r} must both be text or both be conversations."
        )
    if not isinstance(question, str) and not isinstance(answer, str):
        apart = _after(question, answer, where)
        if apart is not None:
            opening, answer = apart
            question = opening if len(opening) > len(question) else question
    said = str(record[label]).strip().lower()
    desirable = LABELS.get(said)
    is_missing = record[label] is None or _is_nan(record[label])
    if is_missing or not said or str(record[label]).strip() in MISSING:
        raise Unusable("empty", where, f"column {label!r}: expected true or false, found nothing")
    if desirable is None:
        raise UserError(
            f"{where}, column {label!r}: expected true or false, found {record[label]!r:.60}."
        )
    return Feedback(_with(question, given, where), answer, desirable, where, rest)


def parse_prompt(record: Mapping[str, Any], where: str, *, prompt: str) -> Prompt:
    """Read a row in TRL's prompt-only format.

    Raises:
        Unusable: The prompt is empty.
        UserError: It is neither text nor a conversation; the message names the row.
    """
    given, rest = _given(record, (prompt,), where)
    return Prompt(_with(text(record[prompt], prompt, where), given, where), where, rest)


def repeats_prompt(row: Preference | Feedback) -> bool:
    """Return whether all answers of plain text begin with their prompt and go on."""
    prompt, answers = row.prompt, _answers(row)
    return isinstance(prompt, str) and all(
        isinstance(answer, str) and _rest(prompt, answer).strip() for answer in answers
    )


def without_prompt(row: R) -> R:
    """Return a row of plain text whose answers no longer begin with their prompt."""
    names = ("completion",) if isinstance(row, Feedback) else ("chosen", "rejected")
    answers: Any = {name: _rest(str(row.prompt), str(getattr(row, name))) for name in names}
    made: R = replace(row, **answers)
    return made


def _answers(row: Preference | Feedback) -> tuple[Text, ...]:
    return (row.completion,) if isinstance(row, Feedback) else (row.chosen, row.rejected)


def _rest(prompt: str, answer: str) -> str:
    """Return what follows the prompt in an answer; nothing where it does not begin with it."""
    if answer.startswith(prompt):
        return answer[len(prompt) :]
    wanted, there = prompt.strip(), answer.lstrip()
    return there[len(wanted) :] if there.startswith(wanted) else ""


# ---- texts


def text(value: Any, column: str, where: str) -> Text:
    """Return the text or conversation in a column.

    Conversations may also stand as text, in JSON or as Python writes them, as in CSV.

    Raises:
        Unusable: There is none.
        UserError: It is something else, or no text at all.
    """
    if value is None or value in ("", [], ()) or _is_nan(value):
        raise Unusable("empty", where, f"column {column!r}: expected text, found {value!r}")
    if isinstance(value, str):
        if not value.strip():
            raise Unusable("empty", where, f"column {column!r}: expected text, found {value!r:.20}")
        written = _written(value, column, where)
        if written is None:
            # of many clients' rows many have the same texts
            return sys.intern(str(_whole(value, column, where)))
        value = written
    if _is_message(value):  # an answer of one message
        value = [value]
    if isinstance(value, list | tuple):
        return tuple(_message(message, column, where) for message in value)
    raise UserError(
        f"{where}, column {column!r}: expected text or a list of messages, found {value!r:.80}."
    )


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _whole(value: str, column: str, where: str) -> str:
    """Return a text; raises UserError where it holds half a character, which no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}, column {column!r}: character {error.start + 1} is half of one (a lone "
            "surrogate). Write the text as UTF-8."
        ) from error
    return value


def _written(value: str, column: str, where: str) -> list[Any] | None:
    """Return the conversation that stands in a text; None where it is plain text.

    Raises:
        UserError: It begins as one, and cannot be read.
    """
    text = value.strip()
    if not text.startswith(("[", "{", "array(")):
        return None
    # as numpy writes an array of objects
    text = ARRAY.sub(r"\1", text)
    if not text.startswith(("[", "{")) or not MESSAGE.search(text):
        return None
    read = written_value(text)
    if isinstance(read, Mapping):
        read = [read]
    if isinstance(read, list) and read:
        return read if all(map(_is_message, read)) else None
    if not BEGINS.match(text):
        return None  # code, or JSON of something else
    raise UserError(
        f"{where}, column {column!r}: this looks like a conversation written as text, and is "
        f"neither JSON nor a Python list: {value[:80]!r}. Write it with json.dumps."
    )


def _is_message(value: Any) -> bool:
    """Return whether a value can be nothing but a message."""
    return isinstance(value, Mapping) and (
        {"from", "value"} <= value.keys()
        or ("role" in value and ("content" in value or "tool_calls" in value))
    )


def written_value(value: str) -> Any:
    """Return what stands in a text in JSON or as a Python expression; None where it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        # the last two of a text that is nested too deep
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _message(message: Any, column: str, where: str) -> Message:
    """Return a message as chat templates read it, with everything that it says."""
    at = f"{where}, column {column!r}"
    if isinstance(message, Mapping) and "from" in message and "value" in message:
        role = SHAREGPT.get(str(message["from"]).lower())
        if role is None:
            raise UserError(
                f'{at}: messages of {{"from", "value"}} are ShareGPT\'s, and nobody is called '
                f"{message['from']!r:.40}; expected one of {', '.join(SHAREGPT)}."
            )
        rest = {name: value for name, value in message.items() if name not in ("from", "value")}
        message = {"role": role, "content": message["value"], **rest}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(
            f'{at}: expected messages {{"role": ..., "content": ...}}, found {message!r:.80}.'
        )
    # tables of several kinds of message fill the rest with null
    said = {str(name): value for name, value in message.items() if value is not None}
    if "tool_calls" in said:
        said["tool_calls"] = _without_nulls(said["tool_calls"])
        if not said["tool_calls"]:  # as logs write a message that calls none
            del said["tool_calls"]
    content = _parts(said.get("content"), at)
    others = said.keys() - {"role", "content"}
    if (content is None or not content.strip()) and not others and said["role"] != "system":
        raise Unusable(
            "empty", where, f"column {column!r}: expected messages with text, found {said!r:.60}"
        )
    if content is not None:
        said["content"] = _whole(content, column, where)
    elif "content" in message or said["role"] == "system":
        said["content"] = None
    return said


def _without_nulls(value: Any) -> Any:
    """Return a value without entries that are null, with which tables fill what a row lacks."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def _parts(content: Any, at: str) -> str | None:
    """Return a content as text; one in parts, as of OpenAI, may have parts of text alone."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UserError(f"{at}: expected a content of text, found {content!r:.80}.")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{at}: a message has a part of the kind {kind!r:.40}, and only text is read."
            )
    return "".join(part["text"] for part in content)


# ---- what stands beside


def _columns(record: Mapping[str, Any]) -> list[str]:
    return sorted(map(str, record))


def _refuse_missing(
    record: Mapping[str, Any], where: str, prompt: str, chosen: str, rejected: str
) -> None:
    """Raise UserError where a column is not there, with the setting that would read the row."""
    missing = [column for column in (chosen, rejected) if column not in record]
    if missing and record.keys() >= set(SHP):
        raise UserError(
            f"{where}: these are columns of SHP; data: {{name: shp, path: ...}} reads them."
        )
    if missing:
        raise UserError(
            f"{where}: no column {missing[0]!r}; the row has {_columns(record)}. "
            f"Expected TRL's columns {prompt!r} (optional), {chosen!r} and {rejected!r}, or "
            "set data.chosen_column and the like."
        )
    if prompt not in ("prompt", "none") and prompt not in record:
        near = get_close_matches(prompt, map(str, record), 1)
        raise UserError(
            f"{where}: no column {prompt!r}, which data.prompt_column names; the row has "
            f"{_columns(record)}.{f' Did you mean {near[0]!r}?' if near else ''} "
            "data.prompt_column=none reads answers that begin with their prompt."
        )
    written = {str(name).strip().casefold(): name for name in record}
    other = [written[name] for name in ("prompt", *QUESTIONS) if name in written]
    if prompt == "prompt" and prompt not in record and other:
        raise UserError(
            f"{where}: no column 'prompt', but {other[0]!r}. Set data.prompt_column={other[0]} if "
            "that is the prompt, or data.prompt_column=none if both answers begin with it."
        )


def _given(
    record: Mapping[str, Any], texts: Sequence[str], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the chat template is given beside messages, and the row's other columns."""
    rest = {name: value for name, value in record.items() if name not in texts}
    given: dict[str, Any] = {}
    tools = rest.get("tools")
    if isinstance(tools, str) and tools.strip()[:1] in ("[", "{"):
        tools = written_value(tools)
        if tools is None:
            raise UserError(f"{where}, column 'tools': this is no JSON: {rest['tools']!r:.80}.")
    if isinstance(tools, Mapping):
        tools = [tools]
    if isinstance(tools, list):
        if strange := [tool for tool in tools if not isinstance(tool, Mapping)]:
            raise UserError(
                f"{where}, column 'tools': expected JSON objects, found {strange[0]!r:.60}. Rename "
                "the column if it is something else."
            )
        del rest["tools"]
        if tools:
            given["tools"] = _without_nulls(tools)
    more = rest.get("chat_template_kwargs")
    if isinstance(more, str) and more.strip().startswith("{"):
        more = written_value(more)
        if not isinstance(more, Mapping):
            raise UserError(f"{where}, column 'chat_template_kwargs': this is no JSON object.")
    if isinstance(more, Mapping):
        del rest["chat_template_kwargs"]
        given |= {str(name): value for name, value in more.items() if value is not None}
    return given, shared(rest)


def shared(columns: dict[str, Any]) -> dict[str, Any]:
    """Return the same columns as the same object: a client's rows have one in common, mostly."""
    if len(columns) > SHARED_COLUMNS:
        return columns
    said = tuple((name, type(value), value) for name, value in columns.items())
    try:
        if (known := _COLUMNS.get(said)) is not None:
            return known
    except TypeError:  # lists and objects are not compared by what they hold
        return columns
    if any(kind not in PLAIN or len(str(value)) > SHARED_LENGTH for _, kind, value in said):
        return columns
    if len(_COLUMNS) < SHARED_MOST:
        _COLUMNS[said] = columns
    return columns


def _with(question: Text, given: Mapping[str, Any], where: str) -> Text:
    """Return a prompt with what the chat template is given; raises UserError for plain text."""
    if not given:
        return question
    if isinstance(question, str):
        raise UserError(
            f"{where}: the row has {', '.join(given)}, which a chat template writes, and its "
            "prompt is plain text. Give the prompt as messages, or rename the column."
        )
    return Conversation(question, given)


def forget_columns() -> None:
    """Keep no columns of rows to come; those that rows have stay."""
    _COLUMNS.clear()


# ---- prompts and answers apart


def _answers_alone(
    question: Text, better: Text, worse: Text, where: str
) -> tuple[Text, Text, Text]:
    """Return prompt and answers, where answers may be whole conversations that begin with it."""
    if isinstance(better, str) or isinstance(worse, str):
        is_dialogue = isinstance(question, str) and question.rstrip().endswith(TURN.strip())
        row = Preference(question, better, worse, where)
        if is_dialogue and repeats_prompt(row):
            row = without_prompt(row)
        return row.prompt, row.chosen, row.rejected
    asked: tuple[Message, ...] = (
        ({"role": "user", "content": question},) if isinstance(question, str) else question
    )
    first, second = (_after(asked, answer, where) for answer in (better, worse))
    if (first is None) != (second is None):
        raise UserError(
            f"{where}: one answer is a whole conversation that begins with the prompt, the other "
            "is not. Give both in one form."
        )
    if first is None or second is None:
        return asked, better, worse
    (opening, chosen), (other, rejected) = first, second
    if opening != other:
        raise UserError(f"{where}: the two answers are conversations that begin differently.")
    # a system prompt may stand in either
    return (opening if len(opening) > len(asked) else asked), chosen, rejected


def _after(
    asked: Sequence[Message], answer: Sequence[Message], where: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]] | None:
    """Return a whole conversation as its prompt and its answer; None for an answer alone.

    Raises:
        UserError: It begins as a conversation, and asks something else than the prompt.
    """
    first = next((m["role"] for m in answer if m["role"] not in ("system", "developer")), "")
    if first == "user" and all(m["role"] in ("system", "developer") for m in asked):
        last = max(i for i, m in enumerate(answer) if m["role"] == "user")
        if last + 1 == len(answer):
            raise UserError(f"{where}: a conversation ends with the user's turn, without answer.")
        return (*asked, *answer[: last + 1]), tuple(answer[last + 1 :])
    if first != "user" or asked[-1]["role"] != "user":
        # after an assistant's turn, an answer may begin with the user's next one
        begins = tuple(answer[: len(asked)]) == tuple(asked) and len(answer) > len(asked)
        return (tuple(asked), tuple(answer[len(asked) :])) if begins else None
    wanted = _plain(asked[-1])
    last = max((i for i, m in enumerate(answer) if m["role"] == "user" and _plain(m) == wanted),
               default=-1)  # fmt: skip
    if last < 0 or last + 1 == len(answer):
        raise UserError(
            f"{where}: an answer is a whole conversation that does not ask the row's prompt, "
            f"{wanted[:60]!r}, and go on. data.prompt_column=none reads conversations alone."
        )
    return tuple(answer[: last + 1]), tuple(answer[last + 1 :])


def _plain(message: Message) -> str:
    return " ".join(str(message.get("content") or "").split())


def _split_common(better: Text, worse: Text, where: str) -> tuple[Text, Text, Text]:
    """Cut off what both answers begin with, and return it as the prompt, with the rest of both.

    It ends with the last assistant turn in hh-rlhf's format, otherwise with the last whole word.
    """
    if isinstance(better, str) != isinstance(worse, str):
        raise UserError(f"{where}: one answer is text, the other a conversation.")
    if isinstance(better, str) and isinstance(worse, str):
        common = os.path.commonprefix([better, worse])
        cut = (
            common.rfind(TURN) + len(TURN)
            if TURN in common
            else max(map(common.rfind, BLANKS), default=-1)
        )
        cut = max(cut, 0)
        if better[:cut].strip() and not (better[cut:].strip() and worse[cut:].strip()):
            raise Unusable(
                "empty", where, "one answer ends where the other goes on, so that it is empty"
            )
        if not better[:cut].strip():
            raise UserError(
                f"{where}: there is no prompt column, and the two answers do not begin with a "
                "common prompt that both continue. "
                "Add a column 'prompt', or write the whole conversation into both answers."
            )
        return better[:cut], better[cut:], worse[cut:]
    shared = 0
    while shared < min(len(better), len(worse)) and better[shared] == worse[shared]:
        shared += 1
    if shared == min(len(better), len(worse)):
        raise Unusable(
            "empty", where, "one conversation ends where the other goes on: its answer is empty"
        )
    if not shared:
        raise UserError(
            f"{where}: there is no prompt column, and the two conversations share no opening "
            "that both continue."
        )
    # both are conversations here
    turns: tuple[Any, Any] = better, worse
    return tuple(turns[0][:shared]), tuple(turns[0][shared:]), tuple(turns[1][shared:])
