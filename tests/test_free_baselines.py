"""Baselines that cost nothing stand beside a run's other lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import write_rows
from fedpref import Experiment, UserError, config, run
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.free_baselines import KINDS
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.numerics.metrics import ACCURACY
from fedpref.reports.comparison import compare_all
from fedpref.reports.page.sentences import words
from fedpref.reports.paired import gains
from fedpref.reports.run import read
from fedpref.reports.tables import client_table
from fedpref.tasks.alignment import alignment

FREE = [*(f"{name}-{kind}" for name in ("words", "probe") for kind in KINDS), "length"]


def over(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


@pytest.fixture
def spec(settings: dict[str, Any]) -> Experiment:
    baselines = ["words", "alone", "probe", "length"]
    return config.parse(Experiment, {**settings, "baselines": baselines}, "test")


@pytest.mark.long
def test_they_are_lines_of_a_run_beside_the_others(spec: Experiment, tmp_path: Path) -> None:
    outcome = run(spec, tmp_path / "run")
    finished = FinishedRun.at(outcome.path)
    assert list(finished.lines) == [spec.algorithm.name, "alone", *FREE]
    rows = compare_all([outcome.path])
    assert [row.name for row in rows] == list(finished.lines)
    assert all(row.bytes_per_round == 0 for row in rows[2:])
    shown = read(outcome.path)
    task = spec.task.build()
    shards = {shard.name: shard for shard in map(task.encode, spec.clients()[0])}
    for line in FREE:
        row = finished.last_of(line)
        assert row["round"] == spec.rounds
        assert {name: int(one["num_examples"]) for name, one in row["clients"].items()} == {
            name: len(shard.test) for name, shard in shards.items()
        }
        assert shown.gains(line).keys() == shards.keys()
    said, own = words(shown), over(shown.values())
    ahead = {line: over(shown.values(shown.baselines[line])) for line in FREE}
    best = max(ahead, key=ahead.__getitem__)
    expected = f"{best}, which trains no language model, reaches {ahead[best]:.1f}, more than that"
    assert (expected in said) == (ahead[best] > own)
    # the longer answer, by hand
    for client in spec.clients()[0]:
        right = [
            (len(row.chosen) > len(row.rejected)) + (len(row.chosen) == len(row.rejected)) / 2
            for row in client.test
        ]
        found = finished.last_of("length")["clients"][client.name][ACCURACY]
        assert found == pytest.approx(sum(right) / len(right))


def test_they_are_measured_on_the_clients_that_the_others_are(
    spec: Experiment, tmp_path: Path
) -> None:
    few = replace(spec, baselines=("length", "words"), evaluate_clients=2, rounds=1)
    outcome = run(few, tmp_path / "run")
    finished = FinishedRun.at(outcome.path)
    measured = [finished.last_of(line)["clients"].keys() for line in finished.lines]
    assert len(measured[0]) == 2
    assert all(names == measured[0] for names in measured)
    assert len(compare_all([outcome.path])) == len(finished.lines)
    assert client_table(outcome.path, finished.result().evaluations).rows


def test_pairs_are_told_apart_so_that_gains_have_errors(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    many = {**settings, "baselines": ["length"], "rounds": 1}
    path = run(config.parse(Experiment, many, "test"), tmp_path / "run").path
    for one in gains(path).values():
        assert one.error > 0


@pytest.mark.long
def test_a_run_that_stopped_before_them_makes_them_when_it_is_resumed(
    spec: Experiment, tmp_path: Path
) -> None:
    folder = RunDirectory(tmp_path / "run")
    for event in events(spec, folder):
        if event.line == "words-alone":
            break
    assert not FinishedRun.at(folder.path).is_finished
    said = [event.line for event in events(spec, folder) if event.kind == "evaluate"]
    assert said[-7:] == FREE, "words are fitted again, since not all their lines were done"
    assert FinishedRun.at(folder.path).is_finished
    rows = FinishedRun.at(folder.path).evaluations("words-alone")
    assert len(rows) == 1


@pytest.mark.parametrize("layers", [None, "last-1"])
def test_states_are_means_over_an_answers_own_tokens(
    settings: dict[str, Any], layers: str | None
) -> None:
    model = {**settings["task"]["model"], "lora_layers_to_transform": layers}
    task_of = {**settings["task"], "model": model}
    spec = config.parse(Experiment, {**settings, "task": task_of}, "test")
    task = spec.task.build()
    shard = task.encode(spec.clients()[0][0])
    task.states(shard.test[:3])
    found = task.states(shard.test[:3])  # of what is kept at the trunk's end, where there is one
    example = shard.test[0]
    prompt, answer = list(example.prompt), list(example.answers[0])
    model = task.language.backbone.model
    with torch.no_grad():
        hidden = model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
    theirs = hidden[-1][0, len(prompt) :].mean(0)
    assert torch.allclose(found[example.keys[0]], theirs, atol=1e-4)


def test_they_need_pairs(settings: dict[str, Any]) -> None:
    changed = {**settings, "baselines": ["words"]}
    changed["task"] = {**settings["task"], "name": "feedback", "loss": {"name": "kto"}}
    with pytest.raises(UserError, match="words ranks pairs of answers"):
        config.parse(Experiment, changed, "test")


def test_what_others_answer_is_a_baseline_of_opinions(tmp_path: Path) -> None:
    questions = [f"Is the number {k} a good one?" for k in range(20)]
    shares = {"a": [0.8, 0.2], "b": [0.6, 0.4], "c": [0.1, 0.9]}
    rows = [
        {"question": text, "options": ["yes", "no"], "group": group, "shares": some}
        for text in questions
        for group, some in shares.items()
    ]
    content = {
        "data": {"name": "opinions", "path": str(write_rows(tmp_path / "rows.jsonl", rows))},
        "partition": {"name": "natural", "column": "group"},
        "task": {"name": "opinion"},
        "algorithm": {"name": "pluralllm", "local": {"steps": 1}},
        "rounds": 1,
        "workers": 1,
        "baselines": ["majority"],
    }
    spec = config.parse(Experiment, content, "test")
    found = run(spec, tmp_path / "run").evaluations
    assert [*found] == ["pluralllm", "majority", "equal-shares"]
    others = {"a": [0.35, 0.65], "b": [0.45, 0.55], "c": [0.7, 0.3]}
    for group, predicted in others.items():
        expected = alignment(torch.tensor(predicted), torch.tensor(shares[group]))
        assert found["majority"][group]["alignment"] == pytest.approx(expected, abs=1e-6)
        even = alignment(torch.tensor([0.5, 0.5]), torch.tensor(shares[group]))
        assert found["equal-shares"][group]["alignment"] == pytest.approx(even, abs=1e-6)
        assert found["pluralllm"][group]["uniform"] == pytest.approx(even, abs=1e-6)
    with pytest.raises(UserError, match="words ranks pairs of answers, which the task opinion"):
        config.parse(Experiment, {**content, "baselines": ["words"]}, "test")
    pairs = {"baselines": ["majority"]}
    with pytest.raises(UserError, match="majority predicts groups' opinions"):
        config.parse(Experiment, pairs, "test")
