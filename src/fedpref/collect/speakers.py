"""Who answers: a model, or what a run has made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpref.data.preferences import Text
from fedpref.errors import UserError
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.run_directory import CONFIG
from fedpref.models.generation import OwnSampling, Sampling, generate
from fedpref.models.language import LanguageModel
from fedpref.models.loading import exported_parameters
from fedpref.models.model_settings import Model
from fedpref.models.packed import scored_tokens

ROOM = 16  # tokens of a prompt at least, where answers are long


@dataclass(frozen=True)
class Speaker:
    """A model that answers prompts.

    Attributes:
        name: Where it is from, for the rows that are written.
        language: The model.
        parameters: An adapter with own parts; None for the model as it was.
        chats: Whether prompts are laid out by the chat template.
    """

    name: str
    language: LanguageModel
    parameters: Mapping[str, Tensor] | None
    chats: bool

    def before(self) -> Speaker:
        """Return the same model as it was before training."""
        return replace(self, name=self.language.name, parameters=None)

    def laid_out(self, prompt: Text) -> Text:
        """Return a prompt as the model is asked it: a plain one as a user's turn, if it chats."""
        if self.chats and isinstance(prompt, str):
            return ({"role": "user", "content": prompt},)
        return prompt

    def answers(
        self, prompts: Sequence[Text], count: int, length: int, temperature: float | None, seed: int
    ) -> list[list[Text]]:
        """Draw answers.

        Args:
            prompts: Texts or conversations, laid out.
            count: Answers to each.
            length: Tokens of an answer at most.
            temperature: Of plain sampling; 0 always takes the likeliest token. None has the
                model's own settings decide, or is 1 where these do not sample.
            seed: Of the draws.

        Returns:
            To each prompt its answers, text or messages as the prompt is.

        Raises:
            UserError: The chat template refuses a conversation.
        """
        own = OwnSampling(length, self.language.model.generation_config)
        sampling: Sampling | OwnSampling = own
        if temperature == 0:
            sampling = OwnSampling(length, None)
        elif temperature is not None or own.warpers is None:
            sampling = Sampling(max_completion_length=length, temperature=temperature or 1.0)
        room = max(ROOM, (self.language.context or length + 4096) - length)
        tokens = [self.tokens(prompt)[-room:] for prompt in prompts]
        rng = torch.Generator().manual_seed(seed)
        drawn = generate(self.language, self.parameters, tokens, count, sampling, rng)
        said = self.language.tokenizer.batch_decode(
            [list(answer) for answer in drawn], skip_special_tokens=True
        )
        return [
            [answer_to(prompt, text) for text in said[k * count : (k + 1) * count]]
            for k, prompt in enumerate(prompts)
        ]

    def tokens(self, prompt: Text) -> Sequence[int]:
        """Return the tokens of a prompt."""
        texts = self.language.texts
        return texts.plain(prompt, [])[0] if isinstance(prompt, str) else texts.chat(prompt, [])[0]

    @torch.no_grad()
    def margin(self, prompt: Text, first: Text, second: Text) -> float:
        """Return how much likelier the model has made the first answer than the second, in nats.

        It is what training has changed, as DPO's implicit reward is; of a model as it was, the
        difference of log-probabilities a token.
        """
        texts = self.language.texts
        if isinstance(prompt, str):
            opening, answers = texts.plain(prompt, [str(first), str(second)])
        else:
            opening, answers = texts.chat(prompt, [first, second])  # type: ignore[list-item]
        row = [(tuple(opening), [tuple(answer) for answer in answers])]
        after = self.language.log_probabilities(self.parameters, row)
        if self.parameters is None:
            counts = torch.tensor([max(1, scored_tokens(answer)) for answer in answers])
            after = after.cpu() / counts
        else:
            after = after - self.language.log_probabilities(None, row)
        return float(after[0] - after[1])


def answer_to(prompt: Text, text: str) -> Text:
    """Return an answer in the form that its prompt has."""
    return text if isinstance(prompt, str) else ({"role": "assistant", "content": text},)


def said(answer: Text) -> str:
    """Return an answer as people read it."""
    if isinstance(answer, str):
        return answer.strip()
    return "\n\n".join(str(turn.get("content") or "") for turn in answer).strip()


def speaker(
    what: str, client: str | None = None, chat: bool | None = None, beside: Speaker | None = None
) -> Speaker:
    """Open a run, or a model, to answer prompts.

    Args:
        what: A run directory, or a model as experiments name it.
        client: Whose model of a run; not needed where all share one.
        chat: Lay plain prompts out by the chat template; by default as the run was trained, and
            where a model has a template.
        beside: Another one, whose loaded model is used where it is the same.

    Raises:
        UserError: There is no such run or model, the client is none of it, or there is no chat
            template where one is asked for.
    """
    if (Path(what) / CONFIG).is_file():
        run = FinishedRun.at(what).require_done().refuse_opinions()
        settings: Any = run.experiment.task.model
        language = _loaded(settings, beside)
        parameters = exported_parameters(language, run.model_folder(client))
        chats = run.learned_from_conversations if chat is None else chat
        made = Speaker(
            f"{run.path.name}/{client}" if client else run.path.name, language, None, chats
        )
        made = replace(made, parameters=parameters)
    else:
        if client is not None:
            raise UserError(f"--client {client}: {what} is no run, whose clients have names.")
        language = _loaded(Model(path=what), beside)
        made = Speaker(what, language, None, language.chats if chat is None else chat)
    if made.chats and not language.chats:
        raise UserError(f"{what}: the tokenizer has no chat template. Give --plain.")
    return made


def _loaded(settings: Model, beside: Speaker | None) -> LanguageModel:
    if beside is not None and beside.language.settings == settings:
        return beside.language
    language = LanguageModel(settings)
    language.move_to(0)
    return language
