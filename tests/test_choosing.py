"""Rows that are set aside to choose by: where they come from, and what they decide."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import leave, make_rows, write_rows
from fedpref import Experiment, UserError, config, resume, run
from fedpref.data import Files, Natural
from fedpref.data.reading import by_rule, read
from fedpref.experiments import rounds
from fedpref.experiments.choosing import Standing, standing
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import events, new_directory
from fedpref.experiments.run_directory import RunDirectory
from fedpref.numerics import trees
from fedpref.runs.sweep import plan
from test_private_sites import Here

METRIC = "rewards/accuracies"


def spec_of(settings: dict[str, Any], **changes: Any) -> Experiment:
    local = {**settings["algorithm"]["local"], "keep_optimizer": True}
    content = {
        **settings,
        "data": {**settings["data"], "validation_fraction": 0.3},
        "algorithm": {"name": "fedpdpo", "parts": {"head": None, "bottleneck": 0}, "local": local},
        "evaluate_every": 1,
        "rounds": 6,
    }
    return config.parse(Experiment, {**content, **changes}, "test")


def row(round: int, value: float, on: str = "validation", **more: Any) -> dict[str, Any]:
    summary = {METRIC: {"mean": value}, "loss": {"mean": value}}
    return {"round": round, "on": on, "summary": summary, **more}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return RunDirectory(path).read_rows("evaluation.jsonl")


def models(path: Path) -> dict[str, trees.Tree]:
    files = sorted(path.rglob("adapter_model.safetensors"))
    return {str(file.relative_to(path)): trees.load(file) for file in files}


# ---- the rows


def test_the_earliest_of_the_best_stands_and_only_validation_counts() -> None:
    rows = [row(1, 0.5), row(2, 0.7), row(3, 0.7), row(4, 0.9, on="test"), row(5, 0.6)]
    assert standing(rows, None) == Standing(best=2, since=2)
    assert standing(rows, "loss") == Standing(best=1, since=3), "a small loss is good"
    assert standing([row(3, 0.9, final=True)], None) == Standing(), "what came of it is no choice"
    with pytest.raises(UserError, match=r"stop.metric: evaluations do not measure 'accuracy'"):
        standing(rows, "accuracy")


def test_no_prompt_is_on_two_sides_and_the_test_stays_whatever_is_set_aside(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", make_rows([40, 30, 20]))
    plain = read(Files(path=str(path)), Natural(), 0)
    apart = read(Files(path=str(path), validation_fraction=0.3), Natural(), 0)
    chosen = read(Files(path=str(path), validation_fraction=0.3), Natural(), 0, (), "validation")
    for before, both, alone in zip(plain.clients, apart.clients, chosen.clients, strict=True):
        assert before.test == both.test
        assert set(map(id, both.validation)).isdisjoint(map(id, both.train))
        assert len(before.train) == len(both.train) + len(both.validation)
        assert {r.prompt for r in both.validation}.isdisjoint(r.prompt for r in both.train)
        assert (alone.train, alone.test) == (both.train, both.validation)
        assert 0.1 < len(both.validation) / len(before.train) < 0.5


def test_no_client_of_two_prompts_is_without_held_out_rows(tmp_path: Path) -> None:
    # of five prompts the rule holds out none for a third of such clients
    path = write_rows(tmp_path / "rows.jsonl", make_rows([5] * 8))
    source = Files(path=str(path), validation_fraction=0.1, split_seed=1)
    reading = read(source, Natural(), 0)
    assert all(one.train and one.test and one.validation for one in reading.clients)
    assert "clients have no held-out rows by the rule" in reading.notes[0]
    assert "clients have no validation rows by the rule" in reading.notes[1]
    forced = [
        one.name
        for one in reading.clients
        if not any(by_rule(r, source) for r in (*one.test, *one.validation))
    ]
    assert forced
    assert all(name in reading.notes[0] for name in forced)
    # who has held-out rows by the rule keeps just these
    mixed = write_rows(tmp_path / "mixed.jsonl", make_rows([60, 5]))
    large = next(c for c in read(Files(path=str(mixed)), Natural(), 0).clients if len(c.rows) > 5)
    assert all(by_rule(r, Files(path=str(mixed))) for r in large.test)


def test_who_comes_with_sides_has_something_to_choose_by_too(tmp_path: Path) -> None:
    rows = [{**row, "split": "train"} for row in make_rows([5] * 8)]
    tested = [{**row, "prompt": f"held out: {row['prompt']}", "split": "test"} for row in rows]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, *tested])
    for seed in range(4):
        source = Files(
            path=str(path), split_column="split", validation_fraction=0.1, split_seed=seed
        )
        reading = read(source, Natural(), 0)
        assert all(one.train and one.validation for one in reading.clients)
        assert all(len(one.test) == 5 for one in reading.clients), "sides that are given stay"
        assert "".join(reading.notes).count("have no validation rows by the rule") == 1


def test_nobody_is_left_without_training_rows_for_anothers_sake(tmp_path: Path) -> None:
    texts = {"chosen": " a", "rejected": " b", "split": "train"}
    pairs = [("A", "p1"), ("A", "p3"), ("B", "p1"), ("B", "p2"), ("C", "p2"), ("C", "p3")]
    rows = [{**texts, "prompt": f"{prompt}?", "client": client} for client, prompt in pairs]
    rows += [
        {**texts, "prompt": f"of {client}", "client": client, "split": "test"} for client in "ABC"
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for seed in range(30):
        source = Files(
            path=str(path), split_column="split", validation_fraction=0.001, split_seed=seed
        )
        # one prompt serves two of them, and another would be the last that somebody trains on
        with pytest.raises(UserError, match=r"1 of 3 clients have no validation rows \((A|B|C)\)"):
            read(source, Natural(), 0)
    more = [{**texts, "prompt": f"p4 of {client}", "client": client} for client in "ABC"]
    path = write_rows(tmp_path / "more.jsonl", [*rows, *more])
    for seed in range(30):
        source = replace(source, path=str(path), split_seed=seed)
        clients = read(source, Natural(), 0).clients
        assert all(one.train and one.validation for one in clients)


def test_a_client_of_one_prompt_is_named(tmp_path: Path) -> None:
    texts = {"chosen": " a", "rejected": " b", "client": "tiny"}
    rows = [*make_rows([30]), {"prompt": "one that the rule trains on 1", **texts}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        UserError, match=r"1 of 2 clients have no (held-out|training) rows \(tiny\)"
    ):
        read(Files(path=str(path)), Natural(), 0)


# ---- what they decide


def test_nothing_is_decided_by_the_tests_rows(settings: dict[str, Any]) -> None:
    for changes, said in (
        ({"data": settings["data"], "keep": "best"}, "keep: best: nothing is decided by the test"),
        ({"data": settings["data"], "stop": {}}, "stop: nothing is decided by the test"),
        ({"evaluate_every": 0, "stop": {}}, "stop: there is nothing to look at"),
    ):
        with pytest.raises(UserError, match=said):
            spec_of(settings, **changes)


@pytest.mark.long
def test_the_tests_rows_are_read_once_and_the_best_rounds_model_stands(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = spec_of(settings, keep="best", stop={"metric": "loss", "patience": 1})
    run(spec, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert [r["on"] for r in rows] == ["validation"] * (len(rows) - 1) + ["test"]
    looks, final = rows[:-1], rows[-1]
    losses = [r["summary"]["loss"]["mean"] for r in looks]
    assert final["kept"] == 1 + losses.index(min(losses))
    stopped = next((n for n in range(1, len(losses)) if min(losses[:n]) <= losses[n]), None)
    assert final["round"] == (6 if stopped is None else stopped + 1) == len(looks)
    # the run of as many rounds as were kept has the same models, and measures the same
    short = spec_of(settings, rounds=6)
    happenings = events(short, new_directory(short, tmp_path / "short"))
    while len(RunDirectory(tmp_path / "short").read_rows("metrics.jsonl")) < final["kept"]:
        next(happenings)
    happenings.close()
    kept = RunDirectory(tmp_path / "short").checkpoints()[-1]
    best = RunDirectory(tmp_path / "run").checkpoints()[-1]
    assert kept.name == f"round-{final['kept']:06d}"
    for file in kept.glob("*.safetensors"):
        one, other = trees.load(file), trees.load(best / file.name)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert FinishedRun.at(tmp_path / "run").last_evaluation == final


SLOW = pytest.mark.slow


@pytest.mark.parametrize("after", [pytest.param(2, marks=SLOW), 5, pytest.param(8, marks=SLOW)])
@pytest.mark.long
def test_a_run_that_chooses_ends_with_the_same_bits_wherever_it_was_left(
    after: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = spec_of(settings, keep="best", stop={"metric": "loss", "patience": 2})
    run(spec, tmp_path / "whole")
    leave(spec, tmp_path / "broken", after)
    resume(tmp_path / "broken")
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "broken")
    whole, broken = models(tmp_path / "whole"), models(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert any("clients" in name for name in whole)
    for name, tree in whole.items():
        assert all(torch.equal(tree[part], broken[name][part]) for part in tree)


@pytest.mark.long
def test_a_run_over_sites_that_chooses_is_taken_up_with_its_best_model(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """What is best has values of clients beside those of the last round."""
    spec = spec_of(settings, keep="best", stop={"metric": "loss", "patience": 2})
    whole = new_directory(spec, tmp_path / "whole")
    for _ in events(spec, whole, transport=Here(tmp_path / "sites")):
        pass
    leave(spec, tmp_path / "broken", 5, Here(tmp_path / "others"))
    broken = RunDirectory(tmp_path / "broken")
    for _ in events(spec, broken, transport=Here(tmp_path / "others")):
        pass
    assert rows_of(whole.path) == rows_of(broken.path)
    assert models(whole.path).keys() == models(broken.path).keys()
    ours, theirs = (
        {str(file.relative_to(folder)).split("/", 2)[2]: trees.load(file) for file in files}
        for folder in (tmp_path / "sites", tmp_path / "others")
        if (files := sorted(folder.rglob("clients/*/adapter_model.safetensors")))
    )
    assert ours.keys() == theirs.keys()
    for name, tree in ours.items():
        assert all(torch.equal(tree[part], theirs[name][part]) for part in tree)


@pytest.mark.parametrize("after", [0, 5])
def test_a_run_whose_clients_run_out_ends_with_its_best_model(
    after: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    most = {"federation": {"max_participations": 3}, "evaluate_every": 2, "rounds": 8}
    spec = spec_of(settings, keep="best", stop=None, baselines=[], **most)
    if after:
        leave(spec, tmp_path / "run", after)
        resume(tmp_path / "run")
    else:
        run(spec, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert (rows[-1]["ended"], rows[-1]["round"]) == ("nobody", 3)
    assert rows[-1]["kept"] == 2  # nobody looked after the third


def test_the_model_that_was_measured_is_exported_after_a_kill(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = spec_of(settings, keep="best", stop=None, baselines=[], evaluate_every=1, rounds=3)
    run(spec, tmp_path / "run")
    # as where a budget that is spent ends a run that goes on: no checkpoint is written of the end
    (tmp_path / "run/done").unlink()
    rows = rows_of(tmp_path / "run")
    written = [*rows[:-1], {**rows[-1], "unkept": True}]
    (tmp_path / "run/evaluation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in written))
    last = sorted((tmp_path / "run/checkpoints").glob("round-*"))[-1]
    best = trees.load(last / "best_adapter.safetensors")
    trees.save({name: tensor + 1 for name, tensor in best.items()}, last / "adapter.safetensors")
    resume(tmp_path / "run")
    exported = trees.load(tmp_path / "run/adapter/adapter_model.safetensors")
    totals = [sum(float(t.sum()) for t in tree.values()) for tree in (exported, best)]
    assert totals[0] == pytest.approx(totals[1], abs=1e-3)


def test_newcomers_that_have_joined_are_exported_after_a_kill(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"algorithm": {"name": "fedper", "local": settings["algorithm"]["local"]}}
    late = {"federation": {"newcomers": 1, "join_steps": 2}, "rounds": 2, "evaluate_every": 1}
    spec = spec_of({**settings, **own}, keep="best", stop=None, baselines=[], **late)
    run(spec, tmp_path / "whole")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "export_models", stop)
        with pytest.raises(KeyboardInterrupt):
            run(spec, tmp_path / "killed")
    resume(tmp_path / "killed")
    whole, killed = (tmp_path / name / "clients" for name in ("whole", "killed"))
    files = sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors"))
    assert files
    for file in files:
        assert (whole / file).read_bytes() == (killed / file).read_bytes(), file


def test_a_line_that_has_stopped_does_not_go_on(settings: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(settings, stop={"metric": METRIC, "patience": 1}, rounds=12)
    run(spec, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["round"] < 12
    # killed after its last checkpoint, before it was done
    (tmp_path / "run/done").unlink()
    resume(tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows
    assert (tmp_path / "run/done").exists()


def test_each_seed_of_a_sweep_has_a_split_of_its_own(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(config.parse(Experiment, settings, "test")))

    def splits(*overrides: str, **options: Any) -> list[int]:
        runs = plan(file, ["feddpo", "fedprox"], range(3), overrides, tmp_path, **options)
        return [one.data.split_seed for one in runs.values()]

    assert splits() == [0, 1, 2, 0, 1, 2]
    assert splits("data.split_seed=7") == [7] * 6
    assert splits(redraws=False) == [0] * 6
