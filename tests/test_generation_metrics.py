"""What a model's own answers are like, before training and after."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpref import Experiment, UserError, config, run
from fedpref.models.generation import Sampling, generate
from fedpref.numerics import seeds
from fedpref.reports.page import write_report
from fedpref.reports.tables import answer_table
from fedpref.rewards import Taste
from fedpref.rewards.taste import STYLES, Styles
from fedpref.tasks.generation_metrics import before_and_after

REQUESTS = Path(__file__).parent.parent / "src/fedpref/data/builtin/requests.jsonl"
RIVERS = {"rivers": {"name": "pattern", "pattern": "river", "most": 4}}


def spec_of(settings: dict[str, Any], generation: dict[str, Any]) -> Experiment:
    answers = {"prompts": 3, "max_completion_length": 12, **generation}
    task = {**settings["task"], "generation": answers}
    return config.parse(Experiment, {**settings, "task": task}, "test")


@pytest.mark.long
def test_a_run_measures_its_models_answers_once_at_the_end(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    generation = {"rewards": RIVERS, "judge": {"name": "length", "target": 4}}
    content = config.dump(spec_of(settings, generation))
    content |= {"evaluate_every": 1, "baselines": ["alone"]}
    found = run(config.parse(Experiment, content, "test"), tmp_path / "run").evaluations
    rows = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").open()]
    assert not any("generation/" in name for name in rows[0]["summary"])
    for line in ("feddpo", "alone"):
        for metrics in found[line].values():
            figures = before_and_after(metrics)
            assert figures.keys() == {
                "rivers", "length", "distinct_2", "win_rate", "kl", "perplexity"
            }  # fmt: skip
            assert 0 <= figures["win_rate"][1] <= 1
            assert figures["win_rate"][0] is figures["kl"][0] is None, "of both together"
            assert 1 <= figures["length"][1] <= 12
    # what is said of the backbone is the same whoever trains
    first, second = (
        {n: v for n, v in next(iter(found[line].values())).items() if n.endswith("_before")}
        for line in ("feddpo", "alone")
    )
    assert first == second
    assert first.keys() >= {"generation/rivers_before", "generation/perplexity_before"}
    assert answer_table(found) is not None
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "What the models&#39; own answers are like" in page or "own answers are like" in page
    summary = rows[-1]["summary"]["generation/perplexity"]
    values = [m["generation/perplexity"] for m in found["feddpo"].values()]
    assert summary["worst"] == max(values), "low is good"


def test_figures_are_what_they_say(settings: dict[str, Any]) -> None:
    spec = spec_of(settings, {"rewards": RIVERS, "judge": RIVERS["rivers"]})
    task: Any = spec.build_task()
    shard = task.encode(spec.clients()[0][0])
    params = task.init(seeds.generator(0, "init"))
    still = task.generated(params, shard)
    assert still["generation/kl"] == pytest.approx(0, abs=1e-4), "untrained, it is the backbone"
    assert still["generation/win_rate"] == 0.5
    assert still["generation/perplexity"] == pytest.approx(still["generation/perplexity_before"])
    moved = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in params.items()}
    figures = task.generated(moved, shard)
    prompts = [one.prompt for one in task._asked(shard, 3)]
    rng = seeds.generator(0, "generation")
    answers = generate(task.language, moved, prompts, 1, Sampling(max_completion_length=12), rng)
    assert figures["generation/length"] == pytest.approx(sum(map(len, answers)) / 3)
    rows = [(prompt, (answer,)) for prompt, answer in zip(prompts, answers, strict=True)]
    ours, base = (task.language.score(which, rows)[0] for which in (moved, None))
    assert figures["generation/kl"] == pytest.approx(float((ours - base).mean()), rel=1e-4)
    passages = task._generations.passages
    each = [task.language.score(moved, [(p[:1], (p[1:],))])[0].item() for p in passages]
    per_token = -sum(each) / sum(len(p) - 1 for p in passages)
    assert figures["generation/perplexity"] == pytest.approx(math.exp(per_token), rel=1e-4)


def test_groups_judge_an_answer_beside_the_one_before(settings: dict[str, Any]) -> None:
    groups = {"name": "groups", "run": "nowhere"}
    with pytest.raises(UserError, match="'folk' compares answers to one prompt"):
        spec_of(settings, {"rewards": {"folk": groups}})
    with pytest.raises(UserError, match="alpha leans on a history"):
        spec_of(settings, {"judge": {**groups, "combine": {"name": "alpha"}}})

    def shares(prompts: Any, completions: Any, **_: Any) -> list[float]:
        assert all(prompts.count(prompt) == 2 for prompt in prompts)
        return [float(len(str(text))) for text in completions]

    spec = spec_of(settings, {"judge": groups})
    task: Any = spec.task.build(lambda *_: shares)
    shard = task.encode(spec.clients()[0][0])
    found = task.generated(task.init(seeds.generator(0, "init")), shard)
    assert found["generation/win_rate"] == 0.5


def test_the_shipped_judge_knows_styles_that_it_was_not_fitted_to() -> None:
    requests = [json.loads(line) for line in REQUESTS.open()]
    held = [a for r in requests if r["split"] == "test" for a in r["answers"]]
    judged = [Styles()(answer["text"]) for answer in held]
    for k, style in enumerate(STYLES):
        right = sum(
            (scores[k] > 0) == (a[style] > 0) for scores, a in zip(judged, held, strict=True)
        )
        assert right / len(held) > 0.9, style


def test_a_taste_prefers_what_its_client_does() -> None:
    reward = Taste().build()
    answers = ["Kindly permit me to suggest that one might possibly wait.", "Hey, just do it now!"]
    formal, casual = reward(prompts=["", ""], completions=answers, client=["bank", "bank"])
    assert formal > casual
    formal, casual = reward(prompts=["", ""], completions=answers, client=["youth-club"] * 2)
    assert casual > formal
    for columns in ({"client": ["nobody"]}, {}):
        with pytest.raises(UserError, match="clients of the shipped set"):
            reward(prompts=[""], completions=["a"], **columns)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"rewards": {"kl": {"name": "distinct"}}}, "'kl' is the name of another figure"),
        ({"neutral": "nowhere.txt"}, r"task.generation.neutral: nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(
    generation: dict[str, Any], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        spec_of(settings, generation).build_task()
