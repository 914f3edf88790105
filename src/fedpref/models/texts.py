"""Prompts and answers as tokens: plain text, and conversations by the tokenizer's chat template.

A prompt and its answer are tokenised together and cut at a token, for a tokenizer may join what
stands on both sides of the cut, or begin a text otherwise than it goes on.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from fedpref.data.preferences import Conversation, Message
from fedpref.errors import UserError
from fedpref.models.packed import Unscored

ASSISTANT = "assistant"
# what chat templates call those who speak; any other name must stand in the template
ROLES = frozenset({"system", "developer", "user", ASSISTANT, "tool"})
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
MARK = "(the answer, 7481)"  # stands for a content where its place is asked for
# between them stands what many templates leave out of earlier turns
THOUGHTS, THOUGHT = "<think>", "</think>"
ESSENTIAL = frozenset({"tool_calls", "tools"})  # without which a conversation says something else

Tokens = list[int]


class Texts:
    """A tokenizer as it is used for training.

    Args:
        tokenizer: A tokenizer of transformers.
        model: Whose generation config may name further tokens that end an answer.
        today: The day that templates write as today's, as 2024-07-26.
    """

    def __init__(self, tokenizer: Any, model: Any, today: str) -> None:
        self.tokenizer = tokenizer
        self.today = date.fromisoformat(today)
        self._generation = getattr(model, "generation_config", None)
        self._embeddings = len(model.get_input_embeddings().weight)
        self._warned: set[str] = set()

    @property
    def stops(self) -> Tokens:
        """The tokens that end an answer."""
        said = self._generation.eos_token_id if self._generation else None
        return sorted(
            {self.tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])} - {None}
        )

    @property
    def end(self) -> int | None:
        """What closes an answer: the tokenizer's end token, or the model's where it names none."""
        own: int | None = self.tokenizer.eos_token_id
        if own is not None:
            return own
        # a config that was left as its class makes it may name a token that is not there
        return next((token for token in self.stops if token < len(self.tokenizer)), None)

    # ---- plain text

    def plain(self, prompt: str, answers: Sequence[str]) -> tuple[Tokens, list[Tokens]]:
        """Return the tokens of a plain prompt and of each answer to it.

        The prompt has the tokenizer's opening token if there is one, each answer is closed by the
        end token. What a tokenizer joins across the cut belongs to the answers.

        Raises:
            UserError: The prompt has no token, or the model has no embedding of one.
        """
        opening, whole = self._ids(prompt), [self._ids(prompt + answer) for answer in answers]
        shared = _shared(opening, *whole)
        if not shared:
            # one token for both: the answer is told from the prompt as generation would have it
            shared = len(opening)
            whole = [opening + self._ids(answer, special=False) for answer in answers]
        return self._checked(opening[:shared], [self._closed(ids[shared:]) for ids in whole])

    def _ids(self, text: str, *, special: bool = True) -> Tokens:
        """Return a text's tokens, with the opening token once and without an end token after it."""
        ids: Tokens = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if special and text:
            for end in self._appended:
                if ids[-1:] == [end]:
                    del ids[-1]
        opens = self.tokenizer.bos_token_id
        return ids[1:] if special and opens is not None and ids[:2] == [opens, opens] else ids

    @cached_property
    def _appended(self) -> Tokens:
        """The tokens that the tokenizer itself puts after a text."""
        ids = self.tokenizer("a")["input_ids"]
        return ids[-1:] if len(ids) > 1 and ids[-1] == self.end else []

    def _closed(self, answer: Tokens) -> Tokens:
        end = self.end
        # a text may end with the end token and a line break
        return answer if end is None or end in answer[-2:] else [*answer, end]

    # ---- conversations

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def chat(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Sequence[Message]],
    ) -> tuple[Tokens, list[Tokens]]:
        """Return the tokens of a conversation and of each answer to it, by the chat template.

        The prompt ends where an answer begins, as generation would ask for it. Of an answer of
        several messages only the assistant's are scored; others stand as `packed.Unscored` tokens.
        One warning shows what the template writes only before an answer is there, and which keys
        of messages it leaves out.

        Args:
            prompt: The messages of the prompt, with what else the template is given.
            answers: The messages of each answer.

        Raises:
            UserError: The template refuses the conversation, leaves a message of it out, or
                writes the prompt otherwise once it is answered.
        """
        render = self._renderer(prompt.given if isinstance(prompt, Conversation) else {})
        for answer in answers:
            if answer[-1]["role"] == "user":
                raise UserError(
                    "an answer ends with a user's turn, of which nothing is learned; cut it off, "
                    "or end with the assistant's"
                )
        firsts = {answer[0]["role"] for answer in answers} or {ASSISTANT}
        opening = render(prompt, firsts == {ASSISTANT})
        whole = [render([*prompt, *answer]) for answer in answers]
        common = os.path.commonprefix([opening, *whole])
        self._check_messages([*prompt], opening, common, render)
        for answer, text in zip(answers, whole, strict=True):
            self._check_messages([*prompt, *answer], text, text, render, since=len(prompt))
        if len(common) < len(opening):
            # what an answer itself begins with is its own, though the template's text may begin so
            begins = [
                self._frame(prompt, answer, 0, text, render)[0]
                for answer, text in zip(answers, whole, strict=True)
            ]
            cut = min([len(common), *(begin for begin in begins if begin >= 0)])
            self._warn(
                f"before an answer the chat template writes {opening[cut:]!r}, which it leaves "
                "out once the answer is there: trained without it, generated after it"
            )
            opening = opening[:cut]
        ids = self._template_ids(opening)
        said = [self._template_ids(text) for text in whole]
        shared = _shared(ids, *said)
        if not shared and said:
            raise UserError("prompt and answers have no token in common to begin with")
        closed = []
        for answer, tokens, text in zip(answers, said, whole, strict=True):
            marked = tokens
            if len(answer) > 1 or firsts != {ASSISTANT}:
                marked = self._marked(prompt, answer, tokens, text, render)
            _, closing = self._frame(prompt, answer, len(answer) - 1, text, render)
            closed.append(self._ended(marked[shared:], closing))
        return self._checked(ids[:shared], closed)

    def question(self, prompt: Sequence[int]) -> str:
        """Return a prompt's tokens as people read them, without what the chat template wrote.

        It is known of a conversation of one message; of others the whole text is returned.
        """
        if self.chats:
            text = self.tokenizer.decode(list(prompt))
            frame = self._renderer({})([{"role": "user", "content": MARK}], True)
            before, _, after = frame.partition(MARK)
            # a conversation of several messages has marks of turns within
            marks = set(self.tokenizer.get_added_vocab().values())
            turns = [sum(i in marks for i in ids) for ids in (prompt, self._template_ids(frame))]
            if text.startswith(before) and text.endswith(after) and turns[0] == turns[1]:
                return str(text[len(before) : len(text) - len(after)])
        return str(self.tokenizer.decode(list(prompt), skip_special_tokens=True))

    @staticmethod
    def _frame(
        prompt: Sequence[Message],
        answer: Sequence[Message],
        index: int,
        text: str,
        render: Callable[..., str],
    ) -> tuple[int, str]:
        """Return where the content of an answer's message begins in a text, and what closes it.

        It is told by another content in its place, for its own may stand anywhere else too. Where
        that cannot be told, -1 and nothing.
        """
        message = answer[index]
        if not isinstance(message.get("content"), str):
            return -1, ""
        marked = [*answer[:index], {**message, "content": MARK}, *answer[index + 1 :]]
        before, _, after = render([*prompt, *marked]).rpartition(MARK)
        return (len(before) if before and text.startswith(before) else -1), after

    def _renderer(self, given: Mapping[str, Any]) -> Callable[..., str]:
        """Return a function that writes messages by the template, on the run's own day."""
        template = self.tokenizer.get_chat_template(tools=given.get("tools"))
        # the template is given data alone, no function of ours in the place of its clock
        template = CLOCK.sub(lambda found: repr(self.today.strftime(found[2])), template)

        def render(messages: Sequence[Message], asks: bool = False, **changed: Any) -> str:
            try:
                text: str = self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    **{
                        **given,
                        **changed,
                        "chat_template": template,
                        "tokenize": False,
                        "add_generation_prompt": asks,
                    },
                )
            # templates are programs: what they do with a message that they do not expect varies
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{error}") from error
            return text

        if tools := given.get("tools"):
            probe = [{"role": "user", "content": "?"}]
            if render(probe) == render(probe, tools=None):
                raise UserError(f"it writes no tools, and the row has {len(tools)}")
        return render

    def _template_ids(self, text: str) -> Tokens:
        ids: Tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _check_messages(
        self,
        messages: Sequence[Message],
        text: str,
        kept: str,
        render: Callable[..., str],
        since: int = 0,
    ) -> None:
        """Raise UserError where a message is not in the text, or not in the part that is kept."""
        template, place = str(self.tokenizer.chat_template), 0
        for number, message in enumerate(messages, 1):
            role, content = message["role"], message.get("content")
            if role not in ROLES and not {f"'{role}'", f'"{role}"'} & set(_quoted(template)):
                raise UserError(
                    f"it knows no role {role!r}; write one of {', '.join(sorted(ROLES))}"
                )
            begin, end = _found(content, text, place)
            if begin < 0:
                raise UserError(f"it leaves out message {number} ({role}): {content!r:.60}")
            if end > len(kept):
                raise UserError(
                    f"once the conversation is answered, it writes message {number} ({role}) "
                    f"otherwise, or not at all: {content!r:.60}"
                )
            if number > since:
                # what an earlier turn has thought is nothing to learn
                if since and text.find(_thoughts(content), place) < 0:
                    raise UserError(
                        f"it leaves out what message {number} ({role}) thinks before its "
                        f"{THOUGHT}, of which nothing would be learned; cut it off, or give the "
                        "tokenizer a template for training, which keeps it"
                    )
                self._check_keys(messages, number - 1, render)
            place = end

    def _check_keys(
        self, messages: Sequence[Message], index: int, render: Callable[..., str]
    ) -> None:
        """Refuse a tool call that the template leaves out; warn of other keys."""
        message = messages[index]
        for name in message.keys() - {"role", "content"}:
            less = {key: value for key, value in message.items() if key != name}
            before, after = messages[:index], messages[index + 1 :]
            if render([*before, message, *after]) != render([*before, less, *after]):
                continue
            if name in ESSENTIAL:
                raise UserError(f"it leaves out {name!r} of message {index + 1}")
            self._warn(f"the chat template does not write {name!r} of a message")

    def _marked(
        self,
        prompt: Sequence[Message],
        answer: Sequence[Message],
        tokens: Tokens,
        text: str,
        render: Callable[..., str],
    ) -> Tokens:
        """Return a conversation's tokens with those of an answer marked that are not scored."""
        marked, reached = list(tokens), 0
        for number, message in enumerate(answer):
            before = [*prompt, *answer[:number]]
            begin = render(before, message["role"] == ASSISTANT)
            ends = render([*before, message]) if number + 1 < len(answer) else text
            if not text.startswith(begin) or not text.startswith(ends):
                raise UserError(
                    "an answer has several messages, and it writes earlier ones otherwise once "
                    "there are later ones, so that the assistant's cannot be told apart"
                )
            first, last = (
                _shared(self._template_ids(part), tokens) if part != text else len(tokens)
                for part in (begin, ends)
            )
            marked[reached:first] = map(Unscored, marked[reached:first])
            if message["role"] != ASSISTANT:
                marked[first:last] = map(Unscored, marked[first:last])
            reached = last
        return marked

    def _ended(self, answer: Tokens, closing: str) -> Tokens:
        """Return an answer with an end token, unless the template has closed it."""
        tokens = self._template_ids(closing) if closing else answer[-8:]
        if self.end is None or set(tokens) & set(self.stops):
            return answer
        return [*answer, self.end]

    # ---- both

    def _checked(self, prompt: Tokens, answers: list[Tokens]) -> tuple[Tokens, list[Tokens]]:
        if not prompt:
            raise UserError("the prompt has no token")
        highest = max(max(prompt), *(max(answer, default=0) for answer in answers), 0)
        if highest >= self._embeddings:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(f"the model has no embedding of the token {token!r}")
        return prompt, answers

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"{text}.", stacklevel=6)


