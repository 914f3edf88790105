"""Groups' opinions: as they stand in files, as a task, and from the command line."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import REAL_DATA, needs_real_data, write_rows
from fedpref import cli, config, run
from fedpref.algorithms import PluralLLM, Pooled
from fedpref.channel import Chain, Stage
from fedpref.data import ClientData, Opinion, Opinions, Polis, Preference
from fedpref.data.opinions import TRAINING_COUNTRIES, UNSEEN_COUNTRIES
from fedpref.engines import Simulation
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.federation.local_training import LocalTraining, rate
from fedpref.models.encoder import Encoder
from fedpref.models.predictor import Predictor
from fedpref.numerics import seeds, trees
from fedpref.runs.group_rewards import group_rewards
from fedpref.tasks import BatchSize, OpinionTask
from fedpref.tasks.alignment import alignment, calibration_error, wasserstein_alignment
from fedpref.tasks.opinion import Question, asking

GROUPS = ("north", "south", "east")
SMALL = {"width": 16, "layers": 1, "heads": 2, "feedforward": 16, "embedder_layers": 2}


def survey(questions: int = 30, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with two to four options, of which each group likes another one."""
    draw = random.Random(seed)
    rows = []
    for number in range(questions):
        options = draw.sample(["often", "never", "at times", "on Sundays"], draw.randint(2, 4))
        selections = {}
        for place, group in enumerate(GROUPS):
            liked = place % len(options)
            selections[group] = [
                0.7 if i == liked else 0.3 / (len(options) - 1) for i in range(len(options))
            ]
        rows.append(
            {
                "question": f"How is it with matter {number}?",
                "options": options,
                "selections": selections,
            }
        )
    return rows


@pytest.fixture(scope="module")
def survey_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("survey") / "survey.jsonl", survey())


@pytest.fixture
def content(survey_file: Path, tiny: Path) -> dict[str, Any]:
    counts = {"context_questions": [3, 8], "target_questions": [3, 8], "evaluation_context": 5}
    return {
        "data": {"name": "opinions", "path": str(survey_file)},
        "partition": {"name": "natural", "column": "group"},
        "task": {
            "name": "opinion",
            "model": {"path": str(tiny), "dtype": "float32"},
            "predictor": SMALL,
            **counts,
        },
        "algorithm": {
            "name": "pluralllm",
            "local": {"steps": 3, "batch_size": 1, "learning_rate": 0.01, "warmup_ratio": 0.0},
        },
        "rounds": 2,
    }


def simulation(
    content: dict[str, Any], cache: Path, clients: int | None = None
) -> tuple[Simulation, Any]:
    spec = config.parse(Experiment, content, "test")
    task = spec.build_task()
    shards = [task.prepare(task.encode(client), cache) for client in spec.clients()[0][:clients]]
    return Simulation(
        task, shards, seed=0, rounds=spec.rounds, weighting=spec.federation.weighting
    ), task


# ---- data


def stringified(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """As Anthropic/llm_global_opinions stores its columns."""
    return [
        {
            "question": r["question"],
            "options": str(r["options"]),
            "selections": f"defaultdict(<class 'list'>, {r['selections']})",
        }
        for r in rows
    ]


def by_group(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "question": r["question"],
            "options": json.dumps(r["options"]),
            "group": group,
            "shares": json.dumps(shares),
        }
        for r in rows
        for group, shares in r["selections"].items()
    ]


@pytest.mark.parametrize("form", [stringified, by_group])
def test_every_form_of_a_survey_is_read_alike(form: Any, survey_file: Path, tmp_path: Path) -> None:
    def said(path: Path) -> set[Any]:
        return {
            (o.prompt, o.options, tuple(round(s, 9) for s in o.shares), o.columns["group"])
            for o in Opinions(path=str(path)).read()
        }

    expected = said(survey_file)
    assert len(expected) == 30 * len(GROUPS)
    rows = form(survey())
    assert said(write_rows(tmp_path / "rows.jsonl", rows)) == expected
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert said(tmp_path / "rows.parquet") == expected
    import csv

    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert said(tmp_path / "rows.csv") == expected


