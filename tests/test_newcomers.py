"""Clients that take no part in training, within a run and after it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_rows, write_rows
from fedpref import Experiment, UserError, config, run
from fedpref.cli import app
from fedpref.data import SHP, Files
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.run_directory import file_name
from fedpref.experiments.run_files import EVALUATION, METRICS
from fedpref.numerics import trees
from fedpref.reports.page.sentences import words
from fedpref.reports.page.tables import newcomer_rows
from fedpref.reports.run import read
from fedpref.runs.export import export
from fedpref.runs.join import as_read, personalize

LOCAL = {"steps": 4, "batch_size": 4, "learning_rate": 0.02}
WITH_OWN = ["fedpdpo", "fedper", "fedsa-lora", "feddpa", "ditto", "alone"]


def experiment(
    settings: dict[str, Any], algorithm: dict[str, Any], **federation: Any
) -> Experiment:
    content = {
        **settings,
        "algorithm": {"local": LOCAL, **algorithm},
        "federation": {"join_steps": 5, **federation},
    }
    return config.parse(Experiment, content, "test")


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client that nobody knew, with 30 pairs."""
    rows = [{**row, "client": "late"} for row in make_rows([30], seed=5)]
    return write_rows(tmp_path_factory.mktemp("later") / "late.jsonl", rows)


