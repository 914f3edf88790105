"""Many clients: what each has is made when it is drawn, to the same bits, and forgotten again."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import leave, make_rows, write_rows
from fedpref import UserError
from fedpref.engines import many
from fedpref.engines.many import DrawnShards, opened
from fedpref.engines.per_client import Others, StoredValues
from fedpref.engines.values import Kept
from fedpref.experiments.experiment import encoded
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.run_directory import RunDirectory
from fedpref.numerics import trees
from fedpref.reports.page import write_report
from test_private_sites import Here, parsed, run_to

SLOW = pytest.mark.slow
MODULES = (
    "experiments.experiment",
    "experiments.clients",
    "experiments.evaluations",
    "engines.simulation",
    "engines.coordinator",
    "engines.site",
)


def take_for_many(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let more than so many clients be many."""
    for module in MODULES:
        monkeypatch.setattr(f"fedpref.{module}.MANY", count)


@pytest.fixture
def content(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([9, 8, 10, 8, 9, 8]))
    return deepcopy(
        {
            **settings,
            "data": {"name": "files", "path": str(rows), "test_fraction": 0.3},
            "federation": {"weighting": "equal", "clients_per_round": 2},
            "rounds": 3,
            "checkpoint_every": 1,
        }
    )


def tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    """All that a run's models are."""
    files = sorted(run.path.rglob("*.safetensors"))
    return {
        f"{file.relative_to(run.path)} {name}": tensor
        for file in files
        if "checkpoints" not in file.parts
        for name, tensor in trees.load(file).items()
    }


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "feddpo"},
        {"name": "scaffold"},
        pytest.param({"name": "fedpdpo"}, marks=SLOW),
        pytest.param({"name": "ditto"}, marks=SLOW),
    ],
    ids=lambda algorithm: algorithm["name"],
)
@pytest.mark.long
def test_what_is_made_when_drawn_is_what_it_was_from_the_beginning(
    algorithm: dict[str, Any],
    content: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = parsed(content, algorithm={**algorithm, "local": content["algorithm"]["local"]})
    whole = run_to(spec, tmp_path / "whole")
    take_for_many(3, monkeypatch)
    drawn = run_to(spec, tmp_path / "drawn")
    expected, found = tensors(whole), tensors(drawn)
    # of clients of their own those alone have a model who took part
    assert set(found) <= set(expected)
    assert any("adapter_model" in name for name in found)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert drawn.read_rows("evaluation.jsonl") == whole.read_rows("evaluation.jsonl")
    index = json.loads(
        max((drawn.path / "checkpoints").glob("round-*/values.json")).read_text(encoding="utf-8")
    )
    # a moment of nothing is no file, but it is named
    assert all(len(clients) < 6 for clients in index.values()), "who never took part has no state"


@pytest.mark.parametrize("name", ["scaffold", pytest.param("fedpdpo", marks=SLOW)])
@pytest.mark.long
def test_a_run_of_many_resumes_to_the_same_bits(
    name: str, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_for_many(3, monkeypatch)
    spec = parsed(content, algorithm={"name": name, "local": content["algorithm"]["local"]})
    whole = run_to(spec, tmp_path / "whole")
    leave(spec, tmp_path / "left", after=3)
    resumed = RunDirectory(tmp_path / "left")
    assert resumed.checkpoints()
    assert not resumed.done
    run_again(spec, resumed)
    expected, found = tensors(whole), tensors(resumed)
    assert set(found) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def run_again(spec: Any, directory: RunDirectory, transport: Any = None) -> None:
    from fedpref.experiments.rounds import events

    for _ in events(spec, directory, transport=transport):
        pass


def indexes(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Of each site its newest checkpoint's index, by field and client."""
    return [
        json.loads((max(site.rglob("round-*")) / "values.json").read_text(encoding="utf-8"))
        for site in sorted(folder.iterdir())
    ]


@pytest.mark.parametrize(
    "name",
    ["scaffold", pytest.param("fedpdpo", marks=SLOW)],
)
@pytest.mark.long
def test_a_site_of_many_makes_them_ready_when_they_are_drawn(
    name: str, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = parsed(
        content,
        algorithm={"name": name, "local": content["algorithm"]["local"]},
        evaluate_clients=2,
    )
    whole = run_to(spec, tmp_path / "whole", Here(tmp_path / "ready"))
    take_for_many(2, monkeypatch)
    drawn = run_to(spec, tmp_path / "drawn", Here(tmp_path / "sites"))
    expected, found = tensors(whole), tensors(drawn)
    assert set(found) <= set(expected)
    assert any("adapter_model" in name for name in found)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert drawn.read_rows("evaluation.jsonl") == whole.read_rows("evaluation.jsonl")
    exported = [file.parent.name for file in (tmp_path / "sites").rglob("clients/*/adapter_model*")]
    fields = indexes(tmp_path / "sites")
    took_part = {int(client) for one in fields for some in one.values() for client in some}
    assert 2 <= len(took_part) < 6
    wanted = {f"client-{i}" for i in took_part} if name == "fedpdpo" else set()
    assert set(exported) == wanted, "of those who took part"
    assert all(len(some) == 3 for one in indexes(tmp_path / "ready") for some in one.values())
    assert sum(len(some) for one in fields for some in one.values()) < 6 * len(fields[0])
    # what its clients keep goes on with what it was, and what they had in the beginning is made
    leave(spec, tmp_path / "left", 3, Here(tmp_path / "again"))
    resumed = RunDirectory(tmp_path / "left")
    assert not resumed.done
    run_again(spec, resumed, Here(tmp_path / "again"))
    found = tensors(resumed)
    assert set(found) == set(tensors(drawn))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.long
def test_a_client_of_a_site_whose_rows_cannot_be_used_falls_out_when_it_is_drawn(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows([9, 8, 10, 8, 9, 8])
    next(row for row in rows if row["client"] == "client-2")["chosen"] = " river" * 400
    path = write_rows(tmp_path / "long.jsonl", rows)
    take_for_many(2, monkeypatch)
    spec = parsed(
        content,
        data={**content["data"], "path": str(path), "unusable": "refuse"},
        federation={"weighting": "equal"},
        patience={"min_clients": 2},
    )
    run = run_to(spec, tmp_path / "run", Here(tmp_path / "sites"))
    rows = run.read_rows("metrics.jsonl")
    assert [(row["clients"], row["late"]) for row in rows] == [(5, 1)] * 3
    evaluated = run.read_rows("evaluation.jsonl")[-1]["clients"]
    assert evaluated.keys() == {f"client-{i}" for i in (0, 1, 3, 4, 5)}


def test_few_are_evaluated_the_same_ones_each_time(content: dict[str, Any], tmp_path: Path) -> None:
    spec = parsed(content, evaluate_clients=3, evaluate_every=1, evaluate_on_start=True)
    rows = run_to(spec, tmp_path / "few").read_rows("evaluation.jsonl")
    seen = [set(row["clients"]) for row in rows]
    assert len(seen) == 4
    assert all(some == seen[0] for some in seen)
    assert len(seen[0]) == 3
    spec = parsed(content, evaluate_clients=3, evaluate_every=1, evaluate_all_at_end=True)
    run = run_to(spec, tmp_path / "whole")
    rows = run.read_rows("evaluation.jsonl")
    assert [len(row["clients"]) for row in rows] == [3, 3, 6]
    assert set(rows[0]["clients"]) == seen[0]
    text = write_report([tmp_path / "few"], tmp_path / "page.html").read_text()
    assert "6 clients trained 3 of 3 rounds of feddpo, of which 3 were evaluated" in text


@pytest.mark.long
def test_the_page_of_many_shows_how_they_are_spread_and_who_is_far_out(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("charts", "page.tables"):
        monkeypatch.setattr(f"fedpref.reports.{module}.MOST", 3)
    monkeypatch.setattr("fedpref.reports.page.tables.EXTREME", 2)
    run = run_to(parsed(content, baselines=["alone"]), tmp_path / "run")
    text = write_report([run.path], tmp_path / "page.html").read_text()
    assert "The best and the worst of 6 clients" in text
    assert "Held-out pair accuracy, over clients" in text
    assert "Who gained by taking part, and who lost" in text
    values = {
        name: row["rewards/accuracies"]
        for name, row in run.read_rows("evaluation.jsonl")[-1]["clients"].items()
    }
    ranked = sorted(values, key=lambda name: (values[name], name))
    table = text[text.index("The best and the worst of") :]
    table = table[: table.index("</table>")]
    assert all(f"<th>{name}</th>" in table for name in (*ranked[:2], *ranked[-2:]))
    assert all(f"<th>{name}</th>" not in table for name in ranked[2:-2])


def test_who_never_took_part_has_no_model_of_its_own_and_that_is_said(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_for_many(3, monkeypatch)
    content |= {"federation": {"weighting": "equal", "clients_per_round": 1}, "rounds": 1}
    algorithm = {"name": "fedpdpo", "local": content["algorithm"]["local"]}
    run_to(parsed(content, algorithm=algorithm, evaluate_clients=2), tmp_path / "run")
    run = FinishedRun.at(tmp_path / "run")
    assert len(run.client_folders) == 1
    other = next(name for name in run.clients if name not in run.client_folders)
    with pytest.raises(UserError, match="has not taken part in a round"):
        run.model_folder(other)


@pytest.mark.parametrize(
    "changes",
    [
        {"secrecy": {"name": "masks"}},
        {
            "privacy": {
                "unit": "client",
                "noise_multiplier": 1.0,
                "delta": 0.01,
                "metrics": "private",
                "metrics_noise": 20.0,
            },
            "algorithm": {"name": "ffa-lora"},
            "federation": {"weighting": "equal"},
        },
    ],
)
def test_figures_of_all_are_not_of_a_few(changes: dict[str, Any], content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="evaluate_clients: figures that are private"):
        parsed(content, evaluate_clients=2, **changes)


def test_a_clients_shard_is_made_once_and_forgotten_when_others_came(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_for_many(3, monkeypatch)
    monkeypatch.setattr(many, "KEPT", 2)
    spec = parsed(content)
    task = spec.build_task()
    reading, shards = encoded(spec, task)
    assert isinstance(shards, DrawnShards)
    assert [shard.name for shard in shards] == [client.name for client in reading.clients]
    assert [len(shard) for shard in shards] == [len(client.train) for client in reading.clients]
    first = opened(shards[0])
    assert opened(shards[0]) is first
    assert first.train == task.encode(reading.clients[0]).train
    for i in (1, 2):
        opened(shards[i])
    assert opened(shards[0]) is not first
    assert shards[-1].name == reading.clients[-1].name
    assert [shard.name for shard in shards[:2]] == [c.name for c in reading.clients[:2]]
    with pytest.raises(IndexError):
        shards[len(shards)]


@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_a_row_that_cannot_be_used_is_found_when_its_client_is_drawn(
    policy: str, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows([9, 8, 10, 8, 9, 8])
    long = next(row for row in rows if row["client"] == "client-2")
    long["chosen"] = " river" * 400
    path = write_rows(tmp_path / "long.jsonl", rows)
    take_for_many(3, monkeypatch)
    data = {**content["data"], "path": str(path), "unusable": policy}
    spec = parsed(content, data=data)
    _, shards = encoded(spec, spec.build_task())
    assert len(opened(shards[0]).train) == len(shards[0])
    if policy == "skip":
        shard = opened(shards[2])
        assert len(shard.train) + len(shard.test) == 9
    else:
        with pytest.raises(UserError, match=r"client 'client-2': data: 1 of 10 rows cannot be"):
            opened(shards[2])


def test_values_that_are_made_when_asked_for_are_not_kept() -> None:
    made: list[int] = []

    def of(client: int) -> Kept:
        made.append(client)
        return Kept({"x": torch.tensor([float(client)])})

    column = StoredValues[Any](10**6, (), Others(range(100_000), of))
    assert float(column[70_000]["x"]) == 70_000
    newer = column | StoredValues[Any](10**6, [(5, Kept({"x": torch.tensor([0.5])}))])
    assert float(newer[5]["x"]) == 0.5
    assert float(newer[6]["x"]) == 6
    assert list(newer.kept) == [5]
    assert made == [70_000, 6]
    assert sum(1 for _ in newer) == 100_000
