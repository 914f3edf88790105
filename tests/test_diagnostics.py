"""The distance from a stationary point and from agreement, against closed forms and finite
differences.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpref import Experiment, UserError, config, run
from fedpref.engines import Simulation
from fedpref.federation.diagnostics import diagnose, pooled
from fedpref.federation.verbs import Client, work
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree
from test_optimisers import CLIENTS, Bowl, Bowls


@work("test_diagnostics.at")
def at(client: Client, points: tuple[float, ...]) -> Tree:
    return {"x": torch.tensor([points[client.id], -points[client.id]])}


@work("test_diagnostics.own")
def own(client: Client) -> Tree:
    return {"private": torch.ones(1)}


def test_on_quadratics_they_are_what_the_closed_forms_say() -> None:
    task: Any = Bowls()
    fed = Simulation(
        task, [Bowl(str(i), *numbers) for i, numbers in enumerate(CLIENTS)], seed=0, rounds=1
    )
    model = (fed.each(own), fed.each(at, (1.0, 6.0)))
    found = diagnose(fed, model, ("x",), ("pooled-gradient", "disagreement"))
    # the mean model is (3.5, -3.5); the first client's curvature is 1 around 4, the second's 3
    # around 0
    assert found["pooled_loss"] == pytest.approx(
        (0.5 * (0.5**2 + 7.5**2) + 1.5 * (3.5**2 + 3.5**2)) / 2
    )
    assert found["pooled_gradient_norm_squared"] == pytest.approx(
        ((-0.5 + 10.5) / 2) ** 2 + ((-7.5 - 10.5) / 2) ** 2
    )
    assert found["disagreement"] == 0  # 1 and 3.5 lie below 4, and 6 and 3.5 above 0
    found = diagnose(fed, (fed.each(at, (9.0, -3.0)),), ("x",), ("disagreement",))
    assert found == {"disagreement": pytest.approx((0.5 + 1.0) / 2)}  # the mean is (3, -3)


def test_the_pooled_gradient_is_the_slope_of_the_pooled_loss(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = config.parse(Experiment, settings, "test")
    task = spec.build_task()
    shard = task.prepare(task.encode(spec.clients()[0][0]), tmp_path)
    client = Client(0, task, shard, seeds.generator(0, "train"), 0, 1)
    start = trees.add(
        task.init(seeds.generator(0, "init")),
        {n: 0.02 * torch.randn(t.shape) for n, t in task.init(seeds.generator(0, "init")).items()},
    )
    gradient = dict(pooled(client, start))
    del gradient["loss"]
    step = 0.01 / trees.norm(gradient)
    up, down = (
        float(pooled(client, trees.add(start, trees.scale(gradient, sign * step)))["loss"])
        for sign in (1, -1)
    )
    assert (up - down) / (2 * step) == pytest.approx(trees.norm(gradient) ** 2, rel=0.01)


class Corners(Bowls):
    """Two objectives: a client's centre is what the first coordinate wants, and its negative what
    the second wants, both of both.
    """

    objectives = ("first", "second")

    def parts(self, settings: Any, rng: torch.Generator) -> Tree:
        return {}

    def losses(self, params: Tree, batch: Bowl) -> tuple[torch.Tensor, dict[str, float]]:
        aims = torch.tensor([[batch.centre, 0.0], [0.0, batch.centre]])
        return 0.5 * (params["x"] - aims).square().sum(1), {}


@pytest.mark.parametrize(
    ("point", "expected"),
    [((2.0, 0.0), 0.0), ((1.0, 1.0), 0.0), ((0.0, 0.0), 2.0), ((3.0, 0.0), 1.0)],
)
def test_between_lowest_points_no_direction_is_good_for_all_objectives(
    point: tuple[float, float], expected: float
) -> None:
    task: Any = Corners()
    fed = Simulation(
        task, [Bowl(str(i), 1.0, centre) for i, centre in enumerate((4.0, 0.0))], seed=0, rounds=1
    )
    found = diagnose(fed, ({"x": torch.tensor(point)},), ("x",), ("pareto-stationarity",))
    # the mean centre is 2
    assert found == {"pareto_stationarity": pytest.approx(expected, abs=1e-6)}


def test_several_objectives_are_asked_for(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the task has one"):
        config.parse(Experiment, {**settings, "diagnostics": ["pareto-stationarity"]}, "test")


@pytest.mark.long
def test_a_run_writes_them_with_its_evaluations(settings: dict[str, Any], tmp_path: Path) -> None:
    wanted = {
        "diagnostics": ["pooled-gradient", "disagreement"],
        "evaluate_every": 2,
        "baselines": ["alone"],
    }
    path = run(config.parse(Experiment, {**settings, **wanted}, "test"), tmp_path / "run").path
    rows = [
        json.loads(line)["diagnostics"]
        for line in (path / "evaluation.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2
    assert rows[1]["pooled_loss"] < rows[0]["pooled_loss"]
    assert [row["disagreement"] for row in rows] == [0, 0]  # one model for all
    alone = json.loads((path / "baselines/alone/evaluation.jsonl").read_text().splitlines()[-1])[
        "diagnostics"
    ]
    assert alone["disagreement"] > 0
    plain = run(config.parse(Experiment, settings, "test"), tmp_path / "plain").path
    kept = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (path, plain)]
    assert kept[0] == kept[1]  # measuring changes nothing
