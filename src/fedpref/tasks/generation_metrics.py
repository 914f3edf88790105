"""What a model's own answers are like, before training and after, and what alignment has cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch

from fedpref.errors import UserError
from fedpref.models.generation import Sampling, generate
from fedpref.models.language import LanguageModel
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree
from fedpref.rewards import Reward
from fedpref.rewards.reward import (
    OpenGroups,
    answered,
    as_given,
    called,
    refuse_history,
)
from fedpref.rewards.text import distinct
from fedpref.tasks.language import Tokens
from fedpref.types import Count, Name, Text

PREFIX, BEFORE = "generation/", "_before"
OWN = frozenset({"win_rate", "length", "distinct_2", "kl", "perplexity"})  # not rewards
NEUTRAL = "builtin/neutral.txt"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Answers of a model to held-out prompts when training is over, and how they are judged.

    Answers before training are the backbone's. Both are drawn at temperature 1, as the model's
    probabilities are.
    """

    prompts: Count = 8
    """Held-out prompts of each client that are answered."""
    max_completion_length: Count = 96
    """Tokens of an answer at most."""
    rewards: dict[Name, Reward] = field(default_factory=dict)
    """Rewards or classifiers of an answer, by the names that their figures have."""
    judge: Reward | None = None
    """A reward by which answers before and after are compared: the share of prompts that the later
    one wins."""
    neutral: str | None = None
    """A text file, a passage in each line, on which perplexity is measured; null takes eight
    encyclopaedic ones that come with fedpref."""

    def __post_init__(self) -> None:
        for name in self.rewards:
            if name in OWN or name.endswith(BEFORE) or "/" in name:
                raise UserError(
                    f"task.generation.rewards: {name!r} is the name of another figure. Choose "
                    "another one."
                )
        if compared := [name for name, reward in self.rewards.items() if reward.compares]:
            raise UserError(
                f"task.generation.rewards: {compared[0]!r} compares answers to one prompt, and "
                "there is one to each here. task.generation.judge takes it, which compares the "
                "answer after training with that before."
            )
        refuse_history("task.generation.judge", [self.judge] if self.judge else [])


class Generations:
    """The metrics with their rewards loaded, and what the backbone answers."""

    def __init__(
        self, settings: Generation, language: LanguageModel, most: int, open_groups: OpenGroups
    ) -> None:
        """Load the rewards.

        Args:
            settings: What is measured.
            language: The model.
            most: Tokens of a prompt and its answer at most.
            open_groups: Opens rewards that are read off a finished run of opinions.

        Raises:
            UserError: Answers may be so long that no prompt has room before them.
        """
        if settings.max_completion_length > most - 8:
            raise UserError(
                f"task.generation.max_completion_length: {settings.max_completion_length} tokens "
                f"leave no room for a prompt in the {most} of task.max_length."
            )
        self.settings, self.language = settings, language
        self.rewards = {
            name: reward.build(open_groups) for name, reward in settings.rewards.items()
        }
        self.judge = settings.judge.build(open_groups) if settings.judge else None
        self.passages = _passages(settings.neutral, language)
        # of the backbone: clients who share prompts share its answers
        self._answers: dict[tuple[Tokens, ...], list[Tokens]] = {}
        self._perplexity: float | None = None

    def measure(
        self, params: Tree, client: str, prompts: Sequence[Tokens], texts: Sequence[Text]
    ) -> dict[str, float]:
        """Return metrics of a client's model, each also as it was before, where that is another.

        Args:
            params: The model's.
            client: Its name, which rewards are given as a column.
            prompts: That are answered.
            texts: The same as rewards are given them.

        Returns:
            Means over answers, under names that begin with `generation/`: rewards by their names,
            `win_rate` (ties count half), `length` in tokens, `distinct_2`, `kl`, the log-ratio of
            an answer to the backbone, and `perplexity` of neutral text.

        Raises:
            UserError: A reward does not keep to its signature.
        """
        known = tuple(prompts)
        if known not in self._answers:
            self._answers[known] = self._answered(None, prompts)
        before, after = self._answers[known], self._answered(params, prompts)
        asked = [as_given(text) for text in texts]
        said = {"": self._texts(after), BEFORE: self._texts(before)}
        given = {
            when: [answered(text, answer) for text, answer in zip(texts, some, strict=True)]
            for when, some in said.items()
        }
        columns = {"client": [client] * len(prompts)}
        found: dict[str, float] = {}
        for when, some in given.items():
            answers = before if when else after
            for name, reward in self.rewards.items():
                what = f"task.generation.rewards.{name}"
                found[name + when] = _mean(called(reward, what, asked, some, columns, answers))
            found[f"length{when}"] = _mean([len(answer) for answer in answers])
            found[f"distinct_2{when}"] = _mean([distinct(text, 2) for text in said[when]])
        if self.judge is not None:
            # both at once, for a judge may compare answers to one prompt
            both, twice = [*given[BEFORE], *given[""]], {"client": 2 * columns["client"]}
            judged = called(
                self.judge,
                "task.generation.judge",
                2 * asked,
                both,
                twice,
                [*before, *after],
            )
            pairs = zip(judged[: len(asked)], judged[len(asked) :], strict=True)
            won = [float(now > then) + 0.5 * (now == then) for then, now in pairs]
            found["win_rate"] = _mean(won)
        rows = [(prompt, (answer,)) for prompt, answer in zip(prompts, after, strict=True)]
        scores = [self.language.score(which, rows)[0].double() for which in (params, None)]
        found["kl"] = float((scores[0] - scores[1]).mean())
        found["perplexity"] = self._surprise(params)
        if self._perplexity is None:
            self._perplexity = self._surprise(None)
        found[f"perplexity{BEFORE}"] = self._perplexity
        return {f"{PREFIX}{name}": value for name, value in found.items()}

    def _answered(self, params: Tree | None, prompts: Sequence[Tokens]) -> list[Tokens]:
        rng = seeds.generator(0, "generation")
        sampling = Sampling(max_completion_length=self.settings.max_completion_length)
        return generate(self.language, params, prompts, 1, sampling, rng)

    def _texts(self, answers: Sequence[Tokens]) -> list[str]:
        decode = self.language.tokenizer.batch_decode
        texts: list[str] = decode([list(one) for one in answers], skip_special_tokens=True)
        return texts

    def _surprise(self, params: Tree | None) -> float:
        """Return the perplexity of the neutral passages, each after its first token."""
        rows = [(passage[:1], (passage[1:],)) for passage in self.passages]
        with torch.no_grad():
            sums, _ = self.language.score(params, rows)
        return math.exp(-float(sums.double().sum()) / sum(len(p) - 1 for p in self.passages))


def _passages(path: str | None, language: LanguageModel) -> list[Tokens]:
    if path is None:
        text = (files("fedpref.data") / NEUTRAL).read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"task.generation.neutral: {path} cannot be read: {error}") from error
    most = language.context or 1024
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    encoded = [tuple(language.tokenizer(line)["input_ids"][:most]) for line in lines]
    if not (long := [tokens for tokens in encoded if len(tokens) > 1]):
        raise UserError(f"task.generation.neutral: {path} has no line of two tokens or more.")
    return long


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def before_and_after(metrics: Mapping[str, float]) -> dict[str, tuple[float | None, float]]:
    """Return figures of answers by name: before training, where there is such a one, and after."""
    names = [name for name in metrics if name.startswith(PREFIX) and not name.endswith(BEFORE)]
    return {
        name.removeprefix(PREFIX): (metrics.get(name + BEFORE), metrics[name]) for name in names
    }
