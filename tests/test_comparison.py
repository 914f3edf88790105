"""Sweeps and comparisons: what is run, what is resumed, and what the intervals mean."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from fedpref import Experiment, UserError
from fedpref.numerics.intervals import interval
from fedpref.reports.comparison import compare
from fedpref.reports.comparison_tables import cells, csv_text, markdown, notes, table
from fedpref.runs import sweep as sweep_module
from fedpref.runs.sweep import (
    parse_variant,
    plan,
    side_by_side,
    sweep,
    with_former,
    with_grid,
    write_plan,
)


def finished(
    path: Path,
    name: str,
    seed: int,
    accuracies: dict[str, float],
    data: str = "",
    later: float | None = None,
    metric: str = "rewards/accuracies",
    **settings: Any,
) -> Path:
    """A run directory with just what a comparison reads."""
    path.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create({"name": name, "seed": seed, **settings}), path / "config.yaml")

    def measured(value: float | None) -> dict[str, float | None]:
        return {metric: value, "num_examples": 9.0}

    rows = {client: measured(value) for client, value in accuracies.items()}
    newcomers = {"newcomers_before": {"n": measured(0.5)}, "newcomers": {"n": measured(later)}}
    (path / "evaluation.jsonl").write_text(
        json.dumps({"round": 2, "clients": rows, "summary": {}, **(newcomers if later else {})})
        + "\n"
    )
    (path / "clients.json").write_text(
        json.dumps(
            {client: {"digest": data + client, "train": 9, "test": 9} for client in accuracies}
        )
    )
    (path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"round": r, "bytes_up": 10, "bytes_down": 30, "seconds": s}) + "\n"
            for r, s in ((1, 1.0), (2, 3.0))
        )
    )
    (path / "done").touch()
    return path


def test_gains_are_paired_over_seeds_and_clients(tmp_path: Path) -> None:
    paths = [
        finished(tmp_path / f"a{s}", "plain", s, {"x": 0.5 + 0.1 * s, "y": 0.9 - 0.1 * s})
        for s in (0, 1, 2)
    ]
    paths += [
        finished(tmp_path / f"b{s}", "better", s, {"x": 0.6 + 0.1 * s, "y": 0.92 - 0.1 * s})
        for s in (2, 1, 0)
    ]
    plain, better = compare(paths)
    assert (plain.name, plain.seeds, plain.gain) == ("plain", 3, None)
    gains = np.array([[10.0, 2.0]] * 3)  # alike with every seed, so that clients are the draws
    assert better.gain == pytest.approx((6.0, *interval(gains)))
    assert plain.mean == pytest.approx(70.0)
    assert plain.interval[0] < 70 < plain.interval[1]
    assert (plain.worst, plain.bytes_per_round, plain.seconds_per_round) == (
        pytest.approx((50 + 60 + 70) / 3),
        40.0,
        2.0,
    )
    assert markdown([plain, better]).splitlines()[3].startswith("| better | 3 | 76.0 [")
    records = list(csv.DictReader(io.StringIO(csv_text([plain, better]))))
    assert [float(record["mean"]) for record in records] == pytest.approx([70.0, 76.0])
    assert records[0]["gain"] == ""


@pytest.mark.parametrize(
    ("partition", "names", "crossed"),
    [
        ({"name": "natural"}, "xyz", True),
        ({"name": "natural", "clients_per_value": 2}, "xyz", False),
        ({"name": "iid"}, "xyz", False),
        ({"name": "natural"}, None, False),
    ],
)
def test_a_client_stays_itself_where_a_seed_holds_other_rows_out(
    partition: dict[str, Any], names: str | None, crossed: bool, tmp_path: Path
) -> None:
    values = np.array([[50.0, 60.0, 85.0], [52.0, 58.0, 88.0], [51.0, 62.0, 84.0]])
    paths = [
        finished(
            tmp_path / str(s),
            "a",
            s,
            dict(zip(names or f"{s}xy", (of_seed / 100).tolist(), strict=True)),
            data=str(s),
            partition=partition,
        )
        for s, of_seed in enumerate(values)
    ]
    (row,) = compare(paths)
    low, high = interval(values, crossed=crossed)  # of few seeds beyond what a share can be
    assert row.interval == pytest.approx((max(low, 0.0), min(high, 100.0)))
    # clients differ much more than seeds do, of which the narrow one knows nothing
    assert (row.interval[1] - row.interval[0] > 40) == crossed


def test_a_single_value_has_no_interval_and_newcomers_have_a_column(tmp_path: Path) -> None:
    rows = compare(
        [
            finished(tmp_path / "a", "a", 0, {"x": 0.5}, later=0.75),
            finished(tmp_path / "b", "b", 0, {"x": 0.6}, later=0.7),
        ]
    )
    assert rows[0].newcomers == (50.0, 75.0)
    text = markdown(rows).splitlines()
    assert text[2].startswith("| a | 1 | 50.0 |  |")
    assert text[3].startswith("| b | 1 | 60.0 | +10.0 |")
    assert text[3].endswith("| 50.0 to 70.0 |")


def test_runs_that_differ_by_more_than_their_seeds_are_said_to(tmp_path: Path) -> None:
    values = {"a": 0.5, "b": 0.6}
    fast = {"algorithm": {"name": "feddpo", "local": {"learning_rate": 0.1}}}
    paths = [
        finished(tmp_path / "one", "x", 0, values, algorithm={"name": "feddpo"}),
        finished(tmp_path / "two", "x", 1, values, rounds=9, **fast),
    ]
    (row,) = compare(paths)
    assert row.differs == ("algorithm.local.learning_rate", "rounds")
    assert "differ by more than their seeds" in notes([row])[0]
    paths.append(finished(tmp_path / "three", "x", 2, values, algorithm={"name": "alone"}))
    with pytest.raises(UserError, match="its seeds"):
        compare(paths)
    same = finished(tmp_path / "four", "x", 0, values, algorithm={"name": "alone"})
    assert [row.name for row in compare([paths[0], same])] == ["one", "four"]


def test_a_model_that_has_changed_between_runs_is_no_longer_the_one(tmp_path: Path) -> None:
    paths = [finished(tmp_path / name, name, 0, {"a": 0.5, "b": 0.6}) for name in ("one", "two")]
    for path, digest in zip(paths, "xy", strict=True):
        (path / "frozen.json").write_text(json.dumps({"model": digest, "read_by": "cpu"}))
    with pytest.raises(UserError, match="has changed between these runs"):
        compare(paths)
    (paths[1] / "frozen.json").write_text(json.dumps({"model": "x", "read_by": "cpu"}))
    assert len(compare(paths)) == 2


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_a_narrow_terminal_folds_columns_and_cuts_no_figure(width: int, tmp_path: Path) -> None:
    for name, better in (("first", 0.0), ("second", 0.07)):
        for seed in (0, 1):
            values = {f"c{k}": 0.5 + better + 0.01 * k * (seed + 1) for k in range(3)}
            finished(tmp_path / f"{name}-{seed}", name, seed, values)
    rows = compare(sorted(tmp_path.iterdir()))
    out = io.StringIO()
    Console(file=out, width=width).print(table(rows))
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    said = [cell.strip() for line in lines for cell in line.split("│")]
    assert {text for row in rows for text in cells(row)} <= {"", *said}
    assert "…" not in out.getvalue()


def test_runs_of_different_metrics_are_not_compared(tmp_path: Path) -> None:
    paths = [
        finished(tmp_path / "a", "a", 0, {"x": 0.5}),
        finished(tmp_path / "b", "b", 0, {"x": 0.6}, metric="reward"),
    ]
    with pytest.raises(UserError, match="compared by different metrics"):
        compare(paths)


def test_runs_of_one_name_and_seed_go_by_their_directories(tmp_path: Path) -> None:
    rows = compare(
        [
            finished(tmp_path / "first", "a", 0, {"x": 0.5}),
            finished(tmp_path / "second", "a", 0, {"x": 0.6}),
        ]
    )
    assert [row.name for row in rows] == ["first", "second"]
    assert rows[1].gain is not None
    assert rows[1].gain[0] == pytest.approx(10.0)


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", "a", 0, {"x": 0.5})
    with pytest.raises(
        UserError, match="have the same name and seed, and their directories have too"
    ):
        compare([one, finished(tmp_path / "other/one", "a", 0, {"x": 0.5})])
    with pytest.raises(UserError, match=r"b: its seeds \[1\]"):
        compare([one, finished(tmp_path / "three", "b", 1, {"x": 0.5})])
    with pytest.raises(UserError, match="c: its clients or their data"):
        compare([one, finished(tmp_path / "four", "c", 0, {"z": 0.5})])
    with pytest.raises(UserError, match="d: its clients or their data"):
        compare([one, finished(tmp_path / "five", "d", 0, {"x": 0.5}, data="other")])
    with pytest.raises(UserError, match="a: its runs have different numbers of clients"):
        compare([one, finished(tmp_path / "six", "a", 1, {"x": 0.5, "y": 0.5})])
    (one / "done").unlink()
    with pytest.raises(UserError, match="not finished"):
        compare([one])


def test_a_variant_is_an_algorithm_or_overrides() -> None:
    assert parse_variant("fedprox") == ("fedprox", ["algorithm.name=fedprox"])
    assert parse_variant("fedprox: algorithm.mu=1") == (
        "fedprox",
        ["algorithm.name=fedprox", "algorithm.mu=1"],
    )
    assert parse_variant("feddpo: algorithm=ditto") == ("feddpo", ["algorithm=ditto"])
    assert parse_variant("near: algorithm.name=fedprox algorithm.mu=1") == (
        "near",
        ["algorithm.name=fedprox", "algorithm.mu=1"],
    )
    with pytest.raises(UserError, match="expected NAME"):
        parse_variant(": rounds=3")
    many = "own: data.sources={a: {name: hh}, b: {name: shp}} algorithm.preference=[0.5, 0.5]"
    assert parse_variant(many)[1] == [
        "data.sources={a: {name: hh}, b: {name: shp}}",
        "algorithm.preference=[0.5, 0.5]",
    ]
    for name in ("..", ".hidden", "selected", "cache"):
        with pytest.raises(UserError, match="something else of that name"):
            parse_variant(f"{name}: rounds=2")


def test_a_grids_values_stay_whole() -> None:
    grid = ["algorithm=feddpo,my_module:Momentum", "algorithm.preference=[0.5, 0.5],[1, 0]"]
    assert with_grid(["near: rounds=2"], grid)[3] == (
        "near algorithm=my_module:Momentum,preference=[1, 0]",
        ["rounds=2", "algorithm=my_module:Momentum", "algorithm.preference=[1, 0]"],
    )
    assert len(with_grid([], grid)) == 4


@pytest.mark.long
def test_runs_side_by_side_are_those_one_after_the_other(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create({**settings, "rounds": 1, "workers": None}), file)
    variants = ["feddpo", "fedprox", "bad: data.path=nowhere.jsonl"]
    whole = plan(file, variants[:2], [0, 1], [], tmp_path / "one")
    for _, happenings in sweep(whole, tmp_path / "one-cache"):
        list(happenings)
    runs = plan(file, variants, [0, 1], [], tmp_path / "two")
    ended = dict(side_by_side(runs, tmp_path / "two-cache", 3))
    assert set(ended) == set(runs)
    for path, why in ended.items():
        assert why.startswith("data.path: there is no file") == path.is_relative_to(
            tmp_path / "two" / "bad"
        )
    for path in whole:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        name = "adapter/adapter_model.safetensors"
        assert (path / name).read_bytes() == (other / name).read_bytes()
    # what failed is left, and nothing else
    again = dict(side_by_side(runs, tmp_path / "two-cache", 3))
    assert {path.parent.name for path in again} == {"bad"}


def test_a_run_that_dies_among_others_is_said_and_they_go_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create({**settings, "rounds": 1}), file)
    runs = plan(file, ["feddpo"], [0, 1], [], tmp_path / "out")
    whole = sweep_module.happenings

    def dying(experiment: Experiment, *arguments: Any) -> Any:
        if experiment.seed == 1:
            os._exit(9)
        return whole(experiment, *arguments)

    monkeypatch.setattr(sweep_module, "happenings", dying)
    ended = {path.name: why for path, why in side_by_side(runs, tmp_path / "cache", 2)}
    assert ended["seed-0"] == ""
    assert "its process has died" in ended["seed-1"]


@pytest.mark.long
def test_a_sweep_runs_each_variant_and_seed_once(settings: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.create({**settings, "baselines": ["alone"]}), config)
    runs = plan(
        config,
        ["feddpo", "1e-4: algorithm.name=fedprox rounds=1"],
        [0, 1],
        ["rounds=2"],
        tmp_path / "out",
    )
    assert [str(path.relative_to(tmp_path / "out")) for path in runs] == [
        "feddpo/seed-0",
        "feddpo/seed-1",
        "1e-4/seed-0",
        "1e-4/seed-1",
    ]
    assert [(spec.name, spec.seed, spec.rounds, spec.baselines) for spec in runs.values()][2] == (
        "1e-4",
        0,
        1,
        (),
    )
    first, happenings = next(sweep(runs, tmp_path / "cache"))
    list(happenings)
    rest = []
    for path, happenings in sweep(runs, tmp_path / "cache"):
        rest.append(path)
        list(happenings)
    assert [first, *rest] == list(runs)
    assert list(sweep(runs, tmp_path / "cache")) == []
    assert len(compare(list(runs))) == 2
    with pytest.raises(UserError, match="--seeds says how many"):
        plan(config, ["feddpo"], [0], ["seed=7"], tmp_path / "out")
    # what is done stays a member where others are added, under the same choice
    write_plan(runs, tmp_path / "out")
    more = plan(config, ["🚀: algorithm.name=scaffold"], [0], ["rounds=2"], tmp_path / "out")
    assert list(with_former(more, tmp_path / "out", None)) == [*runs, *more]
    assert next(iter(more.values())).name == "🚀"
    with pytest.raises(UserError, match="go by no --select"):
        with_former(more, tmp_path / "out", "loss")
    other = plan(config, ["feddpo"], [0], ["rounds=3"], tmp_path / "out")
    with pytest.raises(UserError, match="other settings"):
        list(sweep(other, tmp_path / "cache"))