def _shared(first: Sequence[int], *others: Sequence[int]) -> int:
    """Return how many tokens all begin with."""
    return next(
        (
            i
            for i, token in enumerate(first)
            if any(other[i : i + 1] != [token] for other in others)
        ),
        len(first),
    )


def _found(content: Any, text: str, place: int) -> tuple[int, int]:
    """Return where a message's content stands in a text, from a place on; (-1, -1) if nowhere.

    Templates strip it, write a tool's as JSON, and leave out the thoughts of earlier turns.
    """
    if content is None or (isinstance(content, str) and not content.strip()):
        return place, place
    forms = [content.strip()]
    if THOUGHT in content:
        forms.append(content.rpartition(THOUGHT)[2].strip())
    forms += [
        json.dumps(form, ensure_ascii=ascii)[1:-1] for form in forms for ascii in (False, True)
    ]
    for form in forms:
        begin = text.find(form, place)
        if begin >= 0:
            return begin, begin + len(form)
    return -1, -1


def _thoughts(content: Any) -> str:
    """Return what stands in a message as its author's thoughts; empty if nothing does."""
    if not isinstance(content, str) or THOUGHT not in content:
        return ""
    # a model that is made to think may leave the opening mark to the template
    return content.rpartition(THOUGHT)[0].rpartition(THOUGHTS)[2].strip()


def _quoted(template: str) -> list[str]:
    """Return the string constants of a template, in their quotes."""
    return re.findall(r"'[^'\n]*'|\"[^\"\n]*\"", template)
