"""Groups' rewards of answers, and one reward of many."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_rows, write_rows
from fedpref import cli, config, run
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.rewards import AdaptiveAlpha, Maximum, Mean, Minimum
from fedpref.rewards.reward import called
from fedpref.runs.group_rewards import group_rewards
from fedpref.tasks.group_reward import CombinedReward

REWARDS = torch.tensor([[0.9, 0.2], [0.85, 0.3], [0.4, 0.7]], dtype=torch.float64)


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on comparisons: each client likes answers with a word of its own."""
    folder = tmp_path_factory.mktemp("reward")
    rows = write_rows(folder / "rows.jsonl", make_rows([60, 60]))
    content = {
        "data": {"name": "files", "path": str(rows)},
        "task": {
            "name": "opinion",
            "model": {"path": str(tiny), "dtype": "float32"},
            "predictor": {
                "width": 32,
                "layers": 2,
                "heads": 2,
                "feedforward": 32,
                "embedder_layers": 2,
            },
        },
        "algorithm": {
            "name": "pluralllm",
            "local": {"steps": 10, "batch_size": 4, "learning_rate": 0.003, "warmup_ratio": 0.1},
        },
        "rounds": 12,
    }
    return run(config.parse(Experiment, content, "test"), folder / "run").path


def test_a_group_prefers_in_new_answers_what_it_has_preferred_before(finished: Path) -> None:
    rewards = group_rewards(finished)
    assert list(rewards) == ["client-0", "client-1"]
    held_out = make_rows([20, 20], seed=9)
    right = []
    for row in held_out:
        pair = [row["chosen"], row["rejected"]]
        found = rewards[row["client"]]([row["prompt"]] * 2, pair)
        assert sum(found) == pytest.approx(1, abs=1e-5)
        right.append(found[0] > found[1])
    assert sum(right) / len(right) > 0.65


def test_rewards_do_not_depend_on_what_else_is_in_the_call(finished: Path) -> None:
    reward = group_rewards(finished, ["client-1"])["client-1"]
    prompts, completions = ["A?", "B?", "A?", "B?"], [" mill", " rope", " stone", " river lamp"]
    whole = reward(prompts, completions)
    for prompt, places in (("A?", (0, 2)), ("B?", (1, 3))):
        apart = reward([prompt] * 2, [completions[i] for i in places])
        assert apart == pytest.approx([whole[i] for i in places], abs=1e-5)
    logits = group_rewards(finished, ["client-1"], "logit")["client-1"](prompts, completions)
    assert torch.tensor([logits[0], logits[2]]).softmax(0).tolist() == pytest.approx(
        [whole[0], whole[2]], abs=1e-5
    )
    with pytest.raises(UserError, match="only one"):
        reward(["A?"], [" mill"])


def test_rewards_without_bounds_are_not_weighed_by_how_groups_fare(finished: Path) -> None:
    assert CombinedReward(group_rewards(finished), AdaptiveAlpha())(["A?"] * 2, [" a", " b"])
    with pytest.raises(UserError, match="which logits are not"):
        CombinedReward(group_rewards(finished, kind="logit"), AdaptiveAlpha())


def test_it_has_the_signature_of_trls_reward_functions(finished: Path) -> None:
    groups = group_rewards(finished)
    combined = CombinedReward(groups, Minimum())
    messages = [[{"role": "user", "content": "A?"}]] * 2
    answers = [[{"role": "assistant", "content": text}] for text in ("mill", "rope")]
    for function in (combined, *groups.values()):
        found = function(
            prompts=messages, completions=answers, completion_ids=[[1], [2]], trainer_state=None
        )
        assert len(found) == 2
        assert all(isinstance(value, float) for value in found)
        assert function.__name__.startswith("reward/")


def test_one_completion_has_a_logit_and_conversations_are_scored(
    finished: Path, tmp_path: Path
) -> None:
    messages = {
        "prompt": [{"role": "user", "content": "A?"}],
        "completions": [[{"role": "assistant", "content": "mill"}]],
    }
    file = str(
        write_rows(tmp_path / "answers.jsonl", [{"prompt": "A?", "completion": " mill"}, messages])
    )
    ran = CliRunner().invoke(cli.app, ["reward", str(finished), file, "--logits"])
    assert ran.exit_code == 0, ran.output
    assert all(math.isfinite(row["reward"][0]) for row in lines(ran.output))


