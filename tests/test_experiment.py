"""Runs as a whole: reference semantics, equivalences, resuming, the run directory."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import leave, make_rows, write_rows
from fedpref import Experiment, UserError, config, resume, run
from fedpref.algorithms import Alone, FedDPO, Pooled
from fedpref.data import ClientData, Preference
from fedpref.engines import Simulation, per_client
from fedpref.engines.forks import forked
from fedpref.engines.per_client import StoredValues
from fedpref.engines.store import Store
from fedpref.engines.values import Kept
from fedpref.experiments.evaluations import evaluate
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.frozen import frozen, refuse_other
from fedpref.experiments.rounds import events, new_directory
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import METRICS
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import work
from fedpref.losses import DPO
from fedpref.numerics import seeds, trees
from fedpref.runs.export import export
from fedpref.tasks import BatchSize, PreferenceTask
from fedpref.tasks.examples import Batch, Example
from process_engine import other_processes


def experiment(settings: dict[str, Any], **changes: Any) -> Experiment:
    return config.parse(Experiment, {**settings, **changes}, "test")


def metrics(path: Path) -> list[dict[str, Any]]:
    return RunDirectory(path).read_rows("metrics.jsonl")


def adapter(path: Path) -> trees.Tree:
    return trees.load(path / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(a: Path, b: Path) -> None:
    one, other = adapter(a), adapter(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- the reference


def one_client(settings: dict[str, Any], reference: str, tmp_path: Path) -> list[float]:
    """The loss of each round's first batch, one step a round."""
    algorithm = {
        "name": "feddpo",
        "local": {"steps": 1, "batch_size": 4, "learning_rate": 0.02, "warmup_ratio": 0.0},
    }
    spec = experiment(
        settings, task={**settings["task"], "reference": reference}, algorithm=algorithm, rounds=3
    )
    return [row["loss"] for row in metrics(run(spec, tmp_path / reference).path)]


