"""Aligning again: the policy's own answers, judged, beside the pairs that were given."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_rows
from fedpref import Experiment, UserError, config, run
from fedpref.data import ClientData, Preference
from fedpref.data.parsing import parse
from fedpref.experiments.clients import pooled
from fedpref.experiments.rounds import events, new_directory
from fedpref.experiments.run_directory import RunDirectory
from fedpref.numerics import seeds, trees
from fedpref.sites.consent import Consenting, SiteFile
from fedpref.tasks import BatchSize, OnlinePreferenceTask
from fedpref.tasks.examples import Example
from fedpref.tasks.online import OnlinePreferenceLearner, kept, restored

SHORT = {"max_completion_length": 6}


def likes_long(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def likes_all(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def likes_given(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The judge that always agrees with the pairs that were given."""
    return [
        float(text.strip() == wanted.strip())
        for text, wanted in zip(completions, columns["wanted"], strict=True)
    ]


def made(tiny: Path, judge: str = "likes_long", **settings: Any) -> OnlinePreferenceLearner:
    content = {
        "model": {"path": str(tiny), "dtype": "float32"},
        "judge": {"name": "function", "path": f"test_online:{judge}"},
        "sampling": SHORT,
        **settings,
    }
    learner = config.parse(OnlinePreferenceTask, content, "test").build()
    learner.move_to(0)
    return learner


def client(count: int = 8) -> ClientData:
    rows = tuple(
        Preference(row["prompt"], row["chosen"], row["rejected"], str(k), {"wanted": row["chosen"]})
        for k, row in enumerate(make_rows([count]))
    )
    return ClientData("a", rows, rows[:1])


def drawn(learner: OnlinePreferenceLearner, size: BatchSize, shard: Any, seed: int = 0) -> Any:
    theta = learner.init(seeds.generator(0, "init"))
    return learner.draw(theta, theta, shard, size, seeds.generator(seed, "draw"))


def test_the_judges_favourite_is_preferred_to_what_it_likes_least(tiny: Path) -> None:
    learner = made(tiny, replay=0.0, num_generations=4)
    shard = learner.encode(client())
    size = BatchSize(6)
    batch = drawn(learner, size, shard)
    assert batch.judged > 0
    for example in batch.examples[: batch.judged]:
        prompt, better, worse = learner.texts(example)
        assert len(better) > len(worse)
        assert prompt.startswith("Which fish")
    assert restored(size.kept["pairs"]) == list(batch.examples[: batch.judged])
    _, metrics = learner.losses(learner.init(seeds.generator(0, "init")), batch)
    assert metrics["num_judged"] == batch.judged
    assert metrics["num_pairs"] == 6


ASKED: list[tuple[Any, ...]] = []


def noted(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    ASKED.append((prompts, completions, columns))
    return [0.0] * len(completions)


def test_judges_are_given_conversations_as_messages_and_all_columns(tiny: Path) -> None:
    learner = made(tiny, "noted", replay=0.0)
    learner.language.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    )
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("I am.", "None.")]
    rows = tuple(
        parse({"prompt": talk, "chosen": answers[0], "rejected": answers[1], **more}, f"row {k}")
        for k, more in enumerate(({}, {"answer": "42"}))
    )
    shard = learner.encode(ClientData("a", rows, rows[:1]))
    ASKED.clear()
    drawn(learner, BatchSize(2), shard)
    ((prompts, completions, columns),) = ASKED
    assert all(prompt == talk for prompt in prompts)
    assert all([one["role"] for one in answer] == ["assistant"] for answer in completions)
    assert sorted(columns) == ["answer", "client", "completion_ids"]
    decode = learner.language.tokenizer.decode
    said = [decode(ids, skip_special_tokens=True) for ids in columns["completion_ids"]]
    assert said == [answer[0]["content"] for answer in completions]
    assert set(columns["answer"]) == {None, "42"}


def test_the_reference_of_what_was_drawn_is_the_base_models(tiny: Path) -> None:
    learner = made(tiny, replay=0.0)
    batch = drawn(learner, BatchSize(4), learner.encode(client()))
    rows = [(example.prompt, list(example.answers)) for example in batch.examples]
    scores = learner.language.log_probabilities(None, rows)
    assert torch.allclose(batch.reference.flatten().float(), scores.float(), atol=1e-4)


