"""FIRM and its rivals: weights of objectives, what is private, and runs on drawn answers and on
given pairs.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from conftest import make_rows, write_rows
from fedpref import Experiment, UserError, cli, config, run
from fedpref.algorithms import FIRM, FSMGDA, FedCMOO, FedDPO, Scalarized
from fedpref.engines import Simulation
from fedpref.engines.forks import forked
from fedpref.engines.per_client import stored
from fedpref.engines.workers import can_fork
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import EVALUATION, METRICS
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.objectives import Objectives, jacobian, of_last_layers, preferred
from fedpref.federation.verbs import Client, in_turn
from fedpref.numerics import seeds, trees
from fedpref.numerics.min_norm import MinNorm
from fedpref.numerics.trees import Tree
from fedpref.tasks import BatchSize
from fedpref.tasks.task import CRITIC

LOCAL = LocalTraining(steps=2, batch_size=4, learning_rate=0.01)
REWARDS = {
    "brief": {"name": "length", "target": 2},
    "watery": {"name": "pattern", "pattern": "river|lake|sea"},
}


@pytest.fixture
def dialogue(settings: dict[str, Any]) -> dict[str, Any]:
    """Prompts to be answered, two rewards of the answers."""
    task = {
        "name": "dialogue",
        "model": settings["task"]["model"],
        "rewards": REWARDS,
        "num_generations": 3,
    }
    task |= {"sampling": {"max_completion_length": 8}, "evaluation_prompts": 4}
    local = {"steps": 2, "batch_size": 3, "learning_rate": 0.01}
    return deepcopy(
        {
            "data": settings["data"],
            "task": task,
            "algorithm": {"name": "firm", "local": local},
            "rounds": 2,
            "workers": 1,
        }
    )


@pytest.fixture
def pairs(settings: dict[str, Any]) -> dict[str, Any]:
    """Pairs of two objectives."""
    return deepcopy(
        {
            **settings,
            "task": {
                **settings["task"],
                "objective_column": "kind",
                "objective_names": ["first", "second"],
            },
        }
    )


def parsed(content: dict[str, Any]) -> Experiment:
    return config.parse(Experiment, content, "test")


def opened(content: dict[str, Any], cache: Path, **engine: Any) -> tuple[Simulation, Any]:
    spec = parsed(content)
    task = spec.build_task()
    shards = [task.prepare(task.encode(client), cache) for client in spec.clients()[0]]
    return Simulation(task, shards, seed=0, rounds=spec.rounds, **engine), task


def trained(
    method: Any, content: dict[str, Any], cache: Path, rounds: int = 2
) -> tuple[Tree, list[Any], Any]:
    engine, task = opened(content, cache)
    state = method.init(engine, task.init(seeds.generator(0, "init")))
    reports = []
    for number in range(rounds):
        engine.begin(number, engine.clients)
        state, report = method.step(engine, state)
        reports.append({**report, **engine.traffic.metrics()})
    return state.adapter, reports, state


# ---- one update


def leaves() -> dict[str, torch.Tensor]:
    names = ("layers.0.x", "layers.1.x", f"{CRITIC}a", f"{CRITIC}b")
    return {
        name: torch.randn(3, generator=torch.Generator().manual_seed(i)).requires_grad_()
        for i, name in enumerate(names)
    }


def two_losses(theta: dict[str, torch.Tensor]) -> torch.Tensor:
    shared = theta["layers.1.x"] * theta["layers.0.x"].tanh()
    first, second = shared.square().sum(), (shared - 1).square().sum()
    return torch.stack(
        [first + theta[f"{CRITIC}a"].square().sum(), second + theta[f"{CRITIC}b"].exp().sum()]
    )


@pytest.mark.parametrize("layers", [None, 1, 2])
def test_an_update_follows_the_weighted_gradients_and_critics_their_own(layers: int | None) -> None:
    theta = leaves()
    shared = {name: tensor for name, tensor in theta.items() if not name.startswith(CRITIC)}
    rows = jacobian(two_losses(theta), shared)
    seen: list[torch.Tensor] = []

    def weigh(gram: torch.Tensor) -> torch.Tensor:
        seen.append(gram)
        return torch.tensor([0.25, 0.75])

    weights = Objectives(weigh, of_last_layers(shared, layers) if layers else None).backward(
        two_losses(theta), theta, 2
    )
    assert weights == [0.25, 0.75]
    watched = rows[:, 3:] if layers == 1 else rows
    assert torch.allclose(seen[0], watched @ watched.T)
    found = torch.cat([theta[name].grad for name in sorted(shared)])  # type: ignore[misc]
    assert torch.allclose(found, torch.tensor([0.25, 0.75]) @ rows / 2)
    # of its square, halved for two batches
    assert torch.allclose(theta[f"{CRITIC}a"].grad, theta[f"{CRITIC}a"])  # type: ignore[arg-type]
    assert torch.allclose(theta[f"{CRITIC}b"].grad, theta[f"{CRITIC}b"].exp() / 2)  # type: ignore[arg-type]


def test_accumulated_batches_of_several_objectives_add_up() -> None:
    objectives = Objectives(lambda gram: torch.tensor([0.25, 0.75]))
    theta, once = leaves(), leaves()
    for _ in range(2):
        objectives.backward(two_losses(theta), theta, 2)
    objectives.backward(two_losses(once), once, 1)
    for name, leaf in theta.items():
        torch.testing.assert_close(leaf.grad, once[name].grad)


def test_fixed_weights_are_one_backward_pass_of_their_sum() -> None:
    theta = leaves()
    assert Objectives(torch.tensor([0.5, 0.5])).backward(two_losses(theta), theta, 1) == [0.5, 0.5]
    gradient = theta["layers.0.x"].grad
    other = leaves()
    two_losses(other).mean().backward()
    assert torch.allclose(gradient, other["layers.0.x"].grad)  # type: ignore[arg-type]


def test_preferences_are_brought_to_one_and_checked() -> None:
    assert preferred((), ["a", "b"]).tolist() == [0.5, 0.5]
    assert preferred((3, 1), ["a", "b"]).tolist() == [0.75, 0.25]
    for bad, complaint in (
        ((1.0,), "1 numbers for 2"),
        ((-1.0, 2.0), "not negative"),
        ((0.0, 0.0), "not all zero"),
    ):
        with pytest.raises(UserError, match=complaint):
            preferred(bad, ["a", "b"])


# ---- equivalences


def same(a: Tree, b: Tree) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_with_one_objective_firm_and_scalarisation_are_feddpo(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    expected = trained(FedDPO(local=LOCAL), settings, tmp_path)[0]
    same(trained(FIRM(local=LOCAL), settings, tmp_path)[0], expected)
    same(trained(Scalarized(local=LOCAL), settings, tmp_path)[0], expected)


@pytest.mark.long
def test_a_strong_regulariser_is_linear_scalarisation(
    pairs: dict[str, Any], tmp_path: Path
) -> None:
    local = replace(LOCAL, optim="sgd", learning_rate=0.05)
    fixed = trained(Scalarized(local=local, preference=(0.8, 0.2)), pairs, tmp_path)[0]
    alike = trained(
        FIRM(local=local, preference=(0.8, 0.2), solver=MinNorm(b=1e9)), pairs, tmp_path
    )[0]
    other = trained(
        FIRM(local=local, preference=(0.2, 0.8), solver=MinNorm(b=1e9)), pairs, tmp_path
    )[0]
    assert trees.norm(trees.subtract(alike, fixed)) < 0.01 * trees.norm(
        trees.subtract(other, fixed)
    )


@pytest.mark.long
def test_disagreement_over_weights_falls_as_the_regulariser_grows(
    pairs: dict[str, Any], tmp_path: Path
) -> None:
    drifts = [
        trained(FIRM(local=LOCAL, solver=MinNorm(b=b)), pairs, tmp_path)[1][-1]["drift/weights"]
        for b in (0.0, 1.0, 100.0)
    ]
    assert drifts[0] > drifts[1] > drifts[2] >= 0


def test_a_client_may_have_a_preference_of_its_own(pairs: dict[str, Any], tmp_path: Path) -> None:
    own = FIRM(local=LOCAL, solver=MinNorm(b=1e9), preferences={"client-0": (1.0, 0.0)})
    state = trained(own, pairs, tmp_path, rounds=1)[2]
    assert state.weights[0]["weights"].tolist() == pytest.approx([1, 0], abs=1e-5)
    assert state.weights[1]["weights"].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)


@pytest.mark.long
def test_weights_can_be_smoothed_over_steps_and_rounds(
    pairs: dict[str, Any], tmp_path: Path
) -> None:
    def weights(smoothing: float) -> list[float]:
        _, reports, _ = trained(
            FIRM(local=LOCAL, solver=MinNorm(b=0.0), smoothing=smoothing), pairs, tmp_path, rounds=4
        )
        return [report["weights/first"] for report in reports]

    def moved(values: list[float]) -> float:
        return sum(abs(b - a) for a, b in pairwise(values))

    assert moved(weights(0.9)) < moved(weights(0.0))


@pytest.mark.long
def test_a_client_sends_as_much_for_any_number_of_objectives_and_rivals_more(
    pairs: dict[str, Any], tmp_path: Path
) -> None:
    sent = {
        type(method).__name__: trained(method, pairs, tmp_path, rounds=1)[1][0]["bytes_up"]
        for method in (FIRM(local=LOCAL), FedCMOO(local=LOCAL), FSMGDA(local=LOCAL))
    }
    single = trained(
        FedDPO(local=LOCAL),
        {**pairs, "task": {**pairs["task"], "objective_column": None, "objective_names": []}},
        tmp_path,
        1,
    )
    assert sent["FIRM"] == single[1][0]["bytes_up"]
    size = 4 * trees.size(single[0])
    assert sent["FedCMOO"] == pytest.approx(2 * size, rel=0.01)
    assert sent["FSMGDA"] == 2 * size


def test_the_servers_weights_come_from_a_sketch_that_keeps_products(
    pairs: dict[str, Any], tmp_path: Path
) -> None:
    from fedpref.algorithms.fedcmoo import sketch
    from fedpref.federation.critics import critics

    engine, task = opened(pairs, tmp_path)
    start = task.init(seeds.generator(0, "init"))
    own = engine.each(critics)
    sketches = []
    for number in range(12):
        engine.begin(number, [0])
        sketches.append(
            engine.each(sketch, start, own, FedCMOO(local=replace(LOCAL, batch_size=64)))[0][
                "sketch"
            ].double()
        )
    grams = torch.stack([rows @ rows.T for rows in sketches])
    theta = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    batch = task.draw(
        theta, theta, engine._shards[0], BatchSize(64), torch.Generator().manual_seed(0)
    )
    rows = jacobian(task.losses(theta, batch)[0], theta).double()
    exact = rows @ rows.T
    assert (grams.mean(0) - exact).norm() < 0.15 * exact.norm()


def test_projected_steps_of_the_server_start_where_they_ended() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    method = FedCMOO()
    once = method.weigh(gram, None)
    assert 0 < once[0] < 0.5
    assert method.weigh(gram, once)[0] <= once[0]


# ---- drawn answers


QUICK = {
    "firm": ("ppo", "rloo", "grpo"),
    "scalarized": ("ppo",),
    "fsmgda": ("rloo",),
    "fedcmoo": ("grpo",),
}
PAIRS = [
    pytest.param(algorithm, estimator, marks=() if estimator in quick else pytest.mark.slow)
    for algorithm, quick in QUICK.items()
    for estimator in QUICK["firm"]
]


@pytest.mark.parametrize(("algorithm", "estimator"), PAIRS)
@pytest.mark.long
def test_runs_on_drawn_answers(
    algorithm: str, estimator: str, dialogue: dict[str, Any], tmp_path: Path
) -> None:
    dialogue["task"]["estimator"] = {"name": estimator}
    dialogue["algorithm"] |= {"name": algorithm}
    outcome = run(parsed({**dialogue, "diagnostics": ["pareto-stationarity"]}), tmp_path / "run")
    for row in outcome.evaluations[algorithm].values():
        assert {
            "rewards/brief",
            "rewards/watery",
            "reward",
            "kl",
            "distinct_2",
            "completions/mean_length",
        } <= row.keys()
        assert row["reward"] == pytest.approx((row["rewards/brief"] + row["rewards/watery"]) / 2)
    rows = RunDirectory(outcome.path).read_rows(METRICS)
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 1.0], abs=1e-12), (
        "the first step begins at the policy that drew"
    )
    assert ("value_error" in rows[0]) == (estimator == "ppo")
    assert not list(outcome.path.glob("adapter/*critic*"))
    (diagnosed,) = (row["diagnostics"] for row in RunDirectory(outcome.path).read_rows(EVALUATION))
    assert diagnosed["pareto_stationarity"] > 0


def test_fixed_weights_leave_critics_alone(dialogue: dict[str, Any], tmp_path: Path) -> None:
    once = LocalTraining(steps=1, batch_size=4, learning_rate=0.1, optim="sgd")
    strong = FIRM(local=once, solver=MinNorm(b=1e9), preference=(0.9, 0.1))
    critics = []
    for method in (
        strong,
        Scalarized(local=once, preference=(0.9, 0.1)),
        Scalarized(local=once, preference=(0.0, 1.0)),
    ):
        engine, task = opened(dialogue, tmp_path)
        state: Any = method.init(engine, task.init(seeds.generator(0, "init")))
        engine.begin(0, engine.clients)
        state, _ = method.step(engine, state)
        critics.append(stored(state.critics)[0])
    for name in critics[0]:
        torch.testing.assert_close(critics[0][name], critics[1][name], atol=1e-5, rtol=1e-4)
    assert critics[2]["critic.brief"].abs().sum() > 0, (
        "an objective that weighs nothing has a critic all the same"
    )


@pytest.mark.long
def test_where_products_are_averaged_no_drift_of_factors_is_told(
    pairs: dict[str, Any], tmp_path: Path
) -> None:
    for aggregate in ("factors", "product"):
        pairs["algorithm"] |= {
            "name": "firm",
            "aggregate": aggregate,
            "local": {"steps": 2, "batch_size": 4},
        }
        rows = RunDirectory(run(parsed(pairs), tmp_path / aggregate).path).read_rows(METRICS)
        assert ("drift/theta" in rows[0]) == (aggregate == "factors")


def test_a_groups_reward_compares_answers_to_one_prompt(dialogue: dict[str, Any]) -> None:
    for combine, complaint in (("alpha", "history of batches"), ("min", None)):
        dialogue["task"]["rewards"] = {
            "groups": {"name": "groups", "run": "nowhere", "combine": {"name": combine}}
        }
        if complaint:
            with pytest.raises(UserError, match=complaint):
                parsed(dialogue)
        else:
            assert parsed(dialogue).task.answers_together == 3  # type: ignore[union-attr]


def test_a_comparing_reward_is_measured_beside_the_untrained_models_answers(
    dialogue: dict[str, Any],
) -> None:
    def shares(prompts: Any, completions: Any, **_: Any) -> list[float]:
        points = torch.tensor([float(sum(map(ord, str(text))) % 97) for text in completions])
        found = torch.zeros_like(points)
        for prompt in set(map(str, prompts)):
            own = torch.tensor([str(other) == prompt for other in prompts])
            found[own] = (points[own] / 20).softmax(0)
        return found.tolist()

    dialogue["task"]["rewards"] = {"folk": {"name": "groups", "run": "nowhere"}}
    spec = parsed(dialogue)
    task: Any = spec.task.build(lambda *_: shares)
    shard = task.encode(spec.clients()[0][0])
    start = task.init(seeds.generator(0, "init"))
    share = 1 / (2 * spec.task.answers_together)  # type: ignore[union-attr]
    assert task.evaluate(start, shard)["rewards/folk"] == pytest.approx(share)
    moved = {name: tensor + 0.2 for name, tensor in start.items()}
    assert abs(task.evaluate(moved, shard)["rewards/folk"] - share) > 1e-3


def test_the_trunk_of_drawn_answers_is_computed_once(
    dialogue: dict[str, Any], tmp_path: Path
) -> None:
    found = {}
    dialogue["task"]["estimator"] = {"name": "rloo"}
    for where in ("none", "memory"):
        dialogue["task"]["model"] |= {"lora_layers_to_transform": "last-1", "trunk_states": where}
        spec = parsed(dialogue)
        task: Any = spec.build_task()
        shard = task.prepare(task.encode(spec.clients()[0][0]), tmp_path)
        calls: list[int] = []
        first = next(inner for name, inner in task.language.trunk.layers[0].named_modules() if name)
        params = {name: t + 0.05 for name, t in task.init(seeds.generator(0, "init")).items()}
        drawn = task.draw(params, params, shard, BatchSize(3), seeds.generator(0, "draw"))
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        theta = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
        slopes = jacobian(task.losses(theta, drawn)[0], theta)
        found[where] = len(calls), slopes.tolist(), task.evaluate(params, shard)
    (often, *expected), (seldom, *same) = found["none"], found["memory"]
    assert (often, seldom) == (1, 0)  # the reference's scores had the states already
    assert same == expected


def test_long_prompts_leave_room_for_answers(dialogue: dict[str, Any]) -> None:
    dialogue["task"] |= {
        "max_length": 20,
        "sampling": {"max_completion_length": 8},
        "truncation_mode": "keep_end",
    }
    spec = parsed(dialogue)
    learner = spec.build_task()
    client = spec.clients()[0][0]
    long = replace(client, train=(replace(client.train[0], prompt="Who is it? " * 20),), test=())
    shard = learner.encode(long)
    assert len(shard.train[0].tokens) == 12
    assert shard.truncated == 1
    with pytest.raises(UserError, match="leaves 12"):
        parsed(
            {**dialogue, "task": {**dialogue["task"], "truncation_mode": "refuse"}}
        ).build_task().encode(long)


def test_a_reference_line_that_cannot_run_is_refused_before_anything_is_written(
    dialogue: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no baselines"):
        run(parsed({**dialogue, "baselines": ["alone"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_answers_before_and_after_are_kept_with_their_clients(
    dialogue: dict[str, Any], tmp_path: Path
) -> None:
    path = run(parsed(dialogue), tmp_path / "run").path
    kept = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in (path / "samples").iterdir()
    }
    clients = {client.name: client for client in parsed(dialogue).clients()[0]}
    assert kept.keys() == clients.keys()
    for name, rows in kept.items():
        assert [row["prompt"] for row in rows] == list(
            dict.fromkeys(row.prompt for row in clients[name].test)
        )[: len(rows)]
        assert any(row["before"]["completion"] != row["after"]["completion"] for row in rows)
        for row in rows:
            for side in ("before", "after"):
                words = len(row[side]["completion"].split())
                assert row[side]["rewards"]["brief"] == pytest.approx(
                    max(-1, 1 - abs(words - 2) / 2)
                )


@pytest.mark.long
def test_answers_can_be_followed_several_times(dialogue: dict[str, Any], tmp_path: Path) -> None:
    dialogue["algorithm"]["local"] |= {"steps": 4, "num_iterations": 4, "learning_rate": 0.05}
    rows = RunDirectory(run(parsed(dialogue), tmp_path / "run").path).read_rows(METRICS)
    assert any(abs(row["ratio"] - 1) > 1e-6 for row in rows)


@pytest.mark.skipif(not can_fork(), reason="batches of a client are shared out by forks")
def test_answers_that_are_followed_again_are_those_of_the_policy_that_drew_them(
    dialogue: dict[str, Any], tmp_path: Path
) -> None:
    dialogue["task"]["estimator"] = {"name": "grpo"}
    spec = parsed(dialogue)
    task: Any = spec.build_task()
    shard = task.prepare(task.encode(spec.clients()[0][0]), tmp_path)
    again = replace(LOCAL, steps=4, num_iterations=2, gradient_accumulation_steps=2)
    found = []
    for spread in (in_turn, partial(forked, 2)):
        rng = seeds.generator(0, "again")
        client = Client(0, task, shard, rng, 0, 1, spread=spread)
        start = task.init(seeds.generator(0, "init"))
        found.append(train_locally(client, start, again, {}))
    (expected, _, told), (theta, _, metrics) = found
    assert metrics == told
    assert all(torch.equal(theta[name], tensor) for name, tensor in expected.items())


def test_critics_are_trained_and_stay_where_they_are(
    dialogue: dict[str, Any], tmp_path: Path
) -> None:
    adapter, reports, state = trained(FIRM(local=LOCAL), dialogue, tmp_path)
    assert reports[0]["bytes_up"] < 1.1 * 4 * trees.size(adapter)
    assert not any(name.startswith(CRITIC) for name in adapter)
    own = [state.critics[i] for i in range(4)]
    assert own[0].keys() == {f"{CRITIC}brief", f"{CRITIC}watery"}
    assert all(critic.any() for critic in own[0].values())
    assert not torch.equal(own[0][f"{CRITIC}brief"], own[1][f"{CRITIC}brief"])


@pytest.mark.long
def test_other_algorithms_train_on_drawn_answers_too(
    dialogue: dict[str, Any], tmp_path: Path
) -> None:
    dialogue["task"]["estimator"] = {"name": "rloo"}
    for algorithm in ("feddpo", "decdpo", "alone"):
        assert run(
            parsed({**dialogue, "algorithm": {**dialogue["algorithm"], "name": algorithm}}),
            tmp_path / algorithm,
        ).evaluations


@pytest.mark.parametrize("estimator", [pytest.param("ppo", marks=pytest.mark.slow), "rloo"])
@pytest.mark.long
def test_a_reward_rises(estimator: str) -> None:
    """The shipped model learns to be brief in a few steps."""
    task = {
        "name": "dialogue",
        "rewards": {"brief": {"name": "length", "target": 4}},
        "estimator": {"name": estimator, "kl": 0.0},
    }
    task |= {"sampling": {"max_completion_length": 16}, "evaluation_prompts": 24}
    content = {
        "partition": {"name": "natural", "max_clients": 1},
        "task": task,
        "algorithm": {"name": "firm"},
    }
    client, learner = parsed(content).clients()[0][0], parsed(content).build_task()
    shard = learner.encode(client)
    local = LocalTraining(
        steps=12, batch_size=8, learning_rate=4e-3, warmup_ratio=0.0, lr_scheduler_type="constant"
    )
    engine = Simulation(learner, [shard], seed=0, rounds=1)
    start = learner.init(seeds.generator(0, "init"))
    state, _ = (method := FIRM(local=local)).step(engine, method.init(engine, start))
    before, after = (learner.evaluate(params, shard) for params in (start, state.adapter))
    assert after["reward"] > before["reward"] + 0.3
    assert after["kl"] > before["kl"] == pytest.approx(0, abs=0.2)
    assert after["distinct_1"] > 0.5, "and not by repeating itself"


@pytest.mark.long
def test_rewards_are_given_the_prompts_and_what_is_known_of_them(
    dialogue: dict[str, Any], tmp_path: Path
) -> None:
    dialogue["task"]["rewards"] = {"known": {"name": "function", "path": "test_firm:of_client"}}
    dialogue["task"]["estimator"] = {"name": "rloo"}
    outcome = run(parsed({**dialogue, "workers": 1}), tmp_path / "run")
    assert {row["rewards/known"] for row in outcome.evaluations["firm"].values()} == {
        0.0,
        1.0,
        2.0,
        3.0,
    }


def of_client(
    prompts: list[str], completions: list[str], client: list[str], **_: Any
) -> list[float]:
    assert all(prompt.startswith("Human: Which fish") for prompt in prompts)
    assert len(prompts) == len(completions)
    return [float(name[-1]) for name in client]


def too_few(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [1.0]


def test_prompts_alone_are_enough_and_each_counts_once(
    dialogue: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": row["prompt"], "client": row["client"]} for row in make_rows([12, 9])]
    dialogue["data"] = {
        **dialogue["data"],
        "path": str(write_rows(tmp_path / "prompts.jsonl", [*rows, *rows])),
    }
    task = parsed(dialogue).build_task()
    shards = [task.encode(client) for client in parsed(dialogue).clients()[0]]
    assert sum(len(shard.train) + len(shard.test) for shard in shards) == 21


# ---- given pairs


@pytest.mark.long
def test_accuracies_are_measured_for_each_objective(pairs: dict[str, Any], tmp_path: Path) -> None:
    # batches of equal parts: the last one of an epoch may have fewer of an objective
    local = {**pairs["algorithm"]["local"], "sampling_strategy": "independent"}
    pairs["algorithm"] |= {"name": "firm", "local": local}
    outcome = run(parsed(pairs), tmp_path / "run")
    task = parsed(pairs).build_task()
    for client in parsed(pairs).clients()[0]:
        shard, row = task.encode(client), outcome.evaluations["firm"][client.name]
        counts = [sum(example.objective == m for example in shard.test) for m in range(2)]
        both = (
            counts[0] * row["rewards/accuracies/first"]
            + counts[1] * row["rewards/accuracies/second"]
        )
        assert both / sum(counts) == pytest.approx(row["rewards/accuracies"])
    rows = RunDirectory(outcome.path).read_rows(METRICS)
    assert rows[0]["weights/first"] + rows[0]["weights/second"] == pytest.approx(1)
    assert rows[0]["loss"] == pytest.approx(
        (rows[0]["loss/first"] + rows[0]["loss/second"]) / 2, rel=1e-5
    )


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["algorithm.preference=[1,2,3]"], "3 numbers for 2 objectives"),
        (["algorithm.preferences={client-1: [1]}"], r"algorithm.preferences.client-1: 1 numbers"),
        (["algorithm.preferences={clinet-1: [1, 0]}"], r"are no clients"),
        (["algorithm={name: feddpo}"], "ppo needs critics"),
        (["algorithm={name: fedpdpo}"], "without parts of a client's own"),
        (["task.estimator={name: rloo}", "task.num_generations=1"], "take 2 or more"),
        (["diagnostics=[pooled-gradient]"], "has no single loss of its examples"),
        (["algorithm.local.max_tokens_per_batch=100"], "tokens are not known"),
        (["task.sampling.max_completion_length=95"], "leave no room"),
        (
            ["task.rewards={x: {name: function, path: 'test_firm:too_few'}}"],
            "expected 9 numbers, one of each completion",
        ),
        (["task.rewards={x: {name: nonsense}}"], "nonsense"),
    ],
)
def test_what_does_not_fit_is_refused(
    overrides: list[str], complaint: str, dialogue: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**dialogue, "workers": 1}))
    with pytest.raises(UserError, match=complaint):
        run(Experiment.load(tmp_path / "config.yaml", overrides), tmp_path / "run")


def test_pairs_of_unknown_objectives_and_clients_without_one_are_refused(
    pairs: dict[str, Any], tmp_path: Path
) -> None:
    rows = make_rows([24, 16])
    for changed, complaint in (
        (
            [*rows, {**rows[0], "prompt": "Human: New?\n\nAssistant:", "kind": "third"}],
            "found 'third'",
        ),
        (
            [row for row in rows if row["client"] != "client-1" or row["kind"] == "first"],
            "has no training pairs of the objective 'second'",
        ),
    ):
        path = write_rows(tmp_path / "rows.jsonl", changed)
        with pytest.raises(UserError, match=complaint):
            run(parsed({**pairs, "data": {**pairs["data"], "path": str(path)}}), tmp_path / "run")
    with pytest.raises(UserError, match="give both"):
        parsed({**pairs, "task": {**pairs["task"], "objective_names": []}})


@pytest.mark.long
def test_the_shipped_experiment_is_valid_and_runs_from_the_command_line(
    dialogue: dict[str, Any], tmp_path: Path
) -> None:
    assert CliRunner().invoke(cli.app, ["check", "configs/firm.yaml"]).exit_code == 0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**dialogue, "rounds": 1}))
    ran = CliRunner().invoke(
        cli.app, ["run", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]
    )
    assert ran.exit_code == 0, ran.output
    assert "held-out reward" in ran.output
    assert "rewards/brief" in ran.output
    assert "answers to client-" in ran.output
    assert "reward, %" not in ran.output
    assert CliRunner().invoke(cli.app, ["compare", str(tmp_path / "run")]).exit_code == 0
    assert (
        json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["peft_type"]
        == "LORA"
    )


def test_a_loss_that_a_parameter_has_no_part_in_has_no_gradient_there() -> None:
    theta = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(1, requires_grad=True)}
    losses = torch.stack([(2 * theta["a"]).sum(), (3 * theta["b"]).sum()])
    assert jacobian(losses, theta).tolist() == [[2.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
