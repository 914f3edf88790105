"""Studies by the same rules for all methods."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedpref import UserError
from fedpref.bench.leaderboard import board, read_submission, submission, write_tables
from fedpref.bench.suites import SUITES, DataSet, Suite, suite_of, with_methods
from fedpref.bench.trials import COSTS, Study
from fedpref.cli import app
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.run_directory import DONE, RunDirectory
from fedpref.experiments.run_files import METRICS
from fedpref.reports.comparison import compare
from fedpref.runs.sweep import parse_variant

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def study(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("bench")
    config = folder / "small.yaml"
    content = {**settings, "partition": {"name": "natural", "column": "client"}, "rounds": 1}
    config.write_text(json.dumps(content))
    suite = Suite(
        "small",
        "a test",
        (DataSet("rows", str(config), ("task.samples=0",)),),
        ("feddpo", "alone"),
        rates=("1e-3", "2e-2"),
        seeds=2,
    )
    return Study(suite, folder / "out")


@pytest.fixture(scope="module")
def done(study: Study) -> Study:
    for _ in study.carry_out():
        pass
    return study


@pytest.mark.long
def test_trials_are_on_validation_prompts_and_the_run_on_the_tests(done: Study) -> None:
    (data,) = done.suite.sets
    trials = done.trials(data, "alone", 1)
    assert [one.evaluate_on for one in trials.values()] == ["validation"] * 2
    assert {one.algorithm.local.learning_rate for one in trials.values()} == {1e-3, 2e-2}
    path, run = done.run(data, "alone", 1)
    assert run.evaluate_on == "test"
    means = {
        one.algorithm.local.learning_rate: FinishedRun.at(path).last_evaluation["summary"][
            "rewards/accuracies"
        ]["mean"]
        for path, one in trials.items()
    }
    assert run.algorithm.local.learning_rate == max(means, key=lambda rate: means[rate])
    assert FinishedRun.at(path).experiment.seed == 1


@pytest.mark.long
def test_each_seed_has_a_split_of_its_own_that_methods_share(done: Study) -> None:
    (data,) = done.suite.sets
    held_out = {}
    for seed in range(2):
        for method in done.methods:
            spec = FinishedRun.at(done.run(data, method, seed)[0]).experiment
            clients = spec.read().settled().clients
            held_out[seed, method] = {row.prompt for one in clients for row in one.test}
            tried = next(iter(done.trials(data, method, seed).values()))
            seen = {row.prompt for one in tried.read().settled().clients for row in one.rows}
            aside = {row.prompt for one in tried.read().settled().clients for row in one.test}
            assert aside & held_out[seed, method] == set(), "the test's prompts decide nothing"
            assert seen
    assert held_out[0, "feddpo"] == held_out[0, "alone"] != held_out[1, "feddpo"]


@pytest.mark.long
def test_what_is_done_is_not_done_again_and_a_budget_ends_it(done: Study, tmp_path: Path) -> None:
    assert list(done.carry_out()) == []
    fresh = replace(done, output=tmp_path / "none")
    assert list(fresh.carry_out(hours=0.0)) == ["0 hours are over; the same command goes on."]
    with pytest.raises(UserError, match="no seed has all of its methods"):
        submission(fresh)
    assert done.planned() == 2 * 2 * 3
    assert done.has_begun
    assert not fresh.has_begun


@pytest.mark.long
def test_a_run_without_its_baselines_is_not_done(done: Study, tmp_path: Path) -> None:
    shutil.copytree(done.output, tmp_path / "study")
    again = replace(done, output=tmp_path / "study")
    (data,) = done.suite.sets
    first = again.output / data.name / "feddpo/seed-0"
    left = first / "baselines/length"
    shutil.rmtree(left)
    list(again.carry_out())
    assert (left / "done").exists()
    assert FinishedRun.at(first).is_finished


@pytest.mark.long
def test_a_study_is_estimated_before_it_begins_and_measured_as_it_goes(done: Study) -> None:
    guess = done.expected()
    twice = replace(done, suite=replace(done.suite, seeds=4)).expected()
    assert twice.bytes == 2 * guess.bytes
    assert guess.seconds > 0
    (data,) = done.suite.sets
    rounds = RunDirectory(done.run(data, "feddpo", 0)[0]).read_rows(METRICS)
    sent = sum(row["bytes_up"] + row["bytes_down"] for row in rounds)
    assert guess.bytes == pytest.approx(done.planned() * sent, rel=0.05), "but for headers"
    costs = done.costs(data)
    runs = {f"{method}/seed-{seed}" for method in done.methods for seed in range(2)}
    assert {name for name in costs if not name.startswith("trials/")} == runs
    assert len(costs) == done.planned()
    assert all(costs.values())
    write_tables(done)
    own = read_submission(done.output / "bench.json")["sets"]["rows"]["methods"]["alone"]
    assert own["processor_seconds"] == sum(costs[f"alone/seed-{seed}"] or 0 for seed in (0, 1)) / 2
    seconds = f"{own['processor_seconds']:,.0f}"
    (line,) = [
        line
        for line in (done.output / "bench.md").read_text().splitlines()
        if line.startswith("| alone") and line.count("|") == 6
    ]
    assert line.split("|")[4].strip() == seconds


@pytest.mark.long
def test_a_seed_counts_when_all_of_its_methods_are_done(done: Study, tmp_path: Path) -> None:
    half = replace(done, output=tmp_path / "half")
    happened = half.carry_out()
    for _ in range(3):  # both methods of one seed, and one of the next
        next(happened)
    happened.close()
    (data,) = done.suite.sets
    assert RunDirectory(half.output / "rows" / "feddpo" / "seed-1").done
    assert [row.seeds for row in compare([half.output / data.name])] == [1, 1]


@pytest.mark.long
def test_what_is_sent_in_is_of_the_study_that_is_asked_for(done: Study) -> None:
    other = replace(done, overrides=("rounds=2",))
    with pytest.raises(UserError, match="there is a run of other settings here"):
        submission(other)
    more = replace(done.suite, methods=("feddpo", "ditto"))
    with pytest.raises(UserError, match="no seed has all of its methods yet"):
        submission(replace(done, suite=more))
    assert submission(done)["sets"]["rows"]["methods"].keys() == {"feddpo", "alone"}


@pytest.mark.long
def test_tables_and_the_file_to_send_in_say_what_comparing_says(done: Study) -> None:
    written = write_tables(done)
    assert all(path.is_file() for path in written)
    found = read_submission(done.output / "bench.json")
    rows = {row.name: row for row in compare([done.output / "rows"])}
    for name, own in found["sets"]["rows"]["methods"].items():
        assert own["mean"] == rows[name].mean
        assert own["seeds"] == 2
        assert set(own["rates"]) <= {1e-3, 2e-2}
    assert set(found["sets"]["rows"]["free"]) >= {"words-alone", "length"}
    text = board([done.output / "bench.json"])
    first, second = [line for line in text.splitlines() if "[" in line or "bench" in line][:2]
    means = [float(line.split("|")[2].split()[0]) for line in (first, second)]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 3}', '{"format": "3", "suite": "x"}', "[" * 10**5]
)
def test_what_was_not_written_by_bench_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "sent.json"
    file.write_text(content)
    with pytest.raises(UserError, match="no file of `fedpref bench`"):
        board([file])


def test_a_file_of_another_format_says_so(tmp_path: Path) -> None:
    (tmp_path / "sent.json").write_text('{"format": 1, "suite": "x"}')
    with pytest.raises(UserError, match="its format is 1, and this fedpref reads 3"):
        board([tmp_path / "sent.json"])


@pytest.mark.long
def test_a_run_of_other_settings_is_not_taken_for_this_one(done: Study) -> None:
    with pytest.raises(UserError, match="there is a run of other settings here"):
        next(replace(done, overrides=("rounds=2",)).carry_out())


@pytest.mark.long
def test_what_a_killed_session_took_is_not_known(done: Study, tmp_path: Path) -> None:
    killed = replace(done, output=tmp_path / "killed")
    (data,) = done.suite.sets
    happened = killed.carry_out()
    next(happened)
    happened.close()
    file = killed.output / data.name / COSTS
    path, _ = killed.run(data, "feddpo", 0)
    (path / DONE).unlink()  # as a kill before its end leaves it
    file.write_text(json.dumps({**killed.costs(data), "feddpo/seed-0": None}))
    for _ in killed.carry_out():
        pass
    assert RunDirectory(path).done
    write_tables(killed)
    methods = read_submission(killed.output / "bench.json")["sets"]["rows"]["methods"]
    assert methods["feddpo"]["processor_seconds"] is None
    assert methods["alone"]["processor_seconds"] is not None


@pytest.mark.long
@pytest.mark.long
def test_names_in_a_file_that_was_sent_in_are_no_markup(done: Study, tmp_path: Path) -> None:
    write_tables(done)
    content = json.loads((done.output / "bench.json").read_text())
    methods = content["sets"]["rows"]["methods"]
    methods["<script>|x\n\x1b[2J"] = methods.pop("alone")
    (tmp_path / "sent.json").write_text(json.dumps(content))
    text = board([tmp_path / "sent.json"])
    assert "<script>" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("name", sorted(SUITES))
@pytest.mark.long
def test_every_set_and_method_of_a_suite_is_an_experiment(name: str, tmp_path: Path) -> None:
    suite = suite_of(name)
    for data in suite.sets:
        for text in suite.methods:
            method, settings = parse_variant(text)
            spec = Experiment.load(
                Path(data.config), [*data.overrides(tmp_path), *settings, "baselines=[]"]
            )
            assert method.startswith(spec.algorithm.name)
            assert replace(spec, baselines=suite.free).baselines == suite.free


def test_what_pools_data_sees_as_many_pairs_as_all_clients(study: Study, tmp_path: Path) -> None:
    more = "pooled: algorithm.local.gradient_accumulation_steps=5"
    for methods, batches in ((("feddpo", "pooled"), 4), (("feddpo", more), 5)):
        own = Study(replace(study.suite, methods=methods), tmp_path / "study")
        (data,) = own.suite.sets
        (first, *_) = own.trials(data, "pooled", 0).values()
        assert len(first.clients()[0]) == 4
        assert first.algorithm.local.gradient_accumulation_steps == batches


def test_the_board_in_the_documents_is_that_of_the_files_beside_it() -> None:
    files = sorted((DOCS / "benchmark").glob("*.json"))
    assert files
    assert board(files).strip() in (DOCS / "benchmark.md").read_text()


def test_methods_of_ones_own_stand_beside_the_first() -> None:
    suite = with_methods(suite_of("quick"), ["alone", "slow: algorithm.name=feddpo rounds=9"])
    assert suite.methods == ("feddpo", "alone", "slow: algorithm.name=feddpo rounds=9")
    other = with_methods(suite_of("quick"), ["alone", "feddpo: algorithm.local.steps=9"])
    assert other.methods == ("feddpo: algorithm.local.steps=9", "alone")
    with pytest.raises(UserError, match="alone: it is there twice"):
        with_methods(suite_of("quick"), ["alone", "alone: rounds=9"])
    with pytest.raises(UserError, match="no such suite"):
        suite_of("quickly")


def test_a_method_that_cannot_be_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    suite = with_methods(suite_of("quick"), ["alone", "fedsomething"])
    with pytest.raises(UserError, match=r"algorithm\.name is 'fedsomething'"):
        next(Study(suite, tmp_path / "study").carry_out())
    assert not (tmp_path / "study").exists()
    found = CliRunner().invoke(app, ["bench", "quick", "--method", "fedsomething"])
    assert isinstance(found.exception, UserError)
    assert "By a step" not in found.output


def test_the_command_refuses_a_set_that_the_suite_lacks() -> None:
    found = CliRunner().invoke(app, ["bench", "quick", "--only", "nothing"])
    assert isinstance(found.exception, UserError)
    assert "has no such set" in str(found.exception)