def test_where_the_judge_likes_all_alike_the_given_pair_stays(tiny: Path) -> None:
    learner = made(tiny, "likes_all", replay=0.0)
    shard = learner.encode(client())
    batch = drawn(learner, BatchSize(4), shard)
    assert batch.judged == 0
    assert set(batch.examples) <= set(shard.train)


class Answering(OnlinePreferenceLearner):
    """A policy whose answers are the two of the given pair, the worse one first."""

    def answers(self, params: Any, given: Sequence[Example], rng: Any) -> list[Any]:
        return [[example.answers[1], example.answers[0]] for example in given]


def test_with_a_judge_that_agrees_with_the_old_pairs_it_is_the_preference_task(tiny: Path) -> None:
    settings = made(tiny, "likes_given", replay=0.0).settings
    agreeing, given = Answering(settings), made(tiny, replay=1.0)
    batches = []
    for learner in (agreeing, given):
        learner.move_to(0)
        shard = learner.encode(client())
        batches.append(drawn(learner, BatchSize(4), shard))
        theta = learner.init(seeds.generator(0, "init"))
        batches.append(learner.losses(theta, batches[-1])[0])
    assert batches[0].judged == 4
    assert sorted(map(str, batches[0].examples)) == sorted(map(str, batches[2].examples))
    assert torch.allclose(batches[1], batches[3])


def test_replay_is_of_given_pairs_and_of_those_that_were_judged(tiny: Path) -> None:
    learner = made(tiny, replay=0.5, draw_every=2, memory=5)
    shard = learner.encode(client())
    size = BatchSize(8)
    judged, replayed = [], 0
    for turn in range(6):
        before = restored(size.kept.get("pairs"))
        batch = drawn(learner, size, shard, turn)
        judged.append(batch.judged)
        assert set(batch.examples[batch.judged :]) <= {*shard.train, *before}
        replayed += sum(example in before for example in batch.examples[batch.judged :])
        assert len(restored(size.kept["pairs"])) <= 5
    assert judged[1::2] == [0, 0, 0], "every second batch is all replay"
    assert all(0 < count <= 4 for count in judged[::2])
    assert replayed > 0
    assert int(size.kept["turn"]) == 6


def test_long_and_short_prompts_are_answered_alike(tiny: Path) -> None:
    settings = made(tiny, "likes_given", replay=0.5).settings
    learner = Answering(settings)
    learner.move_to(0)
    rows = [{**row, "prompt": "Which fish? " * (k + 1)} for k, row in enumerate(make_rows([8]))]
    pairs = tuple(
        Preference(row["prompt"], row["chosen"], row["rejected"], str(k), {"wanted": row["chosen"]})
        for k, row in enumerate(rows)
    )
    shard = learner.encode(ClientData("a", pairs, pairs[:1]))
    answered: list[int] = []
    for seed in range(40):
        batch = drawn(learner, BatchSize(8), shard, seed)
        answered += [len(one.prompt) for one in batch.examples[: batch.judged]]
    assert len(answered) == 4 * 40
    middle = sorted(len(example.prompt) for example in shard.train)[4]
    assert 0.35 < sum(length >= middle for length in answered) / len(answered) < 0.65


def test_a_judge_is_asked_for_whose_pair_it_is_where_data_are_pooled(tiny: Path) -> None:
    asked: list[str] = []

    def judge(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        asked.extend(columns["client"])
        return [float(len(completion)) for completion in completions]

    learner = made(tiny, replay=0.0)
    learner.judge = judge
    shards = [learner.encode(replace(client(3), name=name)) for name in ("ann", "bob")]
    together = pooled(shards, ())[0]
    drawn(learner, BatchSize(6), together)
    assert {asked.count(name) for name in ("ann", "bob")} == {2 * 3}


def test_what_is_kept_is_restored() -> None:
    pairs = deque([Example((1, 2, 3), ((4,), (5, 6))), Example((7,), ((8, 9), ()))])
    assert restored(kept(pairs)) == list(pairs)
    assert restored(kept([])) == []
    assert restored(None) == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"judge": None}, "judge"),
        ({"num_generations": 1}, "two answers"),
        ({"objective_column": "a", "objective_names": ["b", "c"]}, "one judge is one objective"),
        (
            {"judge": {"name": "groups", "run": "x", "combine": {"name": "alpha"}}},
            "history of batches",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], why: str) -> None:
    content = {"judge": {"name": "length"}, **settings}
    with pytest.raises(UserError, match=why):
        config.parse(OnlinePreferenceTask, content, "test")