def test_under_base_only_the_first_round_starts_at_ln_2(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    losses = one_client(settings, "base", tmp_path)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(abs(loss - math.log(2)) > 1e-2 for loss in losses[1:])


def test_under_round_start_every_round_starts_at_ln_2(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    assert one_client(settings, "round-start", tmp_path) == pytest.approx(
        [math.log(2)] * 3, abs=1e-5
    )


def test_reference_scores_are_computed_once_and_kept_in_the_run_directory(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = experiment(settings)
    task = spec.task.build()
    shard = task.encode(spec.clients()[0][0])
    task.prepare(shard, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is computed before it is needed"
    first = task.draw({}, {}, shard, BatchSize(4), seeds.generator(0, "draw"))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    # another process, or a run that goes on
    again = spec.task.build()
    again.prepare(shard, tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("scored twice")

    monkeypatch.setattr(again.language, "score", refuse)
    second = again.draw({}, {}, shard, BatchSize(4), seeds.generator(0, "draw"))
    assert torch.equal(first.reference, second.reference)


def test_ahead_all_answers_are_scored_once(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: Any = replace(experiment(settings).task, reference_scores="ahead").build()
    shard = task.encode(experiment(settings).clients()[0][0])
    twice = replace(shard, train=shard.train + shard.train)
    scored: list[Any] = []
    usual = task.language.score

    def counting(params: Any, rows: Any, **more: Any) -> Any:
        scored.extend((tuple(prompt), tuple(answer)) for prompt, some in rows for answer in some)
        return usual(params, rows, **more)

    monkeypatch.setattr(task.language, "score", counting)
    task.prepare(twice, tmp_path)
    wanted = {(e.prompt, a) for e in shard.train + shard.test for a in e.answers}
    assert len(scored) == len(wanted)
    assert set(scored) == wanted


def test_clients_who_share_a_model_have_each_answer_scored_once(
    settings: dict[str, Any], learner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = learner.encode(experiment(settings).clients()[0][0])
    adapter = learner.init(seeds.generator(0, "init"))
    expected = learner.evaluate(adapter, shard)
    monkeypatch.setattr(learner.language, "score", None)
    other = replace(shard, name="other", test=shard.test[::-1])
    assert learner.evaluate(adapter, other) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(TypeError):
        learner.evaluate({name: tensor + 1 for name, tensor in adapter.items()}, shard)


# ---- equivalences


def test_one_client_is_pooled_training(settings: dict[str, Any], tmp_path: Path) -> None:
    partition = {"name": "iid", "clients": 1}
    local = settings["algorithm"]["local"]
    for name in ("feddpo", "pooled"):
        run(
            experiment(settings, partition=partition, algorithm={"name": name, "local": local}),
            tmp_path / name,
        )
    assert_same_adapter(tmp_path / "feddpo", tmp_path / "pooled")


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_one_round_of_federation_is_the_mean_of_training_alone(
    weighting: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = experiment(settings, rounds=1)
    task = spec.task.build()
    shards = [task.prepare(task.encode(client), tmp_path) for client in spec.clients()[0]]
    start = task.init(seeds.generator(0, "init"))
    local = replace(spec.algorithm.local, warmup_ratio=0.0)
    together = FedDPO(local=local)
    alone = Alone(local=local)
    fed = Simulation(task, shards, seed=0, rounds=1, weighting=weighting)
    states = together.init(fed, start), alone.init(fed, start)
    fed.begin(0, fed.clients)
    averaged = together.step(fed, states[0])[0].adapter
    fed.begin(0, fed.clients)
    state = alone.step(fed, states[1])[0]
    sizes = [len(shard) if weighting == "examples" else 1 for shard in shards]
    weights = [size / sum(sizes) for size in sizes]
    expected = trees.total(trees.scale(state.theta[i], weight) for i, weight in enumerate(weights))
    for name, value in averaged.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


# ---- the local loop


@pytest.fixture(scope="module")
def learner(settings: dict[str, Any]) -> Any:
    return experiment(settings).task.build()


CACHE = Path(tempfile.mkdtemp())


def client(learner: Any, settings: dict[str, Any], round: int = 0) -> Any:
    from fedpref.federation.verbs import Client

    shard = learner.prepare(learner.encode(experiment(settings).clients()[0][0]), CACHE)
    return Client(0, learner, shard, seeds.generator(0, "work", round=round), round, 2)


def test_accumulated_batches_are_one_large_batch(settings: dict[str, Any], learner: Any) -> None:
    """With one batch a shard, drawing it twice is drawing the shard twice: the same gradient,
    whatever the optimiser.
    """
    start = learner.init(seeds.generator(0, "init"))
    shard = replace(
        client(learner, settings).shard, train=client(learner, settings).shard.train[:4]
    )
    results = []
    for pieces in (1, 3):
        local = LocalTraining(
            steps=2,
            batch_size=4,
            gradient_accumulation_steps=pieces,
            optim="sgd",
            learning_rate=0.1,
            warmup_ratio=0.0,
            max_grad_norm=1e9,  # or the norm would be the same whatever the sum is divided by
        )
        results.append(
            train_locally(replace(client(learner, settings), shard=shard), start, local, {})[0]
        )
    for name in start:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def test_sgd_takes_the_step_of_the_textbook(settings: dict[str, Any], learner: Any) -> None:
    start = learner.init(seeds.generator(0, "init"))
    local = LocalTraining(
        steps=1,
        batch_size=4,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        max_grad_norm=1e9,
        sampling_strategy="independent",
    )
    theta, moments, _ = train_locally(client(learner, settings), start, local, {})
    same = client(learner, settings)
    torch.randint(2**62, (), generator=same.rng)  # what the loop seeds dropout with
    leaves = {name: t.clone().requires_grad_() for name, t in start.items()}
    batch = learner.draw(leaves, start, same.shard, BatchSize(4), same.rng)
    learner.losses(leaves, batch)[0].mean().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(theta[name], start[name] - 0.5 * leaf.grad)
    assert moments == {}


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_kept_moments_make_two_rounds_one_long_round(
    optim: str, settings: dict[str, Any], learner: Any
) -> None:
    """With them the optimiser goes on as if it had never stopped; without them it starts afresh."""
    start = learner.init(seeds.generator(0, "init"))
    shard = replace(
        client(learner, settings).shard, train=client(learner, settings).shard.train[:4]
    )
    common = {
        "batch_size": 4,
        "optim": optim,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "momentum": 0.9,
        "learning_rate": 0.01,
    }

    def on(round: int) -> Any:
        return replace(client(learner, settings, round), shard=shard)

    def two_rounds(keep: bool) -> trees.Tree:
        local = LocalTraining(steps=2, keep_optimizer=keep, **common)
        theta, moments, _ = train_locally(on(0), start, local, {})
        return train_locally(on(1), theta, local, moments)[0]

    whole = train_locally(on(0), start, LocalTraining(steps=4, **common), {})[0]
    kept, fresh = two_rounds(True), two_rounds(False)
    for name in start:
        torch.testing.assert_close(kept[name], whole[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(fresh[name], whole[name], rtol=1e-4, atol=1e-6) for name in start)


def test_gradients_are_clipped_to_the_norm(settings: dict[str, Any], learner: Any) -> None:
    start = learner.init(seeds.generator(0, "init"))
    local = LocalTraining(
        steps=1,
        batch_size=4,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        max_grad_norm=1e-3,
    )
    theta, _, measured = train_locally(client(learner, settings), start, local, {})
    assert measured["grad_norm"] > 1e-2
    assert trees.norm(trees.subtract(theta, start)) == pytest.approx(1e-3, rel=1e-2)


def test_batches_draw_every_pair_alike_and_keep_lengths_together(
    settings: dict[str, Any], learner: Any
) -> None:
    shard = client(learner, settings).shard
    rng = seeds.generator(0, "work")
    seen: Counter[Any] = Counter()
    spread, at_random = [], []
    for _ in range(400):
        pairs = learner.draw({}, {}, shard, BatchSize(4), rng).examples
        seen.update(pair.prompt for pair in pairs)
        others = [shard.train[i] for i in torch.randperm(len(shard), generator=rng)[:4].tolist()]
        for found, some in ((spread, pairs), (at_random, others)):
            found.append(max(pair.tokens for pair in some) - min(pair.tokens for pair in some))
    expected = 400 * 4 / len(shard)
    assert len(seen) == len(shard)
    assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in seen.values())
    assert sum(spread) < sum(at_random)


def test_batches_of_a_token_budget_keep_to_it_and_weigh_every_pair_alike(
    settings: dict[str, Any], learner: Any
) -> None:
    shard = client(learner, settings).shard
    rng = seeds.generator(0, "work")
    longest = max(pair.tokens for pair in shard.train)
    weights: Counter[Any] = Counter()
    sizes = set()
    for _ in range(1200):
        pairs = learner.draw({}, {}, shard, BatchSize(1, max_tokens=2 * longest), rng).examples
        assert sum(pair.tokens for pair in pairs) <= 2 * longest
        sizes.add(len(pairs))
        for pair in pairs:
            weights[pair.prompt] += 1 / len(pairs)  # its weight in the mean of the losses
    assert len(sizes) > 1
    assert all(
        abs(weights[pair.prompt] - 1200 / len(shard)) < 5 * math.sqrt(1200 / len(shard))
        for pair in shard.train
    )
    alone = learner.draw({}, {}, shard, BatchSize(8, max_tokens=1), rng).examples
    assert len(alone) == 1


# ---- lengths


def encode(learner: Any, words: int, mode: str, limit: int = 40) -> Any:
    task = replace(learner.settings, max_length=limit, truncation_mode=mode).build()
    row = Preference("start " + "word " * words + "end", " yes indeed", " no", "row 1")
    return task, task.encode(ClientData("a", (row,), ()))


def test_long_rows_are_refused_by_default(learner: Any) -> None:
    with pytest.raises(
        UserError, match=r"row 1: prompt and longest answer are \d+ tokens, task.max_length is 40"
    ):
        encode(learner, 60, "refuse")
    with pytest.raises(UserError, match="context holds 96"):
        encode(learner, 1, "refuse", limit=97)


@pytest.mark.parametrize(("mode", "kept"), [("keep_start", "start"), ("keep_end", "end")])
def test_long_prompts_lose_the_end_that_is_asked_for_and_answers_stay(
    mode: str, kept: str, learner: Any
) -> None:
    task, shard = encode(learner, 60, mode)
    text = task.language.tokenizer.decode
    (pair,) = shard.train
    assert len(pair.prompt) + len(pair.answers[0]) == 40
    assert kept in text(pair.prompt)
    assert {"start": "end", "end": "start"}[kept] not in text(pair.prompt)
    assert text(pair.answers[0]) == " yes indeed<|end|>"
    assert shard.truncated == 1


# ---- the run directory


@pytest.mark.long
def test_a_run_leaves_everything_a_report_needs(settings: dict[str, Any], tmp_path: Path) -> None:
    spec = experiment(settings, baselines=["alone", "pooled"], evaluate_every=2)
    result = run(spec, tmp_path / "run")
    assert Experiment.load(tmp_path / "run" / "config.yaml") == spec
    rows = metrics(result.path)
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert {
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "grad_norm",
        "bytes_up",
        "bytes_down",
        "seconds",
    } <= rows[0].keys()
    evaluated = RunDirectory(result.path).read_rows("evaluation.jsonl")
    assert [row["round"] for row in evaluated] == [2, 3]
    assert evaluated[-1]["summary"]["rewards/accuracies"].keys() == {
        "mean",
        "weighted_mean",
        "worst",
        "worst_decile",
        "std",
        "gap",
        "jain",
        "cov",
        "fairness",
    }
    assert result.evaluations.keys() == {"feddpo", "alone", "pooled"}
    assert result.evaluations["feddpo"]["client-0"]["num_examples"] >= 1
    assert (result.path / "baselines/pooled/adapter/adapter_config.json").exists()
    assert sorted(p.name for p in (result.path / "baselines/alone/clients").iterdir()) == [
        f"client-{i}" for i in range(4)
    ]
    # float32 numbers a weight, which has two factors
    probes = 8 * 4 * len(adapter(result.path)) // 2
    size = trees.size(adapter(result.path))
    assert (rows[0]["bytes_up"], rows[0]["bytes_down"]) == (4 * (size + probes), 4 * size)


def test_the_cohort_has_the_size_that_is_asked_for(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    result = run(experiment(settings, federation={"clients_per_round": 2}), tmp_path / "run")
    assert [row["clients"] for row in metrics(result.path)] == [2, 2, 2]


def test_divergence_is_a_sentence_that_names_the_last_checkpoint(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    local = {
        "steps": 1,
        "batch_size": 4,
        "optim": "sgd",
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.8,
        "max_grad_norm": 1e30,
    }
    spec = experiment(
        settings, algorithm={"name": "feddpo", "local": {**local, "learning_rate": 1e38}}, rounds=6
    )
    with pytest.raises(UserError, match=r"round \d: training diverged") as caught:
        run(spec, tmp_path / "run")
    kept = RunDirectory(tmp_path / "run").checkpoints()
    assert str(kept[-1]) in str(caught.value) if kept else "no checkpoint" in str(caught.value)
    for checkpoint in kept:
        assert all(
            t.isfinite().all() for t in trees.load(checkpoint / "adapter.safetensors").values()
        )
    assert not (tmp_path / "run/adapter").exists()


def test_an_existing_directory_is_refused_and_untouched(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run(experiment(settings, rounds=1), tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(UserError, match="exists already"):
        run(experiment(settings, seed=7), tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_resuming_over_other_data_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", make_rows([24, 16, 12, 9]))
    spec = experiment(settings, data={**settings["data"], "path": str(path)})
    happenings = events(spec, new_directory(spec, tmp_path / "run"))
    next(happenings)
    happenings.close()
    write_rows(path, make_rows([24, 16, 12, 9], seed=1))
    with pytest.raises(UserError, match="not what the run began with"):
        resume(tmp_path / "run")


def test_clients_that_are_never_drawn_still_train_alone(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    result = run(
        experiment(settings, federation={"clients_per_round": 1}, baselines=["alone"]),
        tmp_path / "run",
    )
    assert [row["clients"] for row in metrics(result.path)] == [1, 1, 1]
    assert [row["clients"] for row in metrics(result.path / "baselines/alone")] == [4, 4, 4]
    assert all(
        abs(row["loss"] - math.log(2)) > 1e-3 for row in result.evaluations["alone"].values()
    )


@pytest.mark.long
def test_a_line_is_not_its_own_reference(settings: dict[str, Any], tmp_path: Path) -> None:
    algorithm = {"name": "alone", "local": settings["algorithm"]["local"]}
    result = run(
        experiment(settings, algorithm=algorithm, baselines=["alone", "pooled"]), tmp_path / "run"
    )
    assert result.evaluations.keys() == {"alone", "pooled"}
    assert (result.path / "done").exists()


def test_an_experiments_name_cannot_leave_runs(settings: dict[str, Any]) -> None:
    spec = config.parse(Experiment, {**settings, "name": "../../evil"}, "x")
    path = new_directory(spec, None).path
    assert path.parent == Path("runs")
    assert path.name.startswith("-..-evil-")


def test_settings_of_another_type_are_read_or_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = replace(config.parse(Experiment, settings, "x"), rounds="1")  # type: ignore[arg-type]
    run(spec, tmp_path / "run")
    assert FinishedRun.at(tmp_path / "run").experiment.rounds == 1
    with pytest.raises(UserError, match="an experiment is keys and values"):
        run(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("returns", "message"),
    [("sum", r"returned a tensor of shape \(\)"), ("detach", "without a gradient")],
)
def test_a_loss_that_is_not_one_of_each_pair_is_refused(
    returns: str, message: str, learner: Any
) -> None:
    class Other(DPO):
        def __call__(self, policy: Any, reference: Any) -> Any:
            return getattr(super().__call__(policy, reference), returns)()

    learner.settings = replace(learner.settings, loss=Other())
    policy = torch.zeros(1, 2, requires_grad=True)
    examples = [Example((1, 2), ((3,), (4,)))]
    with pytest.raises(UserError, match=message):
        learner.measure(policy, None, Batch(examples, torch.zeros(1, 2)))


def test_a_clients_name_cannot_leave_the_run_directory(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{**row, "client": "../../" + row["client"]} for row in make_rows([24, 16])]
    data = {**settings["data"], "path": str(write_rows(tmp_path / "rows.jsonl", rows))}
    run(
        experiment(settings, data=data, algorithm={**settings["algorithm"], "name": "alone"}),
        tmp_path / "deep/run",
    )
    folders = {path.name for path in (tmp_path / "deep/run/clients").iterdir()}
    assert {name.rsplit("~", 1)[0] for name in folders} == {"client-0", "client-1"}
    assert FinishedRun.at(tmp_path / "deep/run").client_folders.keys() == {
        "../../client-0",
        "../../client-1",
    }
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"run"}


@pytest.mark.long
def test_the_pooled_line_sees_all_data_and_as_many_pairs(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    local = {**settings["algorithm"]["local"], "sampling_strategy": "independent"}
    algorithm = {**settings["algorithm"], "local": local}
    result = run(experiment(settings, baselines=["pooled"], algorithm=algorithm), tmp_path / "run")
    ours, pooled = metrics(result.path), metrics(result.path / "baselines/pooled")
    assert [row["num_pairs"] for row in ours] == [row["num_pairs"] for row in pooled]
    assert isinstance(
        Experiment.load(tmp_path / "run/baselines/pooled/config.yaml").algorithm, Pooled
    )


# ---- resuming


@pytest.mark.parametrize("after", [1, 6, pytest.param(9, marks=pytest.mark.slow), 13])
@pytest.mark.long
def test_a_run_left_anywhere_ends_with_the_same_bits(
    after: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    local = {**settings["algorithm"]["local"], "keep_optimizer": True}
    spec = experiment(
        settings,
        baselines=["alone"],
        evaluate_every=1,
        algorithm={"name": "feddpo", "local": local},
    )
    run(spec, tmp_path / "whole")
    leave(spec, tmp_path / "broken", after)
    resume(tmp_path / "broken")
    assert_same_adapter(tmp_path / "whole", tmp_path / "broken")
    for name in ("metrics.jsonl", "baselines/alone/metrics.jsonl", "evaluation.jsonl"):
        whole, broken = (
            RunDirectory(tmp_path / side).read_rows(name) for side in ("whole", "broken")
        )
        timeless = [
            [{key: row[key] for key in row if not key.startswith("seconds")} for row in rows]
            for rows in (whole, broken)
        ]
        assert timeless[0] == timeless[1]


@pytest.mark.long
def test_any_number_of_workers_ends_with_the_same_bits(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    task = {**settings["task"], "model": {**settings["task"]["model"], "lora_dropout": 0.1}}
    results = [
        run(
            experiment(settings, task=task, workers=count, baselines=["pooled"]),
            tmp_path / str(count),
        )
        for count in (1, 2, 3)
    ]
    for result in results[1:]:
        assert_same_adapter(results[0].path, result.path)
        # one client trains here, and idle workers share its batches
        assert_same_adapter(*(one.path / "baselines/pooled" for one in (results[0], result)))
        assert result.evaluations == results[0].evaluations


def test_jobs_are_shared_out_among_forks(tmp_path: Path) -> None:
    def job(number: int) -> tuple[int, int]:
        if number == 21:
            raise UserError("row 21")
        return number, os.getpid()

    def jobs(count: int) -> list[Any]:
        return [partial(job, number) for number in range(count)]

    done = list(forked(2, jobs(20)))
    assert [number for number, _ in done] == list(range(20))
    assert len({process for _, process in done}) > 2, "a fork lives for some of the jobs"
    assert os.getpid() in {process for _, process in done}
    with pytest.raises(UserError, match="row 21"):
        list(forked(2, jobs(22)))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(forked(2, [list, lambda: 1 / 0]))
    with pytest.raises(UserError, match="has died"):
        list(forked(2, [list, lambda: os._exit(1)]))


@work("test_experiment.names")
def names(client: Any) -> dict[str, float]:
    return {client.shard.name: float(client.id)}


def test_a_failure_in_a_worker_reaches_the_user(settings: dict[str, Any]) -> None:
    spec = experiment(settings)
    task = spec.task.build()
    shards = [task.encode(client) for client in spec.clients()[0]]
    with closing(Simulation(task, shards, seed=0, rounds=1, workers=2)) as engine:
        with pytest.raises(RuntimeError, match=r"in the work of client \d"):
            engine.each(evaluate, {"no such": torch.zeros(1)})
        assert engine.disclose(engine.each(names))[3] == {"client-3": 3.0}


def test_memory_holds_as_many_values_as_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tree = {"x": torch.ones(100)}  # 400 bytes
    per_client._spilled.cache_clear()
    values = StoredValues[Any](1000, ((i, Kept(tree)) for i in range(4)))
    assert len(list(tmp_path.glob(SPILLED))) == 2, "the first two are in memory"
    assert all(torch.equal(values[i]["x"], tree["x"]) for i in values)


SPILLED = "fedpref-spilled-*/*.safetensors"


@pytest.mark.long
def test_what_was_spilled_goes_with_the_process_or_when_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import os, signal, tempfile, torch; tempfile.tempdir = {folder!r}\n"
        "from fedpref.engines.per_client import StoredValues\n"
        "from fedpref.engines.values import Kept\n"
        "values = StoredValues(0, [(0, Kept({{'x': torch.ones(9)}}))])\n"
        "{end}"
    )
    for end, left in (("", 0), ("os.kill(os.getpid(), signal.SIGKILL)", 1)):
        text = program.format(folder=str(tmp_path), end=end)
        subprocess.run([sys.executable, "-c", text])
        assert len(list(tmp_path.glob(SPILLED))) == left
    per_client._spilled.cache_clear()
    values = StoredValues[Any](0, [(0, Kept({"x": torch.zeros(9)}))])
    (file,) = tmp_path.glob(SPILLED)
    assert not trees.load(file)["x"].any(), "the killed process's are gone, and this one's are not"
    del values


@pytest.mark.parametrize("workers", [1, 2])
def test_what_does_not_fit_in_memory_lies_in_files_while_it_is_needed(
    settings: dict[str, Any], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = experiment({**settings, "algorithm": {**settings["algorithm"], "name": "fedsa-lora"}})
    task = spec.task.build()
    shards = [task.encode(client) for client in spec.clients()[0]]
    shards = [task.prepare(shard, tmp_path / "cache") for shard in shards]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    per_client._spilled.cache_clear()
    algorithm: Any = spec.algorithm
    states, kept = {}, {}
    for room in (1024, 0):
        with closing(
            Simulation(task, shards, seed=0, rounds=2, workers=workers, spill_above_mb=room)
        ) as engine:
            state = algorithm.init(engine, task.init(seeds.generator(0, "init")))
            for number in range(2):
                engine.begin(number, engine.clients[number:])
                state, _ = algorithm.step(engine, state)
            engine.save({"own": state.own}, tmp_path / f"{room}/.round-000002")
            kept[room] = Store(tmp_path / f"{room}").load(
                tmp_path / f"{room}/.round-000002", ["own"]
            )["own"]
            states[room] = state.adapter
        spilled = len(list(tmp_path.glob(SPILLED)))
        assert spilled == (2 * len(shards) if room == 0 else 0), (
            "each client's own factors and place in its data, and no trace of its messages"
        )
        del state
        assert not list(tmp_path.glob(SPILLED))
    for i in range(len(shards)):
        a, b = ({**states[room], **kept[room][i].value} for room in (0, 1024))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    spec = config.parse(
        Experiment,
        {**settings, "rounds": 12, "federation": {"clients_per_round": 3}, "workers": 2},
        "test",
    )
    run(spec, tmp_path / "whole")
    broken = tmp_path / "broken"
    process = other_processes().Process(target=run, args=(spec, broken))
    process.start()
    while len(metrics(broken)) < 3 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (broken / "done").exists()
    resume(broken)
    assert_same_adapter(tmp_path / "whole", broken)
    assert [row["round"] for row in metrics(broken)] == list(range(1, 13))


def test_a_finished_run_can_be_resumed_without_harm(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    first = run(experiment(settings), tmp_path / "run")
    assert resume(tmp_path / "run") == first


def test_a_row_that_a_crash_cut_short_does_not_damage_the_next(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path)
    sizes = {"seconds": 1.0, "bytes_up": 1, "bytes_down": 1}
    rows = [{"round": number, "loss": 0.5, **sizes} for number in range(3)]
    folder.append(METRICS, rows[0])
    with (tmp_path / METRICS).open("a") as file:
        file.write(json.dumps(rows[1])[:9])
    folder.append(METRICS, rows[1])
    folder.append(METRICS, rows[2])
    assert folder.read_rows(METRICS) == rows


def test_ties_count_half(settings: dict[str, Any], learner: Any, tmp_path: Path) -> None:
    """A fresh adapter changes nothing, so against the padded form's exact copy of the reference
    every pair is a tie.
    """
    shard = learner.encode(experiment(settings).clients()[0][0])
    shard = replace(shard, test=shard.test[:1])
    adapter = learner.init(seeds.generator(0, "init"))
    scores = learner.language.log_probabilities(
        adapter, [(shard.test[0].prompt, shard.test[0].answers)]
    )
    learner._base_scores |= dict(zip(shard.test[0].keys, scores.tolist(), strict=True))
    measured = learner.evaluate(adapter, shard)
    assert (measured["rewards/accuracies"], measured["rewards/margins"]) == (0.5, 0.0)
    assert measured["loss"] == pytest.approx(math.log(2))


def told(path: Path, content: dict[str, str], spec: Experiment) -> bool:
    """Whether a run that began with this goes on."""
    file = path / "frozen.json"
    before = file.read_text()
    file.write_text(json.dumps(content))
    try:
        refuse_other(RunDirectory(path), frozen(spec.build_task()))
    except UserError:
        return False
    finally:
        file.write_text(before)
    return True


def test_a_run_goes_on_with_the_model_that_it_began_with(
    settings: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    model = {**settings["task"]["model"], "path": str(folder)}
    spec = experiment(settings, task={**settings["task"], "model": model})
    leave(spec, tmp_path / "run", 3)
    weights = load_file(folder / "model.safetensors")
    first = sorted(weights)[0]
    kept = weights[first].clone()
    weights[first] += 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model: this is not what the run began with"):
        resume(tmp_path / "run")
    said = json.loads((tmp_path / "run/frozen.json").read_text())
    other = {**said, "read_by": "cpu torch.float32, transformers 4.0"}
    assert told(tmp_path / "run", other, spec), "read otherwise, nothing can be told"
    weights[first] = kept
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert resume(tmp_path / "run").path == tmp_path / "run"
    weights[first] = kept + 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="model: this is not what the run began with"):
        export(tmp_path / "run", "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rounds": 1}, "settings/rounds"),
        ({"rounds": 5}, "settings/rounds"),
        ({"seed": 1}, "settings/seed"),
        ({"algorithm": {"name": "choco"}}, "settings/algorithm"),
        ({"evaluate_every": 1, "checkpoint_every": 2, "workers": 1}, None),
    ],
)
def test_a_run_goes_on_by_the_settings_that_it_began_with(
    change: dict[str, Any], told: str | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = experiment(settings, rounds=3, workers=1)
    leave(spec, tmp_path / "run", 4)
    file = tmp_path / "run/config.yaml"
    began = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**began, **change}))
    if told is None:
        assert resume(tmp_path / "run").path == tmp_path / "run"
        return
    with pytest.raises(UserError, match=f"{told}: this is not what the run began with"):
        resume(tmp_path / "run")


def test_a_run_with_any_baseline_goes_on_from_its_main_line(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    baselines = ["feddpo", "alone-parts"]
    spec = experiment(settings, rounds=2, baselines=baselines, algorithm={"name": "fedpdpo"})
    leave(spec, tmp_path / "run", 4)
    assert not (tmp_path / "run/baselines").exists()
    assert set(FinishedRun.at(tmp_path / "run").lines) == {"fedpdpo", *baselines}
    resume(tmp_path / "run")
    assert all((tmp_path / f"run/baselines/{name}/done").exists() for name in baselines)


def test_what_clients_keep_is_not_begun_anew_where_its_index_is_gone(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = experiment(settings, rounds=3, algorithm={"name": "fedpdpo"})
    leave(spec, tmp_path / "run", 4)
    checkpoint = RunDirectory(tmp_path / "run").checkpoints()[-1]
    index, kept = checkpoint / "values.json", (checkpoint / "values.json").read_bytes()
    index.unlink()
    with pytest.raises(UserError, match=r"values\.json: this file of the run's checkpoint is gone"):
        resume(tmp_path / "run")
    index.write_bytes(kept)
    resume(tmp_path / "run")


def test_losses_without_a_reference_need_no_scores(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = experiment(settings, task={**settings["task"], "loss": {"name": "simpo"}})
    result = run(spec, tmp_path / "run")
    assert not (result.path / "cache").exists()
    assert PreferenceTask().loss.needs_reference


def test_an_evaluation_before_the_first_round_changes_nothing_after_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    plain, asked = (
        run(experiment(settings, evaluate_on_start=start), tmp_path / str(start)).path
        for start in (False, True)
    )
    assert_same_adapter(plain, asked)
    rows = RunDirectory(asked).read_rows("evaluation.jsonl")
    assert [row["round"] for row in rows] == [0, 3]
    assert rows[1] == RunDirectory(plain).read_rows("evaluation.jsonl")[-1]
    assert {row["rewards/accuracies"] for row in rows[0]["clients"].values()} == {0.5}, (
        "an untrained adapter chooses nothing"
    )
