"""Rewards by models that others have trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedpref.data.hub import look_for_hub
from fedpref.data.whole_models import longest_input, one_at_a_time, refuse_partial
from fedpref.errors import UserError, reason
from fedpref.rewards.reward import OpenGroups, RewardFunction, RewardSettings, no_groups, plain
from fedpref.types import Count, Text


@dataclass(frozen=True, kw_only=True)
class Sentiment(RewardSettings):
    """How positive an answer sounds, from -1 to 1: VADER's compound score (Hutto and Gilbert 2014).

    It needs fedpref[sentiment].
    """

    name: Literal["sentiment"] = "sentiment"

    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise UserError(
                "The reward 'sentiment' needs vaderSentiment. Install fedpref[sentiment]."
            ) from error
        score = SentimentIntensityAnalyzer().polarity_scores

        def reward(prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
            return [float(score(plain(completion))["compound"]) for completion in completions]

        return reward


@dataclass(frozen=True, kw_only=True)
class Toxicity(RewardSettings):
    """The probability that an answer is not offensive, by a linear model on word counts.

    The .npz file is as profanity-check's model: `vocab` of W lower-case words, `coef` [K, W] and
    `intercept` [K] of K such models, `platt_a` and `platt_b` [K]; their probabilities 1 / (1 +
    exp(platt_a f + platt_b)) of f = coef . counts + intercept are averaged.
    """

    path: str
    """The .npz file."""
    name: Literal["toxicity"] = "toxicity"

    def with_paths(self, renamed: Callable[[str], str]) -> Self:
        return replace(self, path=renamed(self.path))

    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays: dict[str, NDArray[Any]] = {
                    name: file[name]
                    for name in ("vocab", "coef", "intercept", "platt_a", "platt_b")
                }
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.path}: could not be read as a toxicity model ({error}). "
                "Expected an .npz file with vocab, coef, intercept, platt_a and platt_b."
            ) from error
        columns = {str(word): i for i, word in enumerate(arrays["vocab"])}

        def reward(prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
            rewards = []
            for completion in completions:
                known = [
                    columns[word]
                    for word in re.findall(r"\b\w\w+\b", plain(completion).lower())
                    if word in columns
                ]
                f = arrays["coef"][:, known].sum(1) + arrays["intercept"]
                rewards.append(
                    1 - float((1 / (1 + np.exp(arrays["platt_a"] * f + arrays["platt_b"]))).mean())
                )
            return rewards

        return reward


@dataclass(frozen=True, kw_only=True)
class Classifier(RewardSettings):
    """A sequence-classification model of transformers, such as a reward model.

    The reward is its only logit, or the log-odds of one of its labels: among all of them, or of a
    model whose labels do not exclude one another (`problem_type` in its config) by itself. Prompt
    and answer are one text, or two segments (`pairs`); conversations go through the model's chat
    template. What is too long for the model loses its beginning.
    """

    path: str
    """A Hub id or a local folder."""
    name: Literal["classifier"] = "classifier"
    revision: str | None = None
    """A branch, tag or commit of a Hub id."""
    label: int | str | None = None
    """Which label is good, where there are several."""
    pairs: bool = False
    """Give prompt and answer as two segments in place of one text."""
    device: str = "cpu"
    """Where the model computes."""
    batch_size: Count = 16
    """Answers that are judged at once."""

    def with_paths(self, renamed: Callable[[str], str]) -> Self:
        return replace(self, path=renamed(self.path))

    @one_at_a_time
    def build(self, open_groups: OpenGroups = no_groups) -> RewardFunction:
        import transformers

        look_for_hub(self.path)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.path, revision=self.revision, truncation_side="left"
            )
            loaded, said = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.path, revision=self.revision, output_loading_info=True
            )
            refuse_partial(loaded, said, f"reward classifier: {self.path!r}")
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"reward classifier: {self.path!r} could not be loaded as a "
                "sequence-classification model of transformers: "
                f"{reason(error)}"
            ) from error
        model: Any = loaded.eval().requires_grad_(False).to(self.device)
        label = self._label(model.config)
        are_apart = model.config.problem_type == "multi_label_classification"
        config: Any = model.config.get_text_config()
        longest, padding = longest_input(model, tokenizer), config.pad_token_id
        if padding is not None and not 0 <= padding < config.vocab_size:
            padding = None
        # who reads the last place, and not the last token that is none of padding, needs it before
        is_before = tokenizer.padding_side == "left" and not hasattr(model, "score")
        options = {"truncation": longest is not None, "max_length": longest}

        def encoded(prompt: Text, completion: Text) -> Any:
            if not isinstance(prompt, str):
                if tokenizer.chat_template is None:
                    raise UserError(
                        f"reward classifier {self.path!r}: its tokenizer has no chat template, and "
                        "the prompts are conversations."
                    )
                text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
                # the template has written its own
                return tokenizer(text, add_special_tokens=False, **options)
            parts = [prompt, plain(completion)]
            return tokenizer(*(parts if self.pairs else ["".join(parts)]), **options)

        def batch(prompts: Sequence[Text], completions: Sequence[Text]) -> dict[str, Any]:
            rows = [encoded(p, c) for p, c in zip(prompts, completions, strict=True)]
            ids = {token for row in rows for token in row["input_ids"]}
            # the model reads its score at the last token that is none of padding, which with a
            # token of the text's in its place would be another
            filler = padding if padding is not None else min({*range(len(ids) + 1)} - ids)
            config.pad_token_id = filler
            fill = {"input_ids": filler}
            width = max(len(row["input_ids"]) for row in rows)

            def padded(name: str, numbers: Sequence[int]) -> list[int]:
                rest = [fill.get(name, 0)] * (width - len(numbers))
                return [*rest, *numbers] if is_before else [*numbers, *rest]

            return {
                name: torch.tensor([padded(name, row[name]) for row in rows], device=self.device)
                for name in rows[0]
            }

        @torch.no_grad()
        def reward(prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
            scores: list[float] = []
            for first in range(0, len(prompts), self.batch_size):
                part = slice(first, first + self.batch_size)
                logits = model(**batch(prompts[part], completions[part])).logits.float()
                if label is None:
                    odds = logits
                elif are_apart:
                    odds = logits[:, label]
                else:
                    odds = torch.logit(logits.softmax(-1)[:, label].clamp(1e-6, 1 - 1e-6))
                scores += odds.flatten().tolist()
            return scores

        return reward

    def _label(self, config: Any) -> int | None:
        """Return the index of the logit that is meant; None where there is only one."""
        known = {**config.label2id, **{i: i for i in range(config.num_labels)}}
        if self.label is None and config.num_labels == 1:
            return None
        if self.label not in known or config.num_labels == 1:
            raise UserError(
                f"reward classifier {self.path!r}: label {self.label!r} is none of the model's "
                f"{sorted(config.label2id)}."
            )
        return int(known[self.label])
