"""What one calls from Python: rows in memory, objects, events, and a result that shows itself."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas
import pytest
import torch

import fedpref
from conftest import make_rows, write_rows
from fedpref import Event, Experiment, UserError, config, resume, run
from fedpref.algorithms import FedDPO, FedPDPO
from fedpref.data import Files
from fedpref.engines.workers import one_thread
from fedpref.federation.local_training import LocalTraining
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.reports import python

ROWS = make_rows([12, 10])
LOCAL = LocalTraining(steps=2, batch_size=2)


@pytest.fixture
def small(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Settings of a short run on the tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return {"model": settings["task"]["model"]["path"], "rounds": 1}


def split(rows: list[dict[str, Any]]) -> datasets.DatasetDict:
    parts = {"train": rows[::2], "test": rows[1::2]}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    )


@pytest.mark.long
def test_rows_in_memory_come_to_what_the_same_file_comes_to(small: dict[str, Any]) -> None:
    file = write_rows(Path("rows.jsonl"), ROWS)
    settings = small | {"algorithm": {"name": "feddpo", "local": {"steps": 1, "batch_size": 2}}}
    expected = run(data=file, output="file", **settings)
    for name, data in (
        ("list", ROWS),
        ("frame", pandas.DataFrame(ROWS)),
        ("dataset", datasets.Dataset.from_list(ROWS)),
        ("source", Files(path=str(file))),
    ):
        result = run(data=data, output=name, **settings)
        assert result.evaluations == expected.evaluations, name
    splits = run(data=split(ROWS), output="splits", **settings)
    counts = fedpref.FinishedRun.at("splits").clients.values()
    assert sum(about["train"] for about in counts) == 11
    assert splits.evaluations.keys() == {"feddpo"}


def test_data_keep_what_an_experiment_says_of_how_they_are_read(small: dict[str, Any]) -> None:
    rows = [{"question": row.pop("prompt"), **row} for row in map(dict, ROWS)]
    file = write_rows(Path("rows.jsonl"), rows)
    how = {"name": "files", "path": "elsewhere.jsonl", "prompt_column": "question"}
    local = {"algorithm": {"name": "feddpo", "local": {"steps": 1, "batch_size": 2}}}
    read = {**how, "test_fraction": 0.6}
    run({"data": {**read, "path": str(file)}, **local}, output="config", **small)
    expected = fedpref.FinishedRun.at("config").clients
    run({"data": {**how, "path": str(file)}, **local}, output="plain", **small)
    assert fedpref.FinishedRun.at("plain").clients != expected
    of_a_dataset = {**read, "config": "en", "train_split": "all", "test_split": "rest"}
    for name, data in (("file", file), ("list", rows)):
        run({"data": of_a_dataset, **local}, data=data, output=name, **small)
        assert fedpref.FinishedRun.at(name).clients == expected, name


def test_models_are_loaded_by_one_thread_at_a_time(small: dict[str, Any]) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: LanguageModel(Model(path=small["model"])), range(8)))
    assert len({model.fingerprint for model in made}) == 1


def test_a_run_of_rows_in_memory_is_whole_and_can_be_moved(small: dict[str, Any]) -> None:
    seen: list[Event] = []

    class Stop(Exception):  # noqa: N818
        pass

    def stop(event: Event) -> None:
        seen.append(event)
        if event.kind == "round":
            raise Stop

    with pytest.raises(Stop):
        run(data=ROWS, output="first", on_event=stop, algorithm=FedPDPO(local=LOCAL), **small)
    assert [event.kind for event in seen] == ["begin", "round"]
    shutil.move("first", "moved")
    result = resume("moved", progress=True)
    assert result.evaluations.keys() == {"fedpdpo"}
    assert [json.loads(line) for line in Path("moved/rows.jsonl").open()] == ROWS


def test_settings_are_plain_values_or_objects(small: dict[str, Any]) -> None:
    model = Model(path=small["model"], lora_r=2)
    algorithm = FedPDPO(local=LOCAL, adapter_rate=0.25)
    result = run(
        {"name": "mine", "seed": 3},
        data=ROWS,
        model=model,
        algorithm=algorithm,
        rounds=1,
        baselines=["alone"],
        output="out",
    )
    spec = fedpref.FinishedRun.at(result.path).experiment
    assert (spec.name, spec.seed, spec.rounds, spec.baselines) == ("mine", 3, 1, ("alone",))
    assert spec.algorithm == algorithm
    assert spec.task.model == model  # type: ignore[union-attr]
    assert config.dump(Experiment.of(config.dump(spec))) == config.dump(spec)


def test_keys_and_values_change_what_an_experiment_says_of_its_model(small: dict[str, Any]) -> None:
    local = {"algorithm": {"name": "feddpo", "local": {"steps": 1, "batch_size": 2}}, "rounds": 1}
    said = {"task": {"name": "preference", "model": {"path": small["model"], "lora_r": 2}}}
    result = run({**said, **local}, data=ROWS, model={"lora_alpha": 4}, output="out")
    model = fedpref.FinishedRun.at(result.path).experiment.task.model
    assert (model.path, model.lora_r, model.lora_alpha) == (small["model"], 2, 4)


def test_keys_and_values_change_what_a_config_says_and_nothing_beside() -> None:
    spec = Experiment.load("fedpdpo")
    told = python._with(spec, None, {"algorithm": {"local": {"steps": 2}}})
    assert told == Experiment.load("fedpdpo", ["algorithm.local.steps=2"])
    told = python._with(spec, None, {"algorithm": "ditto", "federation": {"join_steps": 4}})
    assert told == Experiment.load("fedpdpo", ["algorithm=ditto", "federation.join_steps=4"])
    local = LocalTraining(steps=2)
    told = python._with(spec, None, {"algorithm": {"local": local}, "seed": 3})
    assert (told.algorithm.name, told.algorithm.local, told.seed) == ("fedpdpo", local, 3)
    task = {"task": {"model": Model(path="builtin", lora_r=2)}}
    assert python._with(spec, None, task).task.model == task["task"]["model"]  # type: ignore[union-attr]
    # what looks like a reference is text
    named = python._with(replace(spec, name="${seed}"), None, {"seed": 3})
    assert (named.name, named.seed) == ("${seed}", 3)
    # an object stands in the place of what was there
    assert python._with(spec, None, {"algorithm": FedDPO()}).algorithm == FedDPO()


def test_rows_may_hold_numbers_of_numpy_and_dates() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "client": np.int64(3)}
    text, _ = python._lines([{**row, "day": date(2024, 1, 2)}])
    assert json.loads(text) == {**row, "client": 3, "day": "2024-01-02"}
    frame = pandas.DataFrame([{**row, "day": pandas.Timestamp("2024-01-02")}])
    assert json.loads(python._lines(frame)[0])["day"].startswith("2024-01-02")
    table = datasets.Dataset.from_list([{**row, "client": 3}]).with_format("numpy")
    assert json.loads(python._lines(table)[0])["client"] == 3
    with pytest.raises(UserError, match="row 1: cannot be written as JSON"):
        python._lines([{**row, "client": object()}])


def test_the_packages_names_are_listed() -> None:
    assert {"run", "Experiment", "Result"} <= set(dir(fedpref))


def test_threads_that_compute_at_once_leave_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    inside, out = threading.Event(), threading.Event()

    def other() -> None:
        with one_thread():
            inside.set()
            out.wait()

    torch.set_num_threads(2)
    thread = threading.Thread(target=other)
    with one_thread():
        thread.start()
        inside.wait()
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    out.set()
    thread.join()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2, "also where threads come later"
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_model_stands_beside_what_is_said_of_the_task(small: dict[str, Any]) -> None:
    task = {"task": {"loss": {"name": "ipo"}}}
    for model, rank in (({"lora_r": 2}, 2), (small["model"], 8)):
        spec: Any = python._with(Experiment(), model, task)
        assert (spec.task.loss.name, spec.task.model.lora_r) == ("ipo", rank)
    assert spec.task.model.path == small["model"]
    with pytest.raises(UserError, match="task says a model too"):
        python._with(Experiment(), "x", {"task": {"model": {"path": "y"}}})


def test_who_keeps_a_callbacks_error_does_not_keep_the_runs_lock(small: dict[str, Any]) -> None:
    def fail(event: Event) -> None:
        if event.kind == "round":
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as kept:
        run(data=ROWS, output="out", on_event=fail, algorithm=FedDPO(local=LOCAL), **small)
    assert kept.value.__traceback__ is not None
    assert resume("out").evaluations


@pytest.mark.long
def test_a_result_shows_itself(small: dict[str, Any]) -> None:
    result = run(
        data=ROWS, output="out", algorithm=FedPDPO(local=LOCAL), baselines=["alone"], **small
    )
    table = result.table()
    assert set(table["line"]) == {"fedpdpo", "alone"}
    assert len(table) == 4
    row = table[(table["line"] == "fedpdpo") & (table["client"] == "client-0")].iloc[0]
    assert row["rewards/accuracies"] == pytest.approx(
        result.evaluations["fedpdpo"]["client-0"]["rewards/accuracies"]
    )
    assert row["train"] + row["test"] == 12
    page = result._repr_html_()
    assert "<td>client-0</td>" in page
    assert "fedpdpo" in page
    rounds = result.rounds("alone")
    assert list(rounds["round"]) == [1]
    assert rounds["loss"][0] > 0
    with pytest.raises(UserError, match="its lines are fedpdpo, alone"):
        result.rounds("pooled")
    both = fedpref.report([result, "out"], "both.html")
    assert "fedpdpo" in both.read_text()
    assert result.report("page.html").read_text().startswith("<!DOCTYPE html>")
    assert list(result.models) == ["client-0", "client-1"]
    from transformers import AutoTokenizer

    model = result.models["client-0"]
    encoded = AutoTokenizer.from_pretrained(small["model"])("one", return_tensors="pt")
    assert model.generate(**encoded, max_new_tokens=2).shape[1] > encoded["input_ids"].shape[1]
    with pytest.raises(KeyError, match="nobody"):
        result.models["nobody"]
    assert python.Result.at("out") == replace(result)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "there is no row"),
        ([1], "row 1: expected a dict"),
        ([{"prompt": "q", "chosen": {1}, "rejected": "b"}], "row 1: cannot be written as JSON"),
        ([{"prompt": "q"}], "client"),
        ([{"prompt": "half \ud83d", "chosen": "a", "rejected": "b"}], "row 1: cannot be written"),
        ({"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]}, "Dataset.from_dict"),
        (pandas.DataFrame([["q", "a"]], columns=["prompt", "prompt"]), "cannot be written"),
        (3, "expected a list of dicts"),
    ],
)
def test_rows_that_are_none_leave_nothing_behind(
    data: Any, says: str, small: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=says):
        run(data=data, output="out", **small)
    assert not list(Path().iterdir())


def test_a_mistake_before_anything_is_measured_leaves_no_run(small: dict[str, Any]) -> None:
    private = {
        "algorithm": {"name": "feddpo", "aggregate": "frozen-a"},
        "federation": {"weighting": "equal"},
        "privacy": {"unit": "client", "against": "coordinator", "epsilon": 8, "delta": 0.01},
    }
    masks = {"secrecy": {"name": "masks", "min_sites": 2}}
    with pytest.raises(UserError, match="in one process there is no coordinator"):
        run({**private, **masks}, data=ROWS, output="out", **small)
    assert not list(Path().iterdir())
    # what lay there is nobody's to remove
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run({"algorithm": {"name": "feddpo"}}, data=ROWS, output="mine", **small)
    assert [file.name for file in Path("mine").iterdir()] == ["notes.txt"]


def test_too_many_rows_are_not_copied(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python, "MOST_MB", 1e-4)

    with pytest.raises(UserError, match="Write them to a file"):
        run(data=ROWS, output="out", **small)
    assert not Path("out").exists()


def test_objects_that_do_not_fit_are_refused_before_anything_is_trained(
    small: dict[str, Any],
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Here(FedDPO):
        """One that no run's config can name."""

        name: Literal["here"] = "here"

    mistakes: dict[str, Callable[[], Any]] = {
        "<locals>.Here'; expected one of": lambda: run(
            data=ROWS, output="out", **{**small, "algorithm": Here()}
        ),
        "algorithm: expected an object such as FedDPO": lambda: run(
            data=ROWS, output="out", **{**small, "algorithm": FedDPO}
        ),
        "found the class FedDPO": lambda: Experiment(algorithm=FedDPO),  # type: ignore[arg-type]
        "data: expected an object such as": lambda: Experiment(data=ROWS),  # type: ignore[arg-type]
        "algorithm.local: expected an object such as LocalTraining": lambda: Experiment(
            algorithm=FedDPO(local={"steps": 1})  # type: ignore[arg-type]
        ),
        "Experiment.of": lambda: Experiment.load({"rounds": 1}),  # type: ignore[arg-type]
    }
    for says, mistake in mistakes.items():
        with pytest.raises(UserError, match=re.escape(says)):
            mistake()
    assert not Path("out").exists()


def test_mistakes_are_found_before_anything_is_written(small: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="unknown key 'round'"):
        run(data=ROWS, output="out", round=3, **small)
    with pytest.raises(UserError, match="no such config file"):
        run("nothing", output="out")
    assert not Path("out").exists()
