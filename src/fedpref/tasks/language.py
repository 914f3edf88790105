"""What all tasks on a language model share: the model, and prompts as its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from fedpref.data.preferences import ClientData, Text
from fedpref.data.unusable import Unusable
from fedpref.errors import UserError
from fedpref.models import devices
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.models.own_parts import Parts
from fedpref.models.packed import scored_tokens
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree
from fedpref.tasks.task import TaskSettings

DEFAULT_LENGTH = 1024

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LanguageTask(TaskSettings):
    """Settings of every task on a language model."""

    adapts: ClassVar[bool] = True

    model: Model = Model()
    """The language model and its adapter."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens of prompt and answer together; null takes the model's context, at most 1024."""
    truncation_mode: Literal["refuse", "keep_start", "keep_end"] = "refuse"
    """What becomes of longer rows: an error, or cut at the end (`keep_start`) or at the beginning
    (`keep_end`) of the prompt."""

    @property
    def objectives(self) -> tuple[str, ...]:
        return ("loss",)

    @property
    def measures_examples(self) -> bool:
        return len(self.objectives) == 1

    @property
    def runs_remote_code(self) -> bool:
        return self.model.trust_remote_code

    @property
    def names_model_files(self) -> bool:
        return self.model.gguf_file is not None or self.model.revision is not None

    def _check_names(self) -> None:
        """Raise ValueError where objectives cannot be told apart in metrics."""
        names = self.objectives
        if wrong := [
            name for name in names if "/" in name or name == "loss" or names.count(name) > 1
        ]:
            raise ValueError(
                f"the objective {wrong[0]!r}: give each a name of its own, without a slash and "
                "other than loss"
            )


class LanguageLearner(ABC):
    """A task with its language model, loaded once for any number of clients."""

    def __init__(self, settings: LanguageTask) -> None:
        self.settings = settings
        self.language = LanguageModel(settings.model)
        context = self.language.context
        self.max_length = settings.max_length or min(context or DEFAULT_LENGTH, DEFAULT_LENGTH)
        if context and self.max_length > context:
            raise UserError(
                f"task.max_length: {self.max_length} tokens were asked for, but the model's "
                f"context holds {context}. "
                f"Set task.max_length to {context} or less."
            )

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.settings.objectives

    @property
    def pieces_of_unit(self) -> int:
        return self.settings.pieces_of_unit

    @property
    def description(self) -> str:
        return self.language.description

    @property
    def device(self) -> torch.device:
        return self.language.device

    @property
    def devices(self) -> int:
        return devices.count(self.language.wanted)

    @property
    def adapted_ends(self) -> frozenset[str]:
        return self.language.adapted_ends

    def move_to(self, worker: int) -> None:
        self.language.move_to(worker)

    def begin_dropout(self, rng: torch.Generator) -> None:
        """Let dropout draw what the generator begins with, whatever has been drawn before."""
        if self.language.settings.lora_dropout:
            seeds.of_device(self.device).manual_seed(rng.initial_seed())

    def init(self, rng: torch.Generator) -> Tree:
        return self.language.init(rng)

    def parts(self, settings: Parts, rng: torch.Generator) -> Tree:
        return self.language.fresh(settings, rng)

    def export(self, params: Tree, folder: Path) -> None:
        self.language.export(params, folder)

    @abstractmethod
    def encode(self, data: ClientData, unusable: list[Unusable] | None = None) -> Any:
        """Return a client's rows as tokens; see `Task.encode`."""

    def tokens(
        self, prompt: Text, answers: Sequence[Text], where: str
    ) -> tuple[Tokens, list[Tokens]]:
        """Return the tokens of a prompt and of its answers, all plain text or all conversations.

        Args:
            prompt: The prompt.
            answers: Its answers.
            where: File and row, for messages.

        Raises:
            UserError: The tokenizer has no chat template, or it refuses the conversation.
        """
        if not isinstance(prompt, str) and not self.language.chats:
            raise UserError(
                f"{where}: the row is a conversation, but the tokenizer of "
                f"{self.settings.model.path!r} has no chat "
                "template. Give the prompt and answers as plain text, or use a model with a chat "
                "template."
            )
        try:
            if isinstance(prompt, str):
                opening, closed = self.language.texts.plain(prompt, [str(a) for a in answers])
            else:
                # conversations, as the prompt is
                opening, closed = self.language.texts.chat(prompt, answers)  # type: ignore[arg-type]
        except UserError as error:
            reason = str(error).removesuffix(".")
            raise UserError(
                f"{where}: {reason}."
                if isinstance(prompt, str)
                else f"{where}: the chat template of {self.settings.model.path!r} refuses the "
                f"conversation: {reason}. Change the row's messages, or give it as plain text."
            ) from error
        if not all(map(scored_tokens, closed)):
            raise UserError(f"{where}: an answer has no turn of the assistant's to be scored.")
        return tuple(opening), [tuple(answer) for answer in closed]

    def fit(
        self, prompt: Tokens, answers: Sequence[Tokens], where: str
    ) -> tuple[Tokens, list[Tokens], bool]:
        """Cut what is longer than `max_length`, answers to no less than half of it.

        Returns:
            The prompt, the answers, and whether anything was cut.

        Raises:
            Unusable: Something is longer, and `truncation_mode` refuses that; or nothing that is
                scored is left of an answer.
        """
        length = len(prompt) + max(map(len, answers))
        if length <= self.max_length:
            return prompt, list(answers), False
        if self.settings.truncation_mode == "refuse":
            raise Unusable(
                "too long",
                where,
                f"prompt and longest answer are {length} tokens, task.max_length is "
                f"{self.max_length}",
            )
        room = self.max_length - min(len(prompt), self.max_length // 2)
        fitted = [answer[:room] for answer in answers]
        if not all(map(scored_tokens, fitted)):
            raise Unusable(
                "too long", where, "nothing of an assistant's turn is left after the cut"
            )
        return self.cut(prompt, self.max_length - max(map(len, fitted))), fitted, True

    def cut(self, prompt: Tokens, space: int) -> Tokens:
        """Return `space` tokens of a prompt, by `truncation_mode`; what opens it stays."""
        if self.settings.truncation_mode == "keep_start" or space >= len(prompt):
            return prompt[:space]
        opening = prompt[: self.language.opens(prompt)]
        return opening + prompt[len(prompt) - space + len(opening) :]