def test_whoever_has_nothing_of_its_own_joins_without_training(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    parts = {"head": None, "bottleneck": 0, "reward": False, "adapter": False}
    before, after = run(
        experiment(settings, {"name": "fedpdpo", "parts": parts}, newcomers=1), tmp_path / "run"
    ).newcomers["fedpdpo"]
    assert before == after


@pytest.mark.parametrize("algorithm", [*WITH_OWN, "feddpo", "clustered"])
@pytest.mark.long
def test_newcomers_of_a_run_never_train_and_are_evaluated_before_and_after_they_join(
    algorithm: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = experiment(settings, {"name": algorithm}, newcomers=["client-1"])
    result = run(spec, tmp_path / "run")
    assert {
        row["clients"] for row in map(json.loads, (result.path / METRICS).read_text().splitlines())
    } == {3}
    before, after = result.newcomers[algorithm]
    assert set(before) == set(after) == {"client-1"}
    assert set(result.evaluations[algorithm]) == {"client-0", "client-2", "client-3"}
    assert (before == after) == (algorithm == "feddpo")
    row = json.loads((result.path / EVALUATION).read_text().splitlines()[-1])
    assert row["summary"]["loss"]["mean"] == pytest.approx(
        sum(r["loss"] for r in row["clients"].values()) / 3
    )


@pytest.mark.long
def test_what_is_shared_does_not_depend_on_a_newcomers_data(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = make_rows([24, 16, 12, 9])
    swapped = [
        {**r, "chosen": r["rejected"], "rejected": r["chosen"]} if r["client"] == "client-3" else r
        for r in rows
    ]
    adapters = []
    for name, content in (("as it is", rows), ("swapped", swapped)):
        data = {**settings["data"], "path": str(write_rows(tmp_path / f"{name}.jsonl", content))}
        spec = experiment(
            {**settings, "data": data, "baselines": ["pooled"]},
            {"name": "fedpdpo"},
            newcomers=["client-3"],
        )
        path = run(spec, tmp_path / name).path
        adapters.append(trees.load(path / "checkpoints/round-000003/adapter.safetensors"))
        adapters[-1] |= trees.load(path / "baselines/pooled/adapter/adapter_model.safetensors")
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_newcomers_are_drawn_or_named(settings: dict[str, Any]) -> None:
    names = ["a", "b", "c", "d"]
    drawn = experiment(settings, {"name": "feddpo"}, newcomers=2).federation
    assert len({drawn.joining(names, seed) for seed in range(20)}) > 3
    assert all(len(drawn.joining(names, seed)) == 2 for seed in range(20))
    assert drawn.joining(names, 7) == drawn.joining(names, 7)
    named = experiment(settings, {"name": "feddpo"}, newcomers=["c", "a"]).federation
    assert named.joining(names, 0) == (0, 2)
    assert named.weights(dict.fromkeys(names, 5), 0) == [0.0, 1.0, 0.0, 1.0]
    for wrong, sentence in ((4, "nobody is left"), (["e"], "no clients; the clients are")):
        with pytest.raises(UserError, match=sentence):
            experiment(settings, {"name": "feddpo"}, newcomers=wrong).federation.joining(names, 0)


@pytest.mark.parametrize("algorithm", WITH_OWN)
def test_a_client_that_joins_later_learns_its_own_on_what_is_shared(
    algorithm: str, settings: dict[str, Any], later: Path, tmp_path: Path
) -> None:
    result = run(experiment({**settings, "rounds": 1}, {"name": algorithm}), tmp_path / "run")
    shared = {
        path: path.read_bytes() for path in (result.path / "checkpoints").rglob("*.safetensors")
    }
    joined = personalize(result.path, Files(path=str(later)), steps=40)
    assert list(joined) == ["late"]
    assert joined["late"].train + joined["late"].test == 30
    assert joined["late"].after["loss"] < joined["late"].before["loss"]
    assert (joined["late"].path / "adapter_model.safetensors").is_file()
    assert {path: path.read_bytes() for path in shared} == shared
    with pytest.raises(UserError, match="joined already"):
        personalize(result.path, Files(path=str(later)))
    with pytest.raises(UserError, match="took part in the run"):
        personalize(result.path, Files(path=str(later)), name="client-1")
    with pytest.raises(UserError, match="the newcomer's name is empty"):
        personalize(result.path, Files(path=str(later)), name=" ")
    with pytest.raises(UserError, match="Leave one of the two out"):
        personalize(result.path, Files(path=str(later)), name="x", column="client")


@pytest.mark.long
def test_a_run_whose_model_is_shared_still_answers_after_somebody_joined(
    settings: dict[str, Any], later: Path, tmp_path: Path
) -> None:
    path = run(experiment(settings, {"name": "feddpo"}), tmp_path / "run").path
    personalize(path, Files(path=str(later)))
    assert (
        FinishedRun.at(path).model_folder()
        == FinishedRun.at(path).model_folder("client-0")
        == path / "adapter"
    )
    assert FinishedRun.at(path).model_folder("late") == path / "newcomers" / "late"


def test_fedpdpos_newcomer_keeps_the_adapter_it_received(
    settings: dict[str, Any], later: Path, tmp_path: Path
) -> None:
    parts = {"adapter": False}
    result = run(experiment(settings, {"name": "fedpdpo", "parts": parts}), tmp_path / "run")
    joined = personalize(result.path, Files(path=str(later)), column="client")
    adapter = trees.load(result.path / "adapter/adapter_model.safetensors")
    theirs = trees.load(joined["late"].path / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], theirs[name]) for name in adapter)
    assert trees.norm(trees.load(joined["late"].path / "own_parts.safetensors")) > 0


@pytest.mark.long
def test_from_the_command_line(settings: dict[str, Any], later: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(experiment(settings, {"name": "fedpdpo"}, newcomers=1)))
    ran = CliRunner().invoke(app, ["run", str(file), "--output", str(tmp_path / "run")])
    assert "newcomers: held-out pair accuracy" in ran.output
    joined = CliRunner().invoke(
        app,
        [
            "personalize",
            str(tmp_path / "run"),
            "--data",
            str(later),
            "--name",
            "x y",
            "--steps",
            "2",
        ],
    )
    assert joined.exit_code == 0, joined.output
    assert "x y" in joined.output
    one = read(tmp_path / "run")
    (row,) = (row for row in newcomer_rows([one]) if row[0] == "x y")
    figures = one.joined["x y"]["after"]
    assert row[3][1] == f"{100 * figures['rewards/accuracies']:.1f}"
    assert f"{sum(len(some) for some, _ in one.newcomers.values())} joined afterwards" in words(one)
    shared = export(tmp_path / "run", "peft", tmp_path / "all") / "shared/README.md"
    assert "3 clients" in shared.read_text()
    assert (
        f"training examples | {sum(one.clients[name]['train'] for name in one.line.last)} |"
        in shared.read_text()
    )
    made = export(tmp_path / "run", "peft", tmp_path / "out", client="x y")
    assert (
        f"training examples | {one.joined['x y']['train']} |"
        in (made / "clients" / file_name("x y") / "README.md").read_text()
    )
    said = CliRunner().invoke(
        app,
        ["generate", str(tmp_path / "run"), "A lamp?", "--client", "x y", "--max-new-tokens", "3"],
    )
    assert said.exit_code == 0, said.output


@pytest.mark.parametrize(
    "changes",
    [
        {
            "data": {"validation_fraction": 0.3},
            "evaluate_every": 1,
            "keep": "best",
            "stop": {"patience": 2},
        },
        {
            "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 0.01},
            "federation": {"weighting": "equal"},
            "algorithm": {"name": "feddpo", "local": LOCAL, "aggregate": "frozen-a"},
        },
    ],
    ids=["chosen", "private"],
)
def test_who_joins_is_held_to_nothing_of_the_runs_own_training(
    changes: dict[str, Any], settings: dict[str, Any], later: Path, tmp_path: Path
) -> None:
    whole = {**settings, "rounds": 1, **changes}
    whole["data"] = {**settings["data"], **changes.get("data", {})}
    result = run(config.parse(Experiment, whole, "test"), tmp_path / "run")
    assert list(personalize(result.path, Files(path=str(later)), steps=1)) == ["late"]


def test_a_form_of_its_own_is_read_again_unless_newcomers_rows_are_in_trls(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "posts.jsonl", tmp_path / "pairs.jsonl"
    scores = {"human_ref_A": "a", "human_ref_B": "b", "score_A": 2, "score_B": 1}
    ours.write_text(json.dumps({"history": "q", **scores}))
    theirs.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}))
    of_run = SHP(path="stanfordnlp/SHP", min_score_ratio=1.5)
    assert as_read(of_run, Files(path=str(ours))) == replace(of_run, path=str(ours))
    assert isinstance(as_read(of_run, Files(path=str(theirs))), Files)
    folders = [tmp_path / "posts", tmp_path / "pairs"]
    for folder, file in zip(folders, (ours, theirs), strict=True):
        folder.mkdir()
        (folder / "train.jsonl").write_text(file.read_text())
    assert as_read(of_run, Files(path=str(folders[0]))) == replace(of_run, path=str(folders[0]))
    assert isinstance(as_read(of_run, Files(path=str(folders[1]))), Files)
    skips = as_read(of_run, Files(path=str(ours), unusable="skip"))
    assert skips == replace(of_run, path=str(ours), unusable="skip")
    renamed = Files(path="x", chosen_column="better")
    assert as_read(renamed, Files(path=str(theirs))).chosen_column == "better"
    said = as_read(renamed, Files(path=str(theirs)), {"chosen_column"})
    assert said.chosen_column == "chosen", "what is said counts, though it is the default"


def test_a_file_has_no_split_to_evaluate(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    said = CliRunner().invoke(
        app, ["evaluate", str(tmp_path / "run"), "--data", str(file), "--split", "validation"]
    )
    assert isinstance(said.exception, UserError)
    assert "is one file, which has no splits" in str(said.exception)
