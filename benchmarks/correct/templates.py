"""Tokens of prompts and answers, against those of the text that chat templates write."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import transformers
from transformers.utils import chat_template_utils

from correct.shared import BUILTIN, QUESTION, SMALL, TURNS, origin, random_model, said, sentence
from fedpref.errors import UserError
from fedpref.models.model_settings import Model
from fedpref.tasks import PreferenceTask

# what a template may mean by the tokenizer's end token: the first of these that it writes
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<|end|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001, as DeepSeek writes it
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "<|eot|>",
)
TAG = re.compile(r"</?[|｜]?[\w▁]+[|｜]?>")  # noqa: RUF001


SYSTEM = said("system", "Answer as one would a child.")
CONVERSATIONS = {
    "one turn": (QUESTION,),
    "system": (SYSTEM, QUESTION),
    "turns": (*TURNS, QUESTION),
    "system, turns": (SYSTEM, *TURNS, QUESTION),
}
ANSWERS = {
    "plain": ("In the morning.", "When the sun is back."),
    "<": ("<b>Tomorrow</b>, of course.", "<i>Soon</i> it will be."),
    "lines": ("First it dawns.\nThen it is day.\n\nWait.", "Soon.\n\n- at six\n- or at seven"),
}
DATE = next((f.name for f in fields(Model) if "date" in f.name), None)  # the setting, if any


@contextlib.contextmanager
def clock(day: datetime) -> Iterator[None]:
    """Let chat templates take a day for today within a `with`."""
    with mock.patch.object(chat_template_utils, "datetime") as today:
        today.now.return_value = day
        yield


def template_files() -> list[Path]:
    """Return trl's chat templates, without the variants of its own training; none without trl."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return []
    folder = Path(found.origin).parent / "chat_templates"
    return [f for f in sorted(folder.glob("*.jinja")) if not f.stem.endswith("_training")]


