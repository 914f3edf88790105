"""Judgements of single answers, from rows to a trained adapter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_rows, write_rows
from fedpref import Experiment, UserError, config, run
from fedpref.data import ClientData, Feedback, Preference
from fedpref.numerics import seeds
from fedpref.tasks import BatchSize, FeedbackTask
from fedpref.tasks.feedback import FeedbackLearner, next_others


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each pair's better answer from every other row, and its worse one from the rest."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if good else "rejected"],
            "label": good,
            "client": row["client"],
        }
        for number, row in enumerate(rows)
        for good in [number % 2 == 0]
    ]


@pytest.fixture(scope="module")
def learner(tiny: Path) -> FeedbackLearner:
    return config.parse(
        FeedbackTask, {"model": {"path": str(tiny), "dtype": "float32"}, "max_length": 40}, "test"
    ).build()


def test_the_next_other_value_is_the_one_that_a_search_finds() -> None:
    def searched(values: list[int], i: int) -> int | None:
        ahead = [(i + step) % len(values) for step in range(1, len(values))]
        return next((j for j in ahead if values[j] != values[i]), None)

    rng = random.Random(0)
    for length in (0, 1, 2, 3, 8, 30):
        for kinds in (1, 2, 5):
            values = [rng.randrange(kinds) for _ in range(length)]
            assert next_others(values) == [searched(values, i) for i in range(length)]


def test_every_example_is_compared_with_an_answer_to_another_prompt(
    learner: FeedbackLearner,
) -> None:
    rows = (
        Preference("Hi?", " Yes.", " No.", "1"),
        Feedback("Ho?", " Well then.", False, "2"),
        Feedback("Hi?", " Who?", True, "3"),
    )
    shard = learner.encode(ClientData("a", rows, ()))
    text = learner.language.tokenizer.decode
    found = [
        (*tuple(text(part) for part in (e.prompt, *e.answers)), e.desirable) for e in shard.train
    ]
    assert found == [
        ("Hi?", " Yes.<|end|>", " Well then.<|end|>", True),
        ("Hi?", " No.<|end|>", " Well then.<|end|>", False),
        ("Ho?", " Well then.<|end|>", " Who?<|end|>", False),
        ("Hi?", " Who?<|end|>", " Well then.<|end|>", True),
    ]


def test_an_answer_to_another_prompt_is_cut_without_a_word_and_the_own_one_refused(
    learner: FeedbackLearner,
) -> None:
    long = Feedback("Ho?", " word" * 36, True, "2")
    shard = learner.encode(ClientData("a", (Feedback("Hi? " * 6, " Yes.", True, "1"), long), ()))
    assert len(shard.train[0].prompt) + len(shard.train[0].answers[1]) == 40
    assert shard.truncated == 0
    with pytest.raises(UserError, match=r"row 7: prompt and longest answer are \d+ tokens"):
        learner.encode(ClientData("a", (Feedback("Ho?", " word" * 60, True, "row 7"),), ()))


def test_judgements_of_one_prompt_alone_are_refused(learner: FeedbackLearner) -> None:
    """The KL estimate would be the mean log-ratio of the very answers that are trained."""
    one = tuple(Feedback("Hi?", f" {word}.", True, word) for word in ("Yes", "No", "Well"))
    with pytest.raises(UserError, match="all 3 judgements to train on are of one prompt"):
        learner.encode(ClientData("a", one, ()))
    two = (*one, Feedback("Ho?", " So.", False, "4"))
    (held_out,) = learner.encode(ClientData("a", two, one[:1])).test
    assert held_out.answers[1] == learner.encode(ClientData("a", two, ())).train[3].answers[0]


def test_the_loss_is_ktos_on_log_ratios_of_the_model(
    learner: FeedbackLearner, tmp_path: Path
) -> None:
    rows = tuple(Feedback(f"Question {i}?", " yes" * (i + 1), i % 2 == 0, str(i)) for i in range(4))
    shard = learner.prepare(learner.encode(ClientData("a", rows, rows)), tmp_path)
    draw = torch.Generator().manual_seed(0)
    adapter = {
        name: 0.3 * torch.randn(t.shape, generator=draw) for name, t in learner.init(draw).items()
    }
    batch = learner.draw(adapter, adapter, shard, BatchSize(4), seeds.generator(0, "work"))
    ratios = []
    for answer in (0, 1):
        alone = [(e.prompt, (e.answers[answer],)) for e in batch.examples]
        ratios.append(
            learner.language.log_probabilities(adapter, alone)
            - learner.language.log_probabilities(None, alone)
        )
    expected = learner.settings.loss(
        ratios[0], ratios[1], torch.tensor([e.desirable for e in batch.examples])
    )
    losses, metrics = learner.losses(adapter, batch)
    assert losses.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert metrics["kl"] == pytest.approx(max(0.0, ratios[1].mean().item()), abs=1e-4)
    right = [
        (r > 0) == e.desirable for r, e in zip(ratios[0].tolist(), batch.examples, strict=True)
    ]
    assert metrics["rewards/accuracies"] == sum(right) / 4


def test_training_learns_from_judgements(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = judged(make_rows([80]))
    task = {"name": "feedback", "model": settings["task"]["model"], "loss": {"beta": 0.5}}
    data = {**settings["data"], "path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    local = {"steps": 15, "batch_size": 16, "learning_rate": 0.02}
    spec = config.parse(
        Experiment,
        {**settings, "data": data, "task": task, "algorithm": {"name": "feddpo", "local": local}},
        "test",
    )
    outcome = run(spec, tmp_path / "run")
    (found,) = [row["rewards/accuracies"] for row in outcome.evaluations["feddpo"].values()]
    assert found > 0.75


def test_judgements_are_no_pairs(settings: dict[str, Any], tmp_path: Path) -> None:
    data = {
        **settings["data"],
        "path": str(write_rows(tmp_path / "rows.jsonl", judged(make_rows([8, 8])))),
    }
    with pytest.raises(UserError, match=r"does not compare two answers.*task.name to feedback"):
        run(config.parse(Experiment, {**settings, "data": data}, "test"), tmp_path / "run")


def test_columns_that_look_like_two_answers_are_pointed_out(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [
        {
            "prompt": row["prompt"],
            "response_a": row["chosen"],
            "response_b": row["rejected"],
            "score_a": 5,
            "client": row["client"],
        }
        for row in make_rows([8, 8])
    ]
    data = {**settings["data"], "path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    with pytest.raises(UserError, match=r"'response_a' and 'response_b' look like.*shp"):
        run(config.parse(Experiment, {**settings, "data": data}, "test"), tmp_path / "run")