def test_shares_sum_to_one_and_groups_can_be_chosen(survey_file: Path) -> None:
    rows = list(Opinions(path=str(survey_file), groups=("north", "east")).read())
    assert {row.columns["group"] for row in rows} == {"north", "east"}
    assert all(math.isclose(sum(row.shares), 1) for row in rows)
    with pytest.raises(UserError, match=r"says nothing of \['west'\]"):
        list(Opinions(path=str(survey_file), groups=("west",)).read())


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"question": "Q?", "options": ["a", "b"], "selections": {"g": [0.5, 0.3, 0.2]}},
            "2 options, but 3 shares of 'g'",
        ),
        (
            {"question": "Q?", "options": ["a", "a"], "selections": {"g": [0.5, 0.5]}},
            "all different",
        ),
        (
            {"question": "Q?", "options": ["a", "b"], "selections": {"g": [1.5, -0.5]}},
            "not negative",
        ),
        ({"question": "Q?", "options": ["a", "b"], "selections": {"g": ["x", "y"]}}, "no numbers"),
        (
            {"question": "Q?", "options": "[oops", "selections": {"g": [1, 0]}},
            r"column 'options': expected a list",
        ),
        (
            {"question": "Q?", "options": 5, "selections": {"g": [1, 0]}},
            r"column 'options': expected a list",
        ),
        (
            {"question": "Q?", "options": ["a", "b"], "selections": [1, 0]},
            r"column 'selections': expected a mapping",
        ),
        (
            {"question": "Q?", "options": ["a", "b"], "selections": {"g": {"2": 0.9, "1": 0.1}}},
            r"column 'selections': expected a list",
        ),
        (
            {"question": "Q?", "options": ["a", "b"], "group": None, "shares": [1, 0]},
            "names no group",
        ),
        (
            {"query": "Q?", "options": ["a", "b"], "selections": {"g": [1, 0]}},
            "no column 'question'",
        ),
        ({"question": "Q?", "options": ["a", "b"]}, "neither 'selections' nor 'group'"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(
    row: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError, match=complaint) as raised:
        list(Opinions(path=str(path)).read())
    assert "line 1" in str(raised.value)


def test_votes_become_shares_of_each_opinion_group(tmp_path: Path) -> None:
    write_rows(tmp_path / "polis_conversations.jsonl", [{"conv": "park", "topic": "The park"}])
    write_rows(
        tmp_path / "polis_statements.jsonl",
        [
            {"conv": "park", "cid": 0, "text": "More trees."},
            {"conv": "park", "cid": 1, "text": "Fewer."},
        ],
    )
    votes = [
        "conv,participant,opinion_group,votes",
        "park,0,0,0:1 1:-1",
        "park,1,0,0:1",
        "park,2,0,0:0",
        "park,3,1,0:-1",
    ]
    (tmp_path / "polis_votes.csv").write_text("\n".join(votes) + "\n")
    rows = {
        (o.columns["group"], o.prompt): o.shares
        for o in Polis(path=str(tmp_path), min_votes=1).read()
    }
    assert rows[("park/0", "The park: More trees.")] == pytest.approx((2 / 3, 0, 1 / 3))
    assert rows[("park/1", "The park: More trees.")] == (0, 1, 0)
    assert {question for group, question in rows if group == "park/0"} == {
        "The park: More trees.",
        "The park: Fewer.",
    }
    assert {o.columns["group"] for o in Polis(path=str(tmp_path), min_votes=3).read()} == {"park/0"}
    (tmp_path / "polis_votes.csv").write_text("\n".join([*votes, "park,4,,0:1"]) + "\n")
    assert {o.columns["group"] for o in Polis(path=str(tmp_path), min_votes=1).read()} == {
        "park/0",
        "park/1",
    }, "nobody's group is none"
    (tmp_path / "polis_votes.csv").write_text("\n".join([*votes, "park,4,1,0:1.0"]) + "\n")
    with pytest.raises(
        UserError, match=r"expected statement:vote with a vote of 1, -1, 0, found '0:1.0'"
    ):
        list(Polis(path=str(tmp_path)).read())


@needs_real_data
def test_the_countries_of_the_paper_are_all_there() -> None:
    rows = list(Opinions(path=str(REAL_DATA), groups="pluralllm").read())
    assert {row.columns["group"] for row in rows} == set(TRAINING_COUNTRIES + UNSEEN_COUNTRIES)
    assert len(TRAINING_COUNTRIES) == 8
    assert len(UNSEEN_COUNTRIES) == 6


# ---- the task


def test_the_cache_gives_back_the_embeddings_that_were_computed(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = simulation(content, tmp_path)
    embedded = {question: tensor.clone() for question, tensor in first.known.items()}
    monkeypatch.setattr(
        "fedpref.models.encoder.TextEncoder.embed", lambda *_: pytest.fail("computed again")
    )
    _, second = simulation(content, tmp_path)
    assert len(embedded) == 30  # groups share them
    assert all(torch.equal(second.known[question], tensor) for question, tensor in embedded.items())


def test_embeddings_are_means_of_last_hidden_states_whatever_the_batch(tiny: Path) -> None:
    import transformers

    texts = ["A short one.", "This one is rather longer than the other one is.", "Mill."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    model = transformers.AutoModel.from_pretrained(tiny).eval()
    with torch.no_grad():
        expected = torch.stack(
            [
                model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
                for text in texts
            ]
        )
    for size in (4096, 1):
        found = Encoder(path=str(tiny), dtype="float32", tokens_per_batch=size).open().embed(texts)
        assert torch.allclose(found, expected, atol=1e-5)


def test_positions_that_no_token_has_do_not_count(tiny: Path, tmp_path: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=34, **shape
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    encoder = Encoder(path=str(tmp_path / "roberta"), dtype="float32").open()
    assert encoder.longest == 32
    assert encoder.embed(["word " * 200]).isfinite().all()


def test_a_folder_of_sentence_transformers_is_used_as_such(tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    parts = Transformer(str(tiny), model_kwargs={"dtype": torch.float32}), Pooling(32)
    model = SentenceTransformer(modules=list(parts), device="cpu")
    model.save(str(tmp_path / "sentences"))
    encoder = Encoder(path=str(tmp_path / "sentences"), dtype="float32").open()
    texts = ["A short one.", "This one is rather longer than the other one is."]
    assert encoder.dimensions == 32
    assert torch.allclose(
        encoder.embed(texts), model.encode(texts, convert_to_tensor=True), atol=1e-5
    )
    assert encoder.fingerprint != Encoder(path=str(tiny), dtype="float32").open().fingerprint


def test_a_padded_batch_of_tasks_has_the_loss_of_its_tasks_apart(
    content: dict[str, Any], tmp_path: Path
) -> None:
    engine, task = simulation(content, tmp_path)
    questions = engine._shards[0].train
    params = task.init(seeds.generator(0, "init"))
    tasks = [(questions[:4], questions[4:9]), (questions[9:18], questions[18:20])]
    whole, _ = task.losses(params, task._batch(tasks))
    apart = [task._batch([one]) for one in tasks]
    losses = [float(task.losses(params, batch)[0]) for batch in apart]
    counts = [len(batch.shares) for batch in apart]
    assert float(whole) == pytest.approx(
        sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts), abs=1e-5
    )


def test_a_draw_keeps_context_and_targets_apart_and_groups_too(
    content: dict[str, Any], tmp_path: Path
) -> None:
    engine, task = simulation(content, tmp_path)
    pooled = config.parse(OpinionTask, content["task"], "task").build()
    pooled.known = task.known
    everything = tuple(question for shard in engine._shards for question in shard.train)
    shard = engine._shards[0].__class__("all", everything, (), (), ())
    seen: list[Any] = []
    pooled._batch = lambda tasks: seen.extend(tasks)
    pooled.draw({}, {}, shard, BatchSize(3), torch.Generator().manual_seed(0))
    assert {context[0].group for context, _ in seen} == set(GROUPS)  # each of them once
    for context, targets in seen:
        assert len({question.group for question in (*context, *targets)}) == 1
        assert not {q.digest for q in context} & {q.digest for q in targets}
        assert 3 <= len(context) <= 8


def test_small_groups_always_have_a_target_left(content: dict[str, Any], tmp_path: Path) -> None:
    engine, task = simulation(content, tmp_path)
    bounds = {"context_questions": [90, 99], "target_questions": [90, 99]}
    greedy = config.parse(OpinionTask, {**content["task"], **bounds}, "task").build()
    greedy.known = task.known
    seen: list[Any] = []
    greedy._batch = lambda tasks: seen.extend(tasks)
    shard = engine._shards[0]
    greedy.draw({}, {}, shard, BatchSize(5), torch.Generator().manual_seed(0))
    assert [(len(context), len(targets)) for context, targets in seen] == [
        (len(shard.train) - 1, 1)
    ] * 5


def test_alignments_are_those_of_the_papers() -> None:
    p, y = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert alignment(p, p) == 1
    assert alignment(p, y) == pytest.approx(1 - math.sqrt(math.log(2)))
    assert wasserstein_alignment(p, y) == 0
    assert wasserstein_alignment(torch.tensor([0.0, 1.0, 0.0]), y) == pytest.approx(0.5)


def test_what_is_said_too_boldly_is_badly_calibrated() -> None:
    truth = torch.tensor([0.7, 0.3, 0.7, 0.3])
    assert calibration_error(truth, truth) == 0
    assert calibration_error(torch.tensor([1.0, 0.0, 1.0, 0.0]), truth) == pytest.approx(0.3)
    assert math.isnan(calibration_error(torch.tensor([float("nan"), 0.0, 1.0, 0.0]), truth))
    within_a_bin = calibration_error(torch.tensor([0.52, 0.54]), torch.tensor([0.4, 0.66]))
    assert within_a_bin == pytest.approx(0.0, abs=1e-6), (
        "too high and too low by the same, about the same prediction"
    )


def test_comparisons_become_questions_with_the_share_that_each_answer_won(tiny: Path) -> None:
    task = OpinionTask(model=Encoder(path=str(tiny))).build()
    rows = [
        Preference("Q:", " a", " b", "row 1"),
        Preference("Q:", " b", " a", "row 2"),
        Preference("Q:", " a", " b", "row 3"),
    ]
    shard = task.encode(ClientData("one", (*rows, Preference("R:", " c", " d", "row 4")), ()))
    assert [(q.texts, q.shares) for q in shard.train] == [
        (("Q: a", "Q: b"), pytest.approx((2 / 3, 1 / 3))),
        (("R: c", "R: d"), (1.0, 0.0)),
    ]
    with pytest.raises(UserError, match=r"one: one question of a group is shown.*it has 1"):
        task.encode(ClientData("one", tuple(rows), ()))


# ---- the algorithm


def test_one_group_federated_is_training_on_that_group(
    content: dict[str, Any], tmp_path: Path
) -> None:
    # Adam would make rounding large
    local = LocalTraining(steps=3, batch_size=1, optim="sgd", learning_rate=0.05)
    ends = []
    for method in (
        PluralLLM(local=local),
        PluralLLM(local=local, weights="points"),
        Pooled(local=local),
    ):
        engine, task = simulation(content, tmp_path, clients=1)
        state: Any = method.init(engine, task.init(seeds.generator(0, "init")))
        for number in range(2):
            engine.begin(number, [0])
            state, _ = method.step(engine, state)  # type: ignore[arg-type]
        ends.append(method.model(state)[0])
    for end in ends[1:]:
        assert trees.norm(trees.subtract(end, ends[0])) < 1e-4 * trees.norm(ends[0])  # type: ignore[arg-type]


def test_weights_by_points_are_those_of_the_points_seen(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = LocalTraining(steps=2, batch_size=1, learning_rate=0.01)
    start: Any = None
    ends, seen = {}, {0: 0, 1: 0}
    for clients in ((0, 1), (0,), (1,)):
        engine, task = simulation({**content, "federation": {"weighting": "equal"}}, tmp_path)
        start = task.init(seeds.generator(0, "init"))
        if len(clients) == 1:  # count the points of the tasks that this client draws
            draw = task.draw

            def counted(*arguments: Any, client: int = clients[0], draw: Any = draw) -> Any:
                batch = draw(*arguments)
                seen[client] += int(batch.shown.sum() + batch.asked.sum())
                return batch

            monkeypatch.setattr(task, "draw", counted)
        method = PluralLLM(local=local, weights="points")
        state = method.init(engine, start)
        engine.begin(0, clients)
        ends[clients] = trees.subtract(method.step(engine, state)[0].adapter, start)
    assert seen[0] != seen[1]
    expected = trees.total(trees.scale(ends[(i,)], seen[i] / sum(seen.values())) for i in seen)
    assert trees.norm(trees.subtract(ends[0, 1], expected)) < 1e-5 * trees.norm(expected)


def test_messages_hold_the_predictors_parameters_alone(
    content: dict[str, Any], tmp_path: Path
) -> None:
    engine, task = simulation(content, tmp_path)
    start = task.init(seeds.generator(0, "init"))
    engine.begin(0, engine.clients)
    method = PluralLLM(local=LocalTraining(steps=1, batch_size=1))
    sent: list[Any] = []
    engine._uplink = Chain(
        (Stage("seen", lambda tree, sender: sent.append(tree) or tree, lambda total, count: total),)
    )  # type: ignore[func-returns-value]
    state, _ = method.step(engine, method.init(engine, start))
    assert all(message.keys() == start.keys() for message in sent)
    assert engine.traffic.bytes_up == len(engine.clients) * trees.size(start)
    moved = trees.subtract(state.adapter, start)
    assert trees.norm(trees.subtract(trees.total(sent), moved)) < 1e-5 * trees.norm(moved)


def test_the_published_cosine_goes_down_and_up_again() -> None:
    # 600 steps over waves of 200
    settings = LocalTraining(steps=6, learning_rate=1.0, warmup_ratio=0.0, num_cycles=3.0)
    for step, expected in ((0, 1.0), (100, 0.0), (200, 1.0), (300, 0.0), (150, 0.5)):
        assert rate(settings, step / 600) == pytest.approx(expected, abs=1e-9)


@pytest.mark.long
def test_runs_have_the_same_bits_for_any_number_of_workers(
    content: dict[str, Any], tmp_path: Path
) -> None:
    """Groups share some questions, and workers embed them in any order."""
    rng = random.Random(0)
    rows = [
        {**row, "selections": {g: s for g, s in row["selections"].items() if rng.random() < 0.7}}
        for row in survey()
    ]
    content |= {"data": {**content["data"], "path": str(write_rows(tmp_path / "some.jsonl", rows))}}
    content["task"]["model"] = {**content["task"]["model"], "dtype": "bfloat16"}
    ends = []
    for number, workers in enumerate((1, 2, 2)):
        path = run(
            config.parse(Experiment, {**content, "workers": workers}, "test"),
            tmp_path / str(number),
        ).path
        ends.append(trees.load(path / "adapter/predictor.safetensors"))
    for end in ends[1:]:
        assert all(torch.equal(end[name], ends[0][name]) for name in ends[0])


def test_an_answer_is_not_shown_while_it_is_asked(content: dict[str, Any], tmp_path: Path) -> None:
    content |= {"partition": {"name": "iid", "clients": 2}}
    with pytest.raises(UserError, match="A client is one group"):
        run(config.parse(Experiment, content, "test"), tmp_path / "run")


def test_a_question_answered_twice_by_a_group_has_the_mean_of_its_answers(
    content: dict[str, Any], tmp_path: Path
) -> None:
    again = {
        **survey()[0],
        "selections": {"north": [0.0, 0.0, 0.0, 1.0][-len(survey()[0]["options"]) :]},
    }
    content["data"] = {
        **content["data"],
        "path": str(write_rows(tmp_path / "rows.jsonl", [*survey(), again])),
    }
    spec = config.parse(Experiment, content, "test")
    task = spec.build_task()
    (north,) = [task.encode(client) for client in spec.clients()[0] if client.name == "north"]
    questions = {
        question.texts[0].split("\n")[0]: question for question in north.train + north.test
    }
    assert len(questions) == len(north.train + north.test) == 30
    once, twice = survey()[0]["selections"]["north"], questions[survey()[0]["question"]].shares
    assert twice == pytest.approx(
        [(a + b) / 2 for a, b in zip(once, again["selections"]["north"], strict=True)]
    )


def test_questions_that_are_too_long_for_the_encoder_are_counted(
    content: dict[str, Any], tmp_path: Path
) -> None:
    long = {**survey()[0], "question": "How " * 5000 + "?"}
    content["data"] = {
        **content["data"],
        "path": str(write_rows(tmp_path / "rows.jsonl", [*survey(), long])),
    }
    spec = config.parse(Experiment, content, "test")
    task = spec.build_task()
    assert [task.encode(client).truncated for client in spec.clients()[0]] == [1, 1, 1]


def test_weights_by_points_want_equal_ones_beside(content: dict[str, Any]) -> None:
    content["algorithm"] |= {"weights": "points"}
    with pytest.raises(UserError, match="Set that to equal"):
        config.parse(Experiment, content, "test")


def test_a_survey_is_asked_as_it_was_trained(content: dict[str, Any], tmp_path: Path) -> None:
    """Options of one of its own questions as completions: the shares are those that the run's
    evaluation predicts.
    """
    folder = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    reward = group_rewards(folder)["north"]
    (client,) = [
        client
        for client in FinishedRun.at(folder).experiment.clients()[0]
        if client.name == "north"
    ]
    for row in client.test[:3]:
        assert isinstance(row, Opinion)
        question = Question("north", asking(row.prompt, row.options), row.shares)
        reward.learner.embed([question, *reward.context])
        expected = reward.learner.predict(reward.params, reward.context, [question])[0][0]
        reward.learner.forget([question.digest])
        assert reward([row.prompt] * len(row.options), row.options) == pytest.approx(
            expected.tolist(), abs=1e-6
        )
        assert len(reward.learner.known) == len(reward.context), "what was scored is let go of"


def test_a_run_whose_data_has_changed_gives_no_rewards(
    content: dict[str, Any], tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", survey())
    content["data"] = {**content["data"], "path": str(file)}
    folder = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    write_rows(
        file,
        [
            {**row, "selections": {**row["selections"], "north": row["selections"]["east"]}}
            for row in survey()
        ],
    )
    with pytest.raises(
        UserError, match=r"the data of \['north'\] is not what the run was trained on"
    ):
        group_rewards(folder)


@pytest.mark.long
def test_learning_beats_equal_shares_and_newcomers_are_told_apart_by_their_context(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content |= {
        "federation": {"newcomers": ["east"]},
        "rounds": 12,
        "baselines": ["alone", "pooled"],
    }
    content["algorithm"]["local"] |= {"steps": 5, "batch_size": 2}
    spec = config.parse(Experiment, content, "test")
    outcome = run(spec, tmp_path / "run")
    for line in ("pluralllm", "alone", "pooled"):
        for row in outcome.evaluations[line].values():
            assert row["alignment"] > row["uniform"] + 0.02, line
            assert 0 <= row["coverage"] <= 1
            assert 0 < row["calibration_error"] <= row["error"] + 1e-6
    before, after = outcome.newcomers["pluralllm"]
    assert before == after
    assert before.keys() == {"east"}
    assert FinishedRun.at(outcome.path).result().evaluations == outcome.evaluations


@pytest.mark.long
def test_a_group_can_come_to_a_finished_run(content: dict[str, Any], tmp_path: Path) -> None:
    from fedpref.data import Files
    from fedpref.runs.join import personalize

    path = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    rows = [{**row, "selections": {"west": row["selections"]["east"]}} for row in survey(seed=1)]
    joined = personalize(
        path, Files(path=str(write_rows(tmp_path / "west.jsonl", rows))), column="group"
    )
    assert joined.keys() == {"west"}
    assert 0 < joined["west"].before["alignment"] == joined["west"].after["alignment"]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("algorithm=fedpdpo", "no parts of a client's own"),
        ("algorithm=ffa-lora", "about the factors of an adapter"),
        ("algorithm={name: decdpo, aggregate: {name: product}}", "about the factors of an adapter"),
        ("algorithm.local.max_tokens_per_batch=100", "counted in tasks"),
        ("task.predictor.heads=3", "no multiple of predictor.heads"),
        ("task.context_questions=[9, 3]", "9 is more than 3"),
    ],
)
def test_what_does_not_fit_is_refused(
    override: str, complaint: str, content: dict[str, Any], tmp_path: Path
) -> None:
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=complaint):
        run(Experiment.load(tmp_path / "config.yaml", [override]), tmp_path / "run")


@pytest.mark.long
def test_a_run_from_the_command_line_shows_alignments(
    content: dict[str, Any], tmp_path: Path
) -> None:
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    ran = CliRunner().invoke(
        cli.app, ["run", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]
    )
    assert ran.exit_code == 0, ran.output
    assert "held-out alignment, %" in ran.output
    assert "error" in ran.output
    exported = tmp_path / "run" / "adapter"
    assert (
        json.loads((exported / "predictor.json").read_text())["predictor"]["width"]
        == SMALL["width"]
    )
    assert (
        trees.load(exported / "predictor.safetensors").keys()
        == Predictor(**SMALL).shapes(32).keys()
    )
    ran = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "run")])
    assert "held-out alignment" in ran.output