def template_model(template: str, folder: Path) -> str:
    """Save a tiny model whose tokenizer has the template, and the special tokens it writes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUILTIN)
    ends = [token for token in TURN_ENDS if token in template]
    named = {"eos_token": ends[0]} if ends else {}
    if "bos_token" in template:
        named["bos_token"] = "<bos>"
    tokenizer.add_special_tokens(named)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted({*TAG.findall(template)} - {*named.values()})}
    )
    tokenizer.chat_template = template
    small = SMALL | {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    ends_at = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return random_model(folder, transformers.LlamaConfig(**small | ends_at), tokenizer)


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many entries two sequences begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class TemplateTrial:
    """A template at work in fedpref's preference task."""

    def __init__(self, template: str, folder: Path) -> None:
        self.warned = ""  # all that was said so far, for a loss may be told once
        model = Model(path=template_model(template, folder), dtype="float32")
        with self.listening():
            self.learner = PreferenceTask(model=model).build()
        self.tokenizer = self.learner.language.tokenizer
        self.is_dated = "strftime_now" in template
        self.day = datetime(2024, 7, 26)
        if DATE:
            self.day = datetime.fromisoformat(str(getattr(self.learner.settings.model, DATE)))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note what is warned of within a `with`."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield
        self.warned += "".join(f"{one.message}\n" for one in told)

    def rendered(
        self, prompt: Sequence[Mapping[str, str]], answers: Sequence[str]
    ) -> tuple[str, list[str]]:
        """Return what transformers makes of a prompt that is to be answered, and of the wholes."""

        def write(messages: Sequence[Mapping[str, str]], asks: bool) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=asks
                )
            )

        with clock(self.day):
            return write(prompt, True), [
                write([*prompt, said("assistant", answer)], False) for answer in answers
            ]

    def is_straight(self, prompt: Sequence[Mapping[str, str]], answers: Sequence[str]) -> bool:
        """Return whether transformers writes a conversation whole, and answers after its prompt."""
        try:
            opening, whole = self.rendered(prompt, answers)
        except Exception:  # templates are programs
            return False
        return all(message["content"] in opening for message in prompt) and all(
            text.startswith(opening) and answer in text
            for answer, text in zip(answers, whole, strict=True)
        )

    def encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def found(self, prompt: Any, answers: Any) -> tuple[list[int], list[tuple[int, ...]]]:
        """Return fedpref's tokens of a prompt and of each answer to it."""
        with self.listening():
            ids, closed = self.learner.tokens(
                prompt, tuple((said("assistant", answer),) for answer in answers), "row 1"
            )
        return list(ids), [tuple(answer) for answer in closed]

    def problem(self, prompt: tuple[dict[str, str], ...], answers: tuple[str, str]) -> str:
        """Return what is wrong with a case, nothing if nothing is; raises UserError if refused."""
        try:
            with clock(datetime(2031, 12, 9)):
                another = self.found(prompt, answers)
            ids, closed = self.found(prompt, answers)
        except UserError:
            raise
        except Exception as error:
            return f"{sentence(error)} at {origin(error)}"
        if (ids, closed) != another:
            return "the tokens depend on the day"
        if self.is_dated and not DATE:  # which day is theirs?
            return ""
        try:
            opening, whole = self.rendered(prompt, answers)
        except Exception as error:  # templates are programs
            return f"transformers refuses it ({sentence(error)}), fedpref does not"
        return self.difference(prompt, answers, ids, closed, opening, whole)

    def difference(
        self,
        prompt: Sequence[Mapping[str, str]],
        answers: Sequence[str],
        ids: list[int],
        closed: Sequence[tuple[int, ...]],
        opening: str,
        whole: Sequence[str],
    ) -> str:
        """Return how fedpref's tokens differ from those of the rendered texts."""
        for content, answer, text in zip(answers, closed, whole, strict=True):
            right = self.encoded(text)
            together = [*ids, *(token if token >= 0 else ~token for token in answer)]
            if together not in (right, [*right, self.tokenizer.eos_token_id]):
                at = common_length(together, right)
                return (
                    f"prompt and answer read {self.decoded(together[at : at + 8])!r} for "
                    f"{self.decoded(right[at : at + 8])!r}"
                )
            # what is context alone is a complement, or of a type of its own
            scored = self.decoded([token for token in answer if type(token) is int and token >= 0])
            if content in text and content not in scored:
                return f"of the answer {content!r} only {scored!r} is scored"
        asked = self.encoded(opening)
        if ids == asked:
            return ""
        common = [common_length(asked, self.encoded(text)) for text in whole]
        if all(text.startswith(opening) for text in whole):
            # a token that holds the end of the prompt and the beginning of an answer, if any
            if len(ids) < min(common) or ids != asked[: len(ids)]:
                return f"the prompt ends with {self.decoded(ids)[-40:]!r}, not {opening[-40:]!r}"
        else:
            lost = [opening[common_length(opening, text) :] for text in whole]
            lost += [self.decoded(asked[length:]) for length in common]
            shapes = {form for text in lost for form in (text, text.strip(), repr(text)[1:-1])}
            if not any(form in self.warned for form in shapes if form):
                return f"{max(lost, key=len)[:60]!r} of the prompt is lost without a warning"
        shown = self.decoded(ids)
        if missing := [m["content"] for m in prompt if m["content"] not in shown]:
            return f"{missing[0]!r} is not in the prompt"
        return ""


def measure_templates(match: str, scratch: Path) -> dict[str, float]:
    """Try all templates and print a line for each."""
    found = [file for file in template_files() if match in file.stem]
    if not found:
        print(f"no template is tried: trl is not installed, or has none with {match!r} in its name")
        return {"templates_right_or_refused": 0, "templates_tried": 0}
    right = 0
    print(
        f"{'template':28}{'right':>7}{'refused':>9}{'needless':>10}{'wrong':>7}  "
        "the first that is not right\n"
        f"{'':28}{'(needless: transformers writes all of it, and answers after the prompt)'}"
    )
    for file in found:
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}  # that is wrong, that is refused
        trial: TemplateTrial | None = None
        for name, prompt in CONVERSATIONS.items():
            for kind, answers in ANSWERS.items():
                try:
                    trial = trial or TemplateTrial(file.read_text(), scratch / file.stem)
                    problem = trial.problem(prompt, answers)
                    how = "wrong" if problem else "right"
                except UserError as error:
                    how, problem = "refused", sentence(error)
                    counts["needless"] += trial is not None and trial.is_straight(prompt, answers)
                except Exception as error:  # as it is loaded
                    how, problem = "wrong", f"{sentence(error)} at {origin(error)}"
                counts[how] += 1
                first.setdefault(how, f"{how}: [{name}; {kind}] {problem}")
        right += not counts["wrong"]
        print(
            f"{file.stem:28}{counts['right']:7}{counts['refused']:9}{counts['needless']:10}"
            f"{counts['wrong']:7}  "
            f"{first.get('wrong') or first.get('refused', '')}",
            flush=True,
        )
    print(f"{right} of {len(found)} right or refused")
    return {"templates_right_or_refused": right, "templates_tried": len(found)}