# ---- runs


@pytest.fixture
def content(settings: dict[str, Any]) -> dict[str, Any]:
    task = {
        **settings["task"],
        "name": "online-preference",
        "judge": {"name": "function", "path": "test_online:likes_long"},
        "sampling": SHORT,
    }
    return {**settings, "task": task, "partition": {"name": "natural", "column": "client"}}


def trained(content: dict[str, Any], folder: Path) -> Any:
    return run(config.parse(Experiment, content, "test"), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = [*folder.glob("adapter/*.safetensors"), *folder.glob("clients/*/*.safetensors")]
    return {
        f"{file.relative_to(folder)} {name}": tensor
        for file in found
        for name, tensor in trees.load(file).items()
    }


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("algorithm", ["feddpo", "fedpdpo", "decdpo"])
@pytest.mark.long
def test_algorithms_run_it_unchanged_and_resume_to_the_same_bits(
    algorithm: str, content: dict[str, Any], tmp_path: Path
) -> None:
    own: dict[str, Any] = {"parts": {"head": None, "bottleneck": 0, "adapter": True}}
    extra = own if algorithm == "fedpdpo" else {}
    content["algorithm"] = {**content["algorithm"], "name": algorithm, **extra}
    trained({**content, "workers": 2}, tmp_path / "whole")
    spec = config.parse(Experiment, content, "test")
    directory = new_directory(spec, tmp_path / "parted")
    for event in events(spec, directory):
        if event.kind == "round" and event.done == 2:
            break
    for _ in events(spec, RunDirectory(tmp_path / "parted")):
        pass
    assert same(tmp_path / "whole", tmp_path / "parted")
    rows = RunDirectory(tmp_path / "whole").read_rows("metrics.jsonl")
    assert all(row["num_judged"] > 0 for row in rows)


def test_all_replay_is_the_run_of_given_pairs(content: dict[str, Any], tmp_path: Path) -> None:
    trained({**content, "task": {**content["task"], "replay": 1.0}}, tmp_path / "replay")
    offline = {"name": "preference"}
    offline |= {k: v for k, v in content["task"].items() if k in ("model", "loss")}
    trained({**content, "task": offline}, tmp_path / "given")
    assert same(tmp_path / "replay", tmp_path / "given")


@pytest.mark.slow
def test_over_sites_it_has_the_same_bits(content: dict[str, Any], tmp_path: Path) -> None:
    content["task"]["judge"] = {"name": "length"}
    trained(content, tmp_path / "here")
    trained({**content, "engine": "flare", "sites": 2}, tmp_path / "sites")
    assert same(tmp_path / "here", tmp_path / "sites")


def test_a_site_judges_by_its_own_judge(content: dict[str, Any], tmp_path: Path) -> None:
    data = config.parse(Experiment, content, "test").data
    file = SiteFile(
        data=data, algorithms=("feddpo",), models={content["task"]["model"]["path"]: "m"}
    )
    content = {**content, "task": {**content["task"], "judge": {"name": "length"}}}
    seen = Consenting("clinic", file)._spec(content).task.reward_settings()["task.judge"]
    assert seen.name == "length"
    judge = config.parse(OnlinePreferenceTask, {"judge": {"name": "distinct"}}, "t").judge
    own = SiteFile(data=data, algorithms=("feddpo",), models=file.models, judge=judge)
    seen = Consenting("clinic", own)._spec(content).task.reward_settings()["task.judge"]
    assert seen.name == "distinct"
