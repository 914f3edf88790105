"""Gains pair by pair, and what a run keeps for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_rows, write_rows
from fedpref import Experiment, UserError, config, run
from fedpref.data import Builtin
from fedpref.experiments.run_directory import OUTCOMES, SAMPLES
from fedpref.numerics.metrics import ACCURACY
from fedpref.reports.page import write_report
from fedpref.reports.page.sentences import cards, words
from fedpref.reports.paired import gain, gains, known_accuracies, outcomes, sentences, stated
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
    assert found.error == pytest.approx(100 * values.std(ddof=1) / np.sqrt(40))
    assert found.prompts == 40
    assert found.is_told == (found.mean > 2 * found.error)
    nothing = gain(ours, ours)
    assert nothing is not None
    assert (nothing.mean, nothing.is_told) == (0, False)
    assert nothing.error > 0, "no gain is certain of few pairs"
    assert gain(ours, {"a": theirs["a"][1:], "b": theirs["b"]}) is None
    assert gain(ours, {}) is None
    few = {name: rows[:20] for name, rows in ours.items()}
    assert gain(few, {name: rows[:20] for name, rows in theirs.items()}) is None, "four prompts"


def test_the_error_of_a_gain_is_right_where_clients_share_some_prompts() -> None:
    rng = np.random.default_rng(2)

    def drawn() -> float:
        effects = dict(zip(range(30), rng.normal(size=30), strict=True))
        ours = {
            name: [(str(p), effects[p] + rng.normal()) for p in prompts for _ in range(pairs)]
            for name, prompts, pairs in (
                ("a", range(10), 3),
                ("b", range(5, 20), 2),
                ("c", range(30), 1),
            )
        }
        found = gain(ours, {name: [(p, 0.0) for p, _ in rows] for name, rows in ours.items()})
        assert found is not None
        errors.append(found.error)
        return found.mean

    errors: list[float] = []
    means = [drawn() for _ in range(400)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.1)


@pytest.fixture
def finished(settings: dict[str, Any], tmp_path: Path) -> Path:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([30, 28, 26]))
    task = {**settings["task"], "samples": 1, "sample_clients": ["client-0", "client-1"]}
    content = {
        **settings,
        "data": {"name": "files", "path": str(rows), "test_fraction": 0.5},
        "task": task,
        "rounds": 2,
        "evaluate_every": 1,
        "evaluate_pairs": 8,
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


@pytest.mark.long
def test_a_run_keeps_what_came_of_each_held_out_pair(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "evaluation.jsonl").open()]
    assert {m["num_examples"] for m in rows[0]["clients"].values()} == {8.0}, "a glance"
    kept = outcomes(finished, "fedpdpo")
    for name, metrics in rows[-1]["clients"].items():
        values = [value for _, value in kept[name]]
        assert len(values) == metrics["num_examples"] > 8
        assert sum(values) / len(values) == pytest.approx(metrics[ACCURACY])
    sure = stated(finished, "fedpdpo")
    for name, metrics in rows[-1]["clients"].items():
        assert all(0.5 <= one <= 1 for one, _ in sure[name])
        assert [right for _, right in sure[name]] == [right for _, right in kept[name]]
        bins: dict[int, float] = {}
        for one, right in sure[name]:
            bin = min(int(10 * one), 9)
            bins[bin] = bins.get(bin, 0.0) + one - right
        error = sum(map(abs, bins.values())) / len(sure[name])
        assert metrics["calibration_error"] == pytest.approx(error, abs=1e-6)
    assert (
        "Is it as sure as it may be?"
        in write_report([finished], finished / "page.html").read_text()
    )
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


def test_the_pages_luck_is_of_pairs_that_share_prompts(finished: Path) -> None:
    one = read(finished)
    found = gains(finished)["alone"]
    assert one.noise("alone") == {name: 2 * error for name, error in found.errors.items()}


def test_those_who_are_named_are_asked_alike(finished: Path) -> None:
    files = sorted(path.stem for path in (finished / SAMPLES).iterdir())
    assert files == ["client-0", "client-1"]
    table = sample_table(finished)
    assert table is not None
    commands = next_commands(finished)
    assert f"fedpref generate {finished} --client" in commands[0]
    assert f"fedpref report {finished} --open" in commands[1]


def test_a_glance_is_at_enough_examples_and_some_tasks_have_none(
    settings: dict[str, Any],
) -> None:
    with pytest.raises(UserError, match="evaluate_pairs"):
        config.parse(Experiment, {**settings, "evaluate_pairs": 7}, "test")
    opinion = {**settings, "evaluate_pairs": 8, "task": {"name": "opinion"}}
    with pytest.raises(UserError, match="evaluate_pairs: the task opinion"):
        config.parse(Experiment, {**opinion, "algorithm": {"name": "pluralllm"}}, "test")


def test_a_glance_at_one_of_two_objectives_is_no_figure_of_the_other(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = make_rows([40, 40])
    for i, row in enumerate(rows):
        row["kind"] = "first" if i % 20 else "second"
    objectives = {"objective_column": "kind", "objective_names": ["first", "second"]}
    content = {
        **settings,
        "data": {
            "name": "files",
            "path": str(write_rows(tmp_path / "rows.jsonl", rows)),
            "test_fraction": 0.5,
        },
        "task": {**settings["task"], **objectives},
        "algorithm": {"name": "firm", "local": settings["algorithm"]["local"]},
        "evaluate_on_start": True,
        "evaluate_pairs": 8,
        "baselines": [],
    }
    run(config.parse(Experiment, content, "test"), tmp_path / "run")
    first, *_ = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").open()]
    told = {name for row in first["clients"].values() for name in row if "num_" not in name}
    assert first["summary"].keys() == told


def test_a_client_that_is_not_there_is_said_not_to_be(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    task = {**settings["task"], "samples": 1, "sample_clients": ["clinet-0"]}
    with pytest.warns(UserWarning, match="sample_clients: there is no client 'clinet-0'"):
        run(config.parse(Experiment, {**settings, "task": task}, "test"), tmp_path / "run")


def test_names_of_clients_reach_a_terminal_escaped(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{**row, "client": f"evil\x1b[31m{row['client']}"} for row in make_rows([20, 20])]
    task = {**settings["task"], "samples": 1, "sample_clients": ["nobody"]}
    data = {"name": "files", "path": str(write_rows(tmp_path / "r.jsonl", rows))}
    content = {**settings, "task": task, "data": {**data, "test_fraction": 0.5}}
    content |= {"baselines": ["alone"], "algorithm": {**settings["algorithm"], "name": "fedpdpo"}}
    with pytest.warns(UserWarning, match="nobody") as said:
        run(config.parse(Experiment, content, "test"), tmp_path / "run")
    texts = [str(one.message) for one in said if "nobody" in str(one.message)]
    texts += [*sentences(tmp_path / "run"), *next_commands(tmp_path / "run")]
    assert len(texts) > 3
    assert not any("\x1b" in text for text in texts)


def test_the_shipped_tastes_are_known_by_client() -> None:
    known = Builtin().known_accuracies
    assert len(known) == 12
    assert sum(share for share, _ in known.values()) / 12 == pytest.approx(0.836, abs=5e-4)
    spec = Experiment()
    both = {"library": {"test": 80}, "bank": {"test": 80}}
    assert known_accuracies(spec, both) == {name: known[name][0] for name in both}
    # of some of a client's pairs nothing is known
    assert known_accuracies(spec, {**both, "bank": {"test": 10}}) == {}
