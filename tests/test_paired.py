"""Gains pair by pair, and what a run keeps for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpref import Experiment, UserError, config, run
from fedpref.data import Builtin
from fedpref.experiments.run_directory import OUTCOMES, SAMPLES
from fedpref.numerics.metrics import ACCURACY
from fedpref.reports.page.sentences import cards, words
from fedpref.reports.paired import gain, gains, outcomes, sentences
from fedpref.reports.run import read
from fedpref.reports.tables import next_commands, sample_table


def test_a_gain_is_the_mean_over_clients_and_its_error_is_that_of_prompts() -> None:
    rng = np.random.default_rng(1)
    prompts = [f"p{i}" for i in range(40)]
    # whole prompts are gained or not, by both clients: 40 pieces of evidence, not 400
    won = {prompt: float(rng.random() < 0.6) for prompt in prompts}
    ours = {name: [(p, won[p]) for p in prompts for _ in range(5)] for name in ("a", "b")}
    theirs = {name: [(p, 0.5) for p in prompts for _ in range(5)] for name in ("a", "b")}
    found = gain(ours, theirs)
    assert found is not None
    values = np.array(list(won.values())) - 0.5
    assert found.mean == pytest.approx(100 * values.mean())
    assert found.error == pytest.approx(100 * values.std() / np.sqrt(40), rel=0.05)
    assert found.prompts == 40
    assert found.in_errors == pytest.approx(found.mean / found.error)
    nothing = gain(ours, ours)
    assert nothing is not None
    assert (nothing.mean, nothing.error, nothing.in_errors) == (0, 0, 0)
    assert gain(ours, {"a": theirs["a"][1:], "b": theirs["b"]}) is None
    assert gain(ours, {}) is None


@pytest.fixture
def finished(settings: dict[str, Any], tmp_path: Path) -> Path:
    task = {**settings["task"], "samples": 1, "sample_clients": ["client-0", "client-1"]}
    content = {
        **settings,
        "task": task,
        "rounds": 2,
        "evaluate_every": 1,
        "evaluate_pairs": 2,
        "baselines": ["alone", "feddpo"],
        "algorithm": {
            **settings["algorithm"],
            "name": "fedpdpo",
            "phases": "joint",
            "parts": {"head": None, "bottleneck": 0},
        },
    }
    run(config.parse(Experiment, content, "test"), tmp_path / "run")
    return tmp_path / "run"


def test_a_run_keeps_what_came_of_each_held_out_pair(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "evaluation.jsonl").open()]
    assert {m["num_examples"] for m in rows[0]["clients"].values()} == {2.0}, "a glance"
    kept = outcomes(finished, "fedpdpo")
    for name, metrics in rows[-1]["clients"].items():
        values = [value for _, value in kept[name]]
        assert len(values) == metrics["num_examples"] > 2
        assert sum(values) / len(values) == pytest.approx(metrics[ACCURACY])
    found = gains(finished)
    assert found.keys() == {"alone", "feddpo"}
    alone = json.loads((finished / "baselines/alone/evaluation.jsonl").open().readlines()[-1])
    expected = {
        name: 100 * (row[ACCURACY] - alone["clients"][name][ACCURACY])
        for name, row in rows[-1]["clients"].items()
    }
    assert found["alone"].clients == pytest.approx(expected)
    first, second = sentences(finished)
    assert first.startswith("fedpdpo against alone: ")
    assert "paired over" in second
    shown = read(finished)
    error = f"standard error {found['alone'].error:.1f} over {found['alone'].prompts} prompts"
    assert error in words(shown)
    assert f"points, {error}" in [note for _, _, note in cards(shown)]
    file = next((finished / OUTCOMES).glob("*.json"))
    file.write_text('[["a", "b"]]')
    with pytest.raises(UserError, match="damaged"):
        gains(finished)


def test_those_who_are_named_are_asked_alike(finished: Path) -> None:
    files = sorted(path.stem for path in (finished / SAMPLES).iterdir())
    assert files == ["client-0", "client-1"]
    table = sample_table(finished)
    assert table is not None
    commands = next_commands(finished)
    assert f"fedpref generate {finished} --client" in commands[0]
    assert f"fedpref report {finished} --open" in commands[1]


def test_the_shipped_tastes_are_known_by_client() -> None:
    known = Builtin().known_accuracies
    assert len(known) == 12
    assert sum(known.values()) / 12 == pytest.approx(0.836, abs=5e-4)