def test_a_reward_that_is_no_number_is_a_sentence() -> None:
    def texts(prompts: Any, completions: Any) -> list[str]:
        return ["good"] * len(completions)

    def broken(prompts: Any, completions: Any) -> list[float]:
        return [len(None)]  # type: ignore[arg-type]

    with pytest.raises(UserError, match="has returned \\['good'\\]"):
        called(texts, "task.rewards.x", ["?"], ["a"], {}, [[1]])
    with pytest.raises(UserError, match=r"test_rewards\.py, line \d+"):
        called(broken, "task.rewards.x", ["?"], ["a"], {}, [[1]])


def test_a_coroutine_is_a_reward_and_none_is_not() -> None:
    async def polite(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [float("please" in text) for text in completions]

    async def within() -> list[float]:
        return called(polite, "task.rewards.x", ["?"], ["please"], {}, [[1]])

    assert called(polite, "task.rewards.x", ["?"] * 2, ["please", "no"], {}, [[1]] * 2) == [1, 0]
    assert asyncio.run(within()) == [1]

    def some(prompts: Any, completions: Any) -> list[Any]:
        return [None, 1.0]

    with pytest.raises(UserError, match="None is no reward here"):
        called(some, "task.rewards.x", ["?"] * 2, ["a", "b"], {}, [[1]] * 2)


def test_means_and_extremes() -> None:
    assert Mean()(REWARDS).tolist() == pytest.approx([0.716667, 0.4], abs=1e-5)
    assert Minimum()(REWARDS).tolist() == [0.4, 0.2]
    assert Maximum()(REWARDS).tolist() == [0.9, 0.7]


def test_adaptive_alpha_as_published_and_rescaled() -> None:
    """The case r = (.9, .85, .4), h = (.8, .8, .3): about 0.153 as published, against a mean of
    0.717.
    """
    one, history = REWARDS[:, :1], torch.tensor([0.8, 0.8, 0.3], dtype=torch.float64)
    found = {}
    for rescale in (False, True):
        combine = AdaptiveAlpha(threshold=1.0, rescale=rescale)
        combine.history = history.tolist()
        found[rescale] = float(combine(one))
    assert found[False] == pytest.approx(0.153, abs=5e-4)
    alpha = torch.softmax((1 - history) / 0.1, 0)
    assert found[True] == pytest.approx(float(alpha @ one[:, 0]))
    assert 0.4 <= found[True] <= 0.9


def test_histories_lift_groups_that_fared_badly_and_fair_batches_take_the_mean() -> None:
    combine = AdaptiveAlpha(threshold=0.99, decay=0.8, fares_by="mean")
    first, second = combine(REWARDS[:, :1]), combine(REWARDS[:, :1])
    # the third group, to whom this answer is worth least, counts more
    assert float(second) < float(first)
    assert combine.history == pytest.approx([0.36 * r for r in (0.9, 0.85, 0.4)])
    assert combine.batches == 2
    fair = torch.full((3, 2), 0.1, dtype=torch.float64)
    assert combine(fair).tolist() == pytest.approx([0.1, 0.1])
    assert combine.batches == 3, "a fair batch counts in the history too"
    plain = AdaptiveAlpha(fares_by="mean")
    for batch in (REWARDS, 2 * REWARDS, 3 * REWARDS):
        plain(batch)
    assert plain.history == pytest.approx((2 * REWARDS.mean(1)).tolist())


def test_groups_whose_answers_never_win_come_to_count_more() -> None:
    """Shares of a prompt's answers, of which two groups like one and the third another."""
    shares = torch.tensor([[0.7, 0.3], [0.65, 0.35], [0.2, 0.8]], dtype=torch.float64)
    combine = AdaptiveAlpha(threshold=1.0, decay=0.8)
    winners = [int(combine(shares).argmax()) for _ in range(20)]
    assert winners[0] == 0
    assert 0.25 < sum(winners) / len(winners) < 0.75, "its answer wins as well, once it has lost"
    by_mean = AdaptiveAlpha(threshold=1.0, decay=0.8, fares_by="mean")
    assert [by_mean(shares).tolist() for _ in range(5)][-1] == pytest.approx(
        shares.mean(0).tolist()
    ), "means of shares tell nothing"


def test_both_published_indices_of_fairness() -> None:
    cov = math.sqrt(float(REWARDS[:, 0].var(correction=0))) / float(REWARDS[:, 0].mean())
    one = REWARDS[:, :1]
    assert AdaptiveAlpha().index(one) == pytest.approx(1 / (1 + cov**2))
    assert AdaptiveAlpha(fairness="cov").index(one) == pytest.approx(1 / (1 + cov))


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_files_are_scored_from_the_command_line(finished: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "A?", "completions": [" mill", " rope", " stone"]},
        {"prompt": "B?", "chosen": " river", "rejected": " lamp"},
    ]
    file = str(write_rows(tmp_path / "answers.jsonl", rows))
    ran = CliRunner().invoke(
        cli.app,
        ["reward", str(finished), file, "--combine", "{name: alpha, decay: 0.8, threshold: 0.99}"],
    )
    assert ran.exit_code == 0, ran.output
    first, second = lines(ran.output)
    assert first["rewards"].keys() == {"client-0", "client-1"}
    assert [len(first["reward"]), len(second["reward"])] == [3, 2]
    assert second["completions"] == [" river", " lamp"]
    one = lines(
        CliRunner()
        .invoke(cli.app, ["reward", str(finished), file, "--group", "client-0", "--combine", "min"])
        .output
    )
    assert one[0]["reward"] == pytest.approx(first["rewards"]["client-0"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "row", "complaint"),
    [
        (
            ["--group", "nobody"],
            {"prompt": "A?", "completions": ["a", "b"]},
            r"\['nobody'\] are no groups",
        ),
        ([], {"prompt": "A?", "completions": ["a"]}, "line 1: expected prompt, and completions"),
        (
            ["--combine", "{name: alpha, temperature: 0}"],
            {"prompt": "A?", "completions": ["a", "b"]},
            "temperature",
        ),
        (["--combine", "best"], {"prompt": "A?", "completions": ["a", "b"]}, "combine"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    arguments: list[str], row: dict[str, Any], complaint: str, finished: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "answers.jsonl", [row])
    ran = CliRunner().invoke(cli.app, ["reward", str(finished), str(file), *arguments])
    assert isinstance(ran.exception, UserError)
    with pytest.raises(UserError, match=complaint):
        raise ran.exception


def test_a_policy_follows_what_groups_of_a_finished_run_prefer(
    finished: Path, tiny: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([8, 8]))
    content = {
        "data": {"name": "files", "path": str(rows)},
        "task": {
            "name": "dialogue",
            "model": {"path": str(tiny), "dtype": "float32", "lora_r": 2},
            "rewards": {"folk": {"name": "groups", "run": str(finished)}},
            "num_generations": 2,
            "sampling": {"max_completion_length": 4},
            "evaluation_prompts": 2,
        },
        "algorithm": {"name": "firm", "local": {"steps": 1, "batch_size": 2}},
        "rounds": 1,
        "workers": 1,
    }
    spec, path = config.parse(Experiment, content, "test"), tmp_path / "run"
    run(spec, path)
    clients = FinishedRun.at(path).last_evaluation["clients"]
    shares = [row["rewards/folk"] for row in clients.values()]
    assert all(0 < share < 1 for share in shares)
    file = path / "frozen.json"
    began = json.loads(file.read_text())
    assert {"rewards/folk/client-0", "rewards/folk/client-1"} < began.keys()
    file.write_text(json.dumps({**began, "rewards/folk/client-0": "another"}))
    opened = FinishedRun.at(path).opened(spec.read().clients, path / "cache")
    with pytest.raises(UserError, match="rewards/folk/client-0: this is not what the run"), opened:
        pass
