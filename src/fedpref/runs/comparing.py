"""Whether an export is the run's model: log-probabilities of a few held-out rows, by both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedpref.data.preferences import Feedback, Preference, Text
from fedpref.engines.workers import one_thread
from fedpref.errors import UserError
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.frozen import of_model, refuse_other
from fedpref.models.language import LanguageModel
from fedpref.models.loading import exported_parameters
from fedpref.models.own_parts import DOWN, NAMES, REWARDS, UP
from fedpref.models.packed import Row, Unscored, scored_tokens

ROWS = 4
ASKED, ANSWERED = "Which of the two is it?", (" The first.", " It may be either.")
LONGEST = 256  # tokens of a row that are compared
# shares of a log-probability, beside a hundredth of a nat: other kernels round otherwise, and
# float16 has eleven bits
TOLERANCE = {"float32": 1e-3, "float16": 2e-2}


class Comparison:
    """The run's model beside what was exported of it.

    Args:
        run: The run.
        client: Whose held-out rows are taken first.

    Raises:
        UserError: The base model cannot be loaded, or is not the one that the run began with.
    """

    def __init__(self, run: FinishedRun, client: str | None) -> None:
        # the run's own model, not what the export says that it stands on
        own: Any = run.experiment.task.model
        model: Any = replace(own, dtype="float32", device="cpu")
        if model.bits:  # exports stand on weights that are not rounded
            model = replace(model, load_in_4bit=False, load_in_8bit=False)
        with one_thread():
            self.language = LanguageModel(model)
        if not own.bits:
            refuse_other(run.folder, of_model(self.language))
        self.rows = list(_rows(run, client, self.language))
        self.largest = 0.0

    @property
    def sentence(self) -> str:
        """What came of it, for a model card."""
        count = sum(len(answers) for _, answers in self.rows)
        return (
            "Compared with the run by plain transformers, both in float32: log-probabilities of "
            f"{count} answers differ by {self.largest:.1g} nats at most."
        )

    def check(self, folder: Path, exported: Any, *, is_whole: bool, dtype: str = "float32") -> None:
        """Compare one exported model with the folder of the run that it was made of.

        Args:
            folder: The run's folder.
            exported: The model as plain transformers or PEFT loaded it, in float32.
            is_whole: Whether the export has the client's own vocabulary head.
            dtype: What the export's weights were rounded to.

        Raises:
            UserError: They are not one model.
        """
        params = exported_parameters(self.language, folder)
        for name in NAMES if not is_whole else REWARDS | {DOWN, UP}:
            params.pop(name, None)
        with torch.no_grad():
            expected = self.language.log_probabilities(params, self.rows).tolist()
            found = [
                _plain(exported, prompt, answer)
                for prompt, answers in self.rows
                for answer in answers
            ]
        for mine, theirs in zip(expected, found, strict=True):
            if not abs(mine - theirs) <= 0.01 + TOLERANCE[dtype] * abs(mine):
                raise UserError(
                    f"{folder}: the export is another model than the run's, and was not kept: an "
                    f"answer's log-probability is {theirs:.3f} in the place of {mine:.3f}. Please "
                    "report this with the model's name and the versions of PEFT and transformers."
                )
            self.largest = max(self.largest, abs(mine - theirs))


def _rows(run: FinishedRun, client: str | None, language: LanguageModel) -> Iterator[Row]:
    """Yield held-out rows as tokens; where the data are not here, others that are in no data."""
    pairs: list[tuple[Text, Sequence[Text]]] = []
    try:
        clients = run.experiment.read().clients
    except UserError:  # moved since, or never here: they are with their sites
        clients = ()
    for one in sorted(clients, key=lambda one: one.name != client):
        for row in one.test:
            if isinstance(row, Preference):
                pairs.append((row.prompt, (row.chosen, row.rejected)))
            elif isinstance(row, Feedback):
                pairs.append((row.prompt, (row.completion,)))
    has_any = False
    for prompt, answers in [*pairs[:ROWS], (ASKED, ANSWERED)]:
        if has_any and prompt is ASKED:
            return
        if isinstance(prompt, str):
            opening, said = language.texts.plain(prompt, [str(answer) for answer in answers])
        else:
            opening, said = language.texts.chat(prompt, answers)  # type: ignore[arg-type]
        cut = tuple(tuple(ids[: LONGEST // 2]) for ids in said)
        # an answer may begin with a long turn of the user's, of which nothing is scored
        if all(map(scored_tokens, cut)):
            has_any = True
            yield opening[-LONGEST // 2 :], cut


def _plain(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return an answer's log-probability by the model's own forward pass, without padding."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
    tokens = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
    scored = torch.tensor([not isinstance(token, Unscored) for token in answer])
    return float(tokens[scored].sum())
