"""Fronts of trade-offs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from fedpref import Experiment, UserError, cli, config
from fedpref.runs.pareto import (
    Point,
    _engine,
    best,
    follows,
    front_metrics,
    hypervolume,
    plan_front,
    preferences,
    spacing,
)


def test_preferences_are_even_over_the_simplex() -> None:
    assert preferences(2, 3) == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    three = preferences(3, 5)
    assert len(three) == len(set(three)) == 15
    assert all(sum(shares) == pytest.approx(1) and min(shares) >= 0 for shares in three)
    assert {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)} <= set(three)


def test_hypervolume_and_spacing_have_their_closed_forms() -> None:
    values = np.array([[0.2, 0.8], [0.5, 0.5], [0.8, 0.2], [0.4, 0.4]])
    assert best(values).tolist() == [True, True, True, False]
    assert best(values[[0, 3, 0]]).tolist() == [True, True, True]
    assert hypervolume(values, (0, 0)) == pytest.approx(0.2 * 0.8 + 0.3 * 0.5 + 0.3 * 0.2)
    assert hypervolume(np.array([[1.0, 1.0, 2.0]]), (0, 0, 0)) == pytest.approx(2)
    assert spacing(values) == pytest.approx(0, abs=1e-12)
    assert spacing(np.array([[0.0, 1.0], [0.1, 0.9], [1.0, 0.0]])) == pytest.approx(
        np.std([0.2, 0.2, 1.8], ddof=1)
    )
    assert spacing(values[:1]) == 0


def test_objectives_that_rise_with_their_preference_follow_it() -> None:
    shares = preferences(2, 4)
    assert follows([Point(p, (p[0] ** 2, -p[0])) for p in shares]) == pytest.approx(1)
    assert follows([Point(p, (-p[0], p[0])) for p in shares]) == pytest.approx(-1)
    assert follows([Point(p, (p[0], 3.0)) for p in shares]) == pytest.approx(0.5)
    found = front_metrics(
        [*(Point(p, p) for p in shares), Point((0.5, 0.5), (0.9, 0.9), is_trained=False)],
        (0.0, 0.0),
    )
    assert found["hypervolume_interpolated"] > found["hypervolume"]


def test_points_between_are_of_the_clients_that_trained_points_are_of(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    content = {**settings, "evaluate_clients": 2, "federation": {"newcomers": 1}}
    spec = config.parse(Experiment, content, "test")
    names = [client.name for client in spec.clients()[0]]
    late = spec.federation.joining(names, spec.seed)
    trained = [i for i in range(len(names)) if i not in late]
    engine, _ = _engine(spec, tmp_path)
    assert list(engine.active) == spec.evaluated(names, trained, True)
    assert len(engine.active) == (3 if spec.evaluate_all_at_end else 2)


@pytest.mark.long
def test_a_front_from_the_command_line(settings: dict[str, Any], tmp_path: Path) -> None:
    task = {**settings["task"], "objective_column": "kind", "objective_names": ["first", "second"]}
    content = {
        **settings,
        "task": task,
        "algorithm": {**settings["algorithm"], "name": "firm"},
        "rounds": 2,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    arguments = [
        "pareto",
        str(tmp_path / "config.yaml"),
        "--points",
        "3",
        "--interpolate",
        "1",
        "--output",
        str(tmp_path / "front"),
    ]
    ran = CliRunner().invoke(cli.app, arguments)
    assert ran.exit_code == 0, ran.output
    assert "hypervolume" in ran.output
    found = json.loads((tmp_path / "front/front.json").read_text())
    assert found["objectives"] == ["first", "second"]
    assert [point["preference"] for point in found["points"]] == [
        [0, 1],
        [0.25, 0.75],
        [0.5, 0.5],
        [0.75, 0.25],
        [1, 0],
    ]
    assert [point["is_trained"] for point in found["points"]] == [True, False, True, False, True]
    assert all(0 <= value <= 1 for point in found["points"] for value in point["values"])
    assert "<svg" in (tmp_path / "front/front.svg").read_text()
    assert len(found["reference"]) == 2
    wrong = CliRunner().invoke(cli.app, [*arguments, "--reference", "0"])
    assert isinstance(wrong.exception, UserError)
    again = CliRunner().invoke(cli.app, arguments)
    assert "round" not in again.output.split("preferences and what")[0], "nothing is trained twice"


@pytest.mark.parametrize(
    ("task", "algorithm", "complaint"),
    [
        ({}, "firm", "one objective"),
        (
            {"objective_column": "kind", "objective_names": ["first", "second"]},
            "feddpo",
            "knows no preference",
        ),
        (
            {"objective_column": "kind", "objective_names": ["first", "second", "third"]},
            "firm",
            "between two objectives only",
        ),
        (
            {"objective_column": "kind", "objective_names": ["first", "first"]},
            "firm",
            "a name of its own",
        ),
        (
            {"objective_column": "kind", "objective_names": ["a/b", "first"]},
            "firm",
            "without a slash",
        ),
    ],
)
def test_where_nothing_can_be_traded_says_so(
    task: dict[str, Any], algorithm: str, complaint: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    content = {
        **settings,
        "task": {**settings["task"], **task},
        "algorithm": {**settings["algorithm"], "name": algorithm},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=complaint):
        plan_front(tmp_path / "config.yaml", 3, [0], [], tmp_path, interpolates=True)
