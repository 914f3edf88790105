"""Public sets in small local copies of the layouts that they are found in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from conftest import REAL_DATA, needs_real_data, write_rows
from fedpref import Experiment, UserError
from fedpref.data import (
    HHH,
    IID,
    SHP,
    ChatbotArena,
    Domains,
    Files,
    HelpSteer2,
    Prism,
    SafeRLHF,
    Summaries,
    WebGPT,
)
from fedpref.data.preferences import Preference
from fedpref.data.reading import read as reading
from fedpref.data.unusable import Unusable


def read(source: Any) -> list[Preference]:
    rows = list(source.read())
    assert all(isinstance(row, Preference) for row in rows), rows
    return rows


def plain(row: Preference) -> tuple[Any, Any, Any]:
    return row.prompt, row.chosen, row.rejected


def test_summaries_are_the_labellers(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    summary = [{"text": " good", "policy": "ref"}, {"text": " bad", "policy": "sup1"}]
    hub = {
        "info": {"post": "A long post.", "title": "Help"},
        "summaries": summary,
        "choice": 0,
        "worker": "w1",
        "extra": {"confidence": 7},
    }
    other = {**hub, "choice": 1, "worker": "w2", "extra": {"confidence": 2}}
    write_rows(tmp_path / "hub/train.jsonl", [hub, other])
    first, second = Summaries(path=str(tmp_path / "hub/train.jsonl")).read()
    assert isinstance(first, Preference)
    assert isinstance(second, Preference)
    asked = "Human: Summarise this post.\n\nHelp\n\nA long post.\n\nAssistant:"
    assert plain(first) == (asked, " good", " bad")
    assert (first.columns["client"], first.columns["confidence"]) == ("w1", 7)
    assert plain(second)[1:] == (" bad", " good")
    table = {"prompt": "Post", "chosen": "good", "rejected": "bad", "client": "w3"}
    write_rows(tmp_path / "openai_summary_comparisons.jsonl", [table, {**table, "rejected": ""}])
    row, empty = Summaries(path=str(tmp_path)).read()
    assert isinstance(row, Preference)
    assert plain(row) == ("Human: Post\n\nAssistant:", " good", " bad")
    assert isinstance(empty, Unusable)


def test_webgpt_prefers_the_higher_score(tmp_path: Path) -> None:
    rows = [
        {
            "question": {"full_text": "Why?", "dataset": "eli5"},
            "answer_0": "zero",
            "answer_1": "one",
            "score_0": score,
            "score_1": -score,
        }
        for score in (1.0, -0.5, 0.0)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    first, second, tie = WebGPT(path=str(path)).read()
    assert isinstance(first, Preference)
    assert isinstance(second, Preference)
    assert plain(first) == ("Human: Why?\n\nAssistant:", " zero", " one")
    assert plain(second)[1:] == (" one", " zero")
    assert first.columns["topic"] == "eli5"
    assert isinstance(tie, Unusable)


def test_safe_rlhf_compares_by_two_objectives(tmp_path: Path) -> None:
    row = {
        "prompt": "How?",
        "response_0": "so",
        "response_1": "rather not",
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    path = write_rows(tmp_path / "rows.jsonl", [row])
    helpful, harmless = read(SafeRLHF(path=str(path)))
    assert (helpful.chosen, helpful.columns["objective"]) == (" so", "helpful")
    assert (harmless.chosen, harmless.columns["objective"]) == (" rather not", "harmless")
    assert len(read(SafeRLHF(path=str(path), objectives=("harmless",)))) == 1


def test_helpsteer_pairs_two_answers_by_each_attribute(tmp_path: Path) -> None:
    rated = {"prompt": "Q", "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
    rows = [
        {**rated, "response": "a", "helpfulness": 4},
        {**rated, "response": "b", "helpfulness": 2, "coherence": 1},
        {**rated, "prompt": "R", "response": "alone", "helpfulness": 4},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = read(HelpSteer2(path=str(path)))
    assert [(r.chosen, r.columns["objective"]) for r in found] == [
        (" a", "helpfulness"),
        (" a", "coherence"),
    ], "equal ratings state no preference"
    turns = "Write\n<extra_id_1>Assistant\nRoses\n<extra_id_1>User\nShorter"
    for row in rows[:2]:
        row["prompt"] = turns
    (first, *_) = read(HelpSteer2(path=str(write_rows(path, rows))))
    assert first.prompt == "Human: Write\n\nAssistant: Roses\n\nHuman: Shorter\n\nAssistant:"


def test_prism_is_people_and_their_conversations(tmp_path: Path) -> None:
    def said(turn: int, answer: str, chosen: bool, asked: str) -> dict[str, Any]:
        return {
            "conversation_id": "c1",
            "user_id": "u1",
            "turn": turn,
            "user_prompt": asked,
            "model_response": answer,
            "if_chosen": chosen,
            "score": 90 if chosen else 20,
        }

    rows = [
        said(0, "hello", True, "hi"),
        said(0, "go away", False, "hi"),
        said(0, "hm", False, "hi"),
        said(1, "fine", False, "and you?"),
        said(1, "very well", True, "and you?"),
    ]
    found = read(Prism(path=str(write_rows(tmp_path / "rows.jsonl", rows))))
    assert [(r.chosen[0]["content"], r.rejected[0]["content"]) for r in found] == [
        ("hello", "go away"),
        ("hello", "hm"),
        ("very well", "fine"),
    ]
    talk = [(m["role"], m["content"]) for m in found[-1].prompt]
    assert talk == [("user", "hi"), ("assistant", "hello"), ("user", "and you?")]
    assert found[0].columns["user_id"] == "u1"
    none = [{**row, "if_chosen": False} for row in rows[:2]]
    (unusable,) = Prism(path=str(write_rows(tmp_path / "none.jsonl", none))).read()
    assert isinstance(unusable, Unusable)
    # what follows a turn without one choice has no history; as CSV writes them
    told = [{**row, "if_chosen": "False" if row["turn"] == 0 else row["if_chosen"]} for row in rows]
    found = list(Prism(path=str(write_rows(tmp_path / "broken.jsonl", told))).read())
    assert [isinstance(one, Unusable) for one in found] == [True, True]


FORMS: list[tuple[Any, dict[str, Any]]] = [
    (
        Summaries,
        {
            "info": {"post": "A post.", "title": "Help"},
            "summaries": [{"text": "good"}, {"text": "bad"}],
            "choice": 0,
            "worker": "w1",
        },
    ),
    (
        WebGPT,
        {
            "question": {"full_text": "Why?", "dataset": "eli5"},
            "answer_0": "zero",
            "answer_1": "one",
            "score_0": 1.0,
            "score_1": -1.0,
        },
    ),
    (
        SafeRLHF,
        {
            "prompt": "How?",
            "response_0": "so",
            "response_1": "rather not",
            "better_response_id": 0,
            "safer_response_id": 1,
        },
    ),
    (
        HelpSteer2,
        {"prompt": "Q", "response": "a", "helpfulness": 4, "correctness": 3, "coherence": 4},
    ),
    (
        Prism,
        {
            "conversation_id": "c1",
            "user_id": "u1",
            "turn": 0,
            "user_prompt": "hi",
            "model_response": "hello",
            "if_chosen": True,
        },
    ),
    (
        ChatbotArena,
        {
            "winner": "model_a",
            "judge": "j1",
            "conversation_a": [{"role": "user", "content": "hi"}],
            "conversation_b": [{"role": "user", "content": "hi"}],
        },
    ),
    (SHP, {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 3, "score_B": 1}),
]


@pytest.mark.parametrize(("kind", "row"), FORMS)
def test_a_row_of_another_form_is_a_sentence(
    kind: Any, row: dict[str, Any], tmp_path: Path
) -> None:
    for column in row:
        for value in (None, "x", "", -1, 5, float("nan"), [], [1], {}, {"a": None}):
            rows = [{**row, column: value}, {**row, column: value}]
            path = write_rows(tmp_path / "rows.jsonl", rows)
            try:
                # a name or text may be anything that is written
                reading(kind(path=str(path)), IID(clients=1), 0)
            except UserError:
                continue
    wrong = {"choice": 2, "better_response_id": -1, "score_1": float("nan"), "score_B": "high"}
    for column in row.keys() & wrong.keys():
        path = write_rows(tmp_path / "rows.jsonl", [{**row, column: wrong[column]}])
        with pytest.raises(UserError, match=r"row|line"):
            reading(kind(path=str(path)), IID(clients=1), 0).settled()


def test_the_arena_is_its_judges(tmp_path: Path) -> None:
    def talk(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]

    rows = [
        {
            "winner": winner,
            "judge": f"arena_user_{k}",
            "conversation_a": talk("a"),
            "conversation_b": talk("b"),
            "language": "English",
            "turn": 1,
        }
        for k, winner in enumerate(("model_a", "model_b", "tie", "tie (bothbad)"))
    ]
    found = read(ChatbotArena(path=str(write_rows(tmp_path / "rows.jsonl", rows))))
    assert [(r.chosen[0]["content"], r.columns["judge"]) for r in found] == [
        ("a", "arena_user_0"),
        ("b", "arena_user_1"),
    ]
    assert found[0].prompt[0]["content"] == "hi"


def test_hhh_reads_the_hubs_folders_and_a_table(tmp_path: Path) -> None:
    for objective in ("helpful", "honest", "harmless", "other"):
        (tmp_path / "hub" / objective).mkdir(parents=True)
        targets = {"choices": ["bad", "good"], "labels": [0, 1]}
        row = {"input": f"{objective}?", "targets": targets}
        write_rows(tmp_path / "hub" / objective / "test.jsonl", [row])
    found = read(HHH(path=str(tmp_path / "hub")))
    assert [r.columns["client"] for r in found] == ["helpful", "honest", "harmless", "other"]
    assert plain(found[1]) == ("Human: honest?\n\nAssistant:", " good", " bad")
    row = {"prompt": "P", "chosen": "good", "rejected": "bad", "client": "harmless"}
    write_rows(tmp_path / "hhh_alignment.jsonl", [row, {**row, "client": "other"}])
    (only,) = read(HHH(path=str(tmp_path), objectives=("harmless",)))
    assert only.columns["client"] == "harmless"


def test_domains_are_sources_together(tmp_path: Path) -> None:
    row = {"prompt": "P", "chosen": "good", "rejected": "bad", "lang": "go"}
    one, two = (write_rows(tmp_path / f"{k}.jsonl", [row] * k) for k in (1, 3))
    sources = {"few": Files(path=str(one)), "many": Files(path=str(two))}
    found = read(Domains(sources=sources, max_rows=2))
    assert [r.columns["domain"] for r in found] == ["few", "many", "many"]
    assert found[0].columns["lang"] == "go"
    with pytest.raises(ValueError, match="name two or more"):
        Domains(sources={"one": Files(path=str(one))})
    answers = {"chosen": "P a", "rejected": "P b"}
    whole = write_rows(tmp_path / "w.jsonl", [{**row, **answers}] * 4 + [row])
    mixed = {"few": Files(path=str(one)), "whole": Files(path=str(whole))}
    with pytest.raises(UserError, match=r"data.sources.whole: .* in 4 of 5 rows"):
        read(Domains(sources=mixed, max_rows=2))
    gone = {**sources, "gone": Files(path=str(tmp_path / "gone.jsonl"))}
    with pytest.raises(UserError, match=r"data.sources.gone: data.path: there is no file"):
        list(Domains(sources=gone).read())


def test_files_can_be_read_in_part(tmp_path: Path) -> None:
    texts = {"prompt": "P", "chosen": "good", "rejected": "bad"}
    path = write_rows(tmp_path / "r.jsonl", [{**texts, "position": k} for k in (0, 1, 2)])
    assert len(read(Files(path=str(path), only={"position": (1, 2)}))) == 2
    csv = tmp_path / "r.csv"
    csv.write_text("prompt,chosen,rejected,position\nP,good,bad,0\nP,good,bad,2\n")
    assert len(read(Files(path=str(csv), only={"position": (1, 2)}))) == 1
    with pytest.raises(UserError, match=r"data.only: .* has no column 'place'"):
        read(Files(path=str(path), only={"place": (1,)}))


def test_configs_of_hub_sets_read_local_copies_of_their_form(tmp_path: Path) -> None:
    def folder(name: str, rows: list[dict[str, Any]], split: str = "train") -> Path:
        room = tmp_path / name / "data"
        room.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, room / f"{split}-00000-of-00001.parquet")
        return tmp_path / name

    def talk(text: str, k: int) -> list[dict[str, str]]:
        asked = {"role": "user", "content": f"Question {k}?"}
        return [asked, {"role": "assistant", "content": text}]

    languages = ["python", "java", "c++"]
    code = folder(
        "code",
        [
            {"question": f"Write {k}", "chosen": "safe", "rejected": "unsafe", "lang": one}
            for k in range(30)
            for one in languages
        ],
    )
    for split, numbers in (("train_prefs", range(40)), ("test_prefs", range(40, 60))):
        rows = [
            {"prompt": f"Question {k}?", "chosen": talk("a", k), "rejected": talk("b", k)}
            for k in numbers
        ]
        general = folder("general", rows, split)
    python = folder(
        "python", [{"prompt": f"Code {k}", "chosen": "x", "rejected": "y"} for k in range(40)]
    )
    web = folder(
        "web",
        [
            {
                "question": {"full_text": f"Why {k}?", "dataset": "eli5"},
                **{"answer_0": "zero", "answer_1": "one", "score_0": 1.0, "score_1": -1.0},
            }
            for k in range(40)
        ],
    )

    def clients(name: str, *overrides: str) -> list[str]:
        found, _ = Experiment.load(name, overrides).clients()
        assert all(one.train and one.test for one in found)
        return [one.name for one in found]

    assert clients("code-vulnerability", f"data.path={code}") == sorted(languages)
    three = clients("code-vulnerability", f"data.path={code}", "partition.only=[python,java]")
    assert three == ["java", "python"]
    assert len(clients("py-dpo", f"data.path={python}")) == 5
    assert len(clients("webgpt", f"data.path={web}")) == 5
    assert len(clients("ultrafeedback", f"data.path={general}")) == 10
    paths = {"webgpt": web, "python": python, "code": code, "general": general}
    together = [f"data.sources.{name}.path={path}" for name, path in paths.items()]
    assert clients("cross-domain", *together) == ["code", "general", "python", "webgpt"]


LOCAL = {
    "summaries": (["data.path={data}"], 20),
    "pictures": (
        [
            "data.sources.preference.path={data}/image_description_preference.jsonl.gz",
            "data.sources.informativity.path={data}/image_description_informativity.jsonl.gz",
        ],
        40,
    ),
    "pictures-objectives": (
        [
            "data.sources.preference.path={data}/image_description_preference.jsonl.gz",
            "data.sources.informativity.path={data}/image_description_informativity.jsonl.gz",
        ],
        6,
    ),
    "coauthor": (["data.path={data}/coauthor_suggestion_choices.jsonl.gz"], 20),
    "metaphor": (["data.path={data}/metaphor_literal_choices.jsonl.gz"], 20),
    "dsp": (["data.path={data}/dsp_domain_pairs.jsonl.gz"], 4),
    "asset": (["data.path={data}/asset_simplification_pairs.jsonl.gz"], 5),
    "hhh": (["data.path={data}"], 4),
}


@needs_real_data
@pytest.mark.parametrize("name", LOCAL)
def test_configs_read_the_real_sets(name: str) -> None:
    overrides, least = LOCAL[name]
    spec = Experiment.load(name, [text.format(data=REAL_DATA) for text in overrides])
    clients, _ = spec.clients()
    assert len(clients) >= least
    assert all(one.train and one.test for one in clients)
    held = {str(row.prompt) for one in clients for row in one.test}
    assert held.isdisjoint(str(row.prompt) for one in clients for row in one.train)
