"""Files as people have them: what is meant is read, what is not is said once, and counted."""

from __future__ import annotations

import csv
import gzip
import json
import warnings
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

from conftest import make_rows, write_rows
from fedpref import cli, config, run
from fedpref.data import HH, IID, SHP, Feedback, Files, Natural, Preference
from fedpref.data.parsing import parse
from fedpref.data.placed import label
from fedpref.data.preferences import Conversation, key
from fedpref.data.reading import read
from fedpref.data.splits import digest, keyed, question
from fedpref.data.tables import read_table
from fedpref.data.unusable import Unusable
from fedpref.errors import UserError
from fedpref.experiments.clients import SimulatedSite
from fedpref.experiments.experiment import Experiment, encoded
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.run_directory import file_name
from fedpref.reports.page.sentences import facts
from fedpref.reports.run import read as read_run
from fedpref.runs.evaluate import evaluate
from fedpref.runs.join import personalize

PAIR = {"prompt": "Hi?", "chosen": " Yes.", "rejected": " No.", "client": "a"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def shared(asked: str, answer: str) -> list[dict[str, str]]:
    """ShareGPT's form."""
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


def one(tmp_path: Path, record: dict[str, Any], **settings: Any) -> Preference:
    (row,) = Files(path=str(write_rows(tmp_path / "one.jsonl", [record])), **settings).read()
    if isinstance(row, Unusable):
        raise row
    assert isinstance(row, Preference)
    return row


# ---- forms


ASKED = [user("Name a fruit.")]
WHOLE = {
    "prompt": ASKED,
    "chosen": [*ASKED, said("Apple")],
    "rejected": [*ASKED, said("Car")],
}


@pytest.mark.parametrize(
    "record",
    [
        {**WHOLE, "chosen": [said("Apple")], "rejected": [said("Car")]},
        WHOLE,
        {name: json.dumps(text) for name, text in WHOLE.items()},
        {name: str(text) for name, text in WHOLE.items()},  # as pandas writes lists into CSV
        {name: f"array({text}, dtype=object)" for name, text in WHOLE.items()},
        {**WHOLE, "prompt": [{**ASKED[0], "content": " Name  a fruit."}][:1]},
        {
            name: json.dumps([dict(reversed(m.items())) for m in text])
            for name, text in WHOLE.items()
        },
        {"prompt": json.dumps(ASKED[0]), "chosen": [said("Apple")], "rejected": [said("Car")]},
        {**WHOLE, "prompt": "Name a fruit."},  # ultrafeedback_binarized
        {"prompt": "Name a fruit.", "chosen": [said("Apple")], "rejected": [said("Car")]},
        {name: WHOLE[name] for name in ("chosen", "rejected")},
        {
            "chosen": [
                {"from": "human", "value": "Name a fruit."},
                {"from": "gpt", "value": "Apple"},
            ],
            "rejected": [
                {"from": "human", "value": "Name a fruit."},
                {"from": "gpt", "value": "Car"},
            ],
        },
        {
            **WHOLE,
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Name a fruit."}]}],
        },
        {
            name: [{**message, "name": None, "tool_calls": None} for message in text]
            for name, text in WHOLE.items()
        },
    ],
)
def test_a_conversation_is_read_in_whatever_form_it_stands(
    record: dict[str, Any], tmp_path: Path
) -> None:
    row = one(tmp_path, record)
    assert (row.chosen, row.rejected) == ((said("Apple"),), (said("Car"),))
    assert question(row.prompt) == "Name a fruit."
    assert len(row.prompt) == 1


SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("prompt", "opening"), [([SYSTEM, *ASKED], ASKED), (ASKED, [SYSTEM, *ASKED])]
)
def test_a_system_prompt_in_prompt_or_answers_is_kept_once(
    prompt: Any, opening: Any, tmp_path: Path
) -> None:
    answers = {
        "chosen": [*opening, said("Apple")],
        "rejected": [*opening, said("Car")],
    }
    row = one(tmp_path, {"prompt": prompt, **answers})
    assert (row.prompt, row.chosen) == ((SYSTEM, *ASKED), (said("Apple"),))
    judged = {"prompt": prompt, "completion": answers["chosen"], "label": True}
    (found,) = Files(path=str(write_rows(tmp_path / "judged.jsonl", [judged]))).read()
    assert isinstance(found, Feedback)
    assert (found.prompt, found.completion) == ((SYSTEM, *ASKED), (said("Apple"),))


def test_users_turns_at_the_head_of_answers_belong_to_a_prompt_without_any(tmp_path: Path) -> None:
    whole = {
        "chosen": [*ASKED, said("Apple")],
        "rejected": [*ASKED, said("Car")],
    }
    row = one(tmp_path, {"prompt": [SYSTEM], **whole})
    assert (row.prompt, row.chosen) == ((SYSTEM, *ASKED), (said("Apple"),))
    assert question(row.prompt) == "Name a fruit."
    judged = {"prompt": [SYSTEM], "completion": whole["chosen"], "label": True}
    (found,) = Files(path=str(write_rows(tmp_path / "judged.jsonl", [judged]))).read()
    assert isinstance(found, Feedback)
    assert (found.prompt, found.completion) == ((SYSTEM, *ASKED), (said("Apple"),))
    with pytest.raises(UserError, match="begin differently"):
        one(tmp_path, {"prompt": [SYSTEM], **whole, "rejected": [user("Else?"), said("Car")]})


@pytest.mark.parametrize("tools", [{"name": "f"}, '{"name": "f"}', [{"name": "f"}]])
def test_tools_in_whatever_form_are_given_to_the_template(tools: Any, tmp_path: Path) -> None:
    row = one(tmp_path, {**WHOLE, "prompt": ASKED, "tools": tools})
    assert isinstance(row.prompt, Conversation)
    assert row.prompt.given == {"tools": [{"name": "f"}]}


def test_columns_that_elsewhere_belong_to_the_prompt_are_named(tmp_path: Path) -> None:
    rows = [
        {"system": "Be kind.", "client": "a", "input": "", **PAIR, "prompt": f"Question {k}?"}
        for k in range(20)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (note,) = read(Files(path=str(path)), Natural(), 0).notes
    assert "Nothing reads the columns system:" in note


def test_data_that_only_have_a_key_called_role_are_text(tmp_path: Path) -> None:
    text = json.dumps([{"name": "Ann", "role": "admin"}])
    assert one(tmp_path, {**PAIR, "prompt": text}).prompt == text


@pytest.mark.parametrize("head", ["Q {i}? ", "\n\nHuman: Q {i}?\n\nAssistant:"])
def test_a_prompt_in_another_spelling_at_the_head_of_answers_stands_once(
    head: str, tmp_path: Path
) -> None:
    texts = [head.format(i=i) for i in range(4)]
    pairs = [
        {"prompt": f" {t.strip()}", "chosen": f"{t} Yes.", "rejected": f"{t} No."} for t in texts
    ]
    judged = [{"prompt": t.strip(), "completion": f"{t} Yes.", "label": True} for t in texts]
    for row in Files(path=str(write_rows(tmp_path / "a.jsonl", pairs))).read():
        assert isinstance(row, Preference)
        assert str(row.chosen).split() == ["Yes."]
    for one_judged in Files(path=str(write_rows(tmp_path / "b.jsonl", judged))).read():
        assert isinstance(one_judged, Feedback)
        assert str(one_judged.completion).split() == ["Yes."]


def test_nulls_that_tables_fill_in_are_no_part_of_tools(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Rome", "unit": None}}, "id": None}
    record = {
        "prompt": [user("Weather?")],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [call]}],
        "rejected": [said("No idea.")],
        "tools": [{"type": "function", "function": {"name": "f", "description": None}}],
    }
    row = one(tmp_path, {**record, "chat_template_kwargs": '{"enable_thinking": false}'})
    assert row.chosen[0]["tool_calls"] == [  # type: ignore[index]
        {"function": {"name": "f", "arguments": {"city": "Rome"}}}
    ]
    assert isinstance(row.prompt, Conversation)
    assert row.prompt.given == {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "enable_thinking": False,
    }


def test_text_that_only_looks_like_a_list_is_text(tmp_path: Path) -> None:
    row = one(tmp_path, {"prompt": "[1] Which?", "chosen": " [2]", "rejected": '[{"a": 1}]'})
    assert (row.prompt, row.chosen, row.rejected) == ("[1] Which?", " [2]", '[{"a": 1}]')
    for answer in (
        '{"role": "admin"} is what the API returns.',
        '[{"role": x} for x in xs]  # a list',
        '[{"role": "user", "content": "hi"}]',
    ):
        row = one(tmp_path, {"prompt": "Show JSON.", "chosen": answer, "rejected": "No."})
        assert (row.prompt, row.chosen, row.rejected) == ("Show JSON.", answer, "No.")


def test_whole_answers_less_their_prompt_are_what_was_written(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q: {i}?\nA: ", "chosen": f"Q: {i}?\nA: good", "rejected": f"Q: {i}?\nA: bad"}
        for i in range(4)
    ]
    for row in Files(path=str(write_rows(tmp_path / "rows.jsonl", rows))).read():
        assert isinstance(row, Preference)
        assert (row.prompt[-3:], row.chosen, row.rejected) == ("A: ", "good", "bad")


def test_answers_that_end_where_the_other_goes_on_are_empty(tmp_path: Path) -> None:
    talk = "\n\nHuman: Why?\n\nAssistant:"
    turns = [{"role": "user", "content": "Why?"}]
    for chosen, rejected in (
        (f"{talk} So.", talk),
        ([*turns, {"role": "assistant", "content": "So."}], turns),
    ):
        with pytest.raises(Unusable, match="ends where the other goes on"):
            parse({"chosen": chosen, "rejected": rejected}, "row 1")
    rows = [{"chosen": f"{talk} So.", "rejected": f"{talk} No."}] * 3
    rows.append({"chosen": f"{talk} So.", "rejected": talk})
    for objective in ("helpful", "harmless"):
        write_rows(tmp_path / f"hh_rlhf_{objective}.jsonl", rows)
    kinds = [type(row) for row in HH(path=str(tmp_path)).read()]
    assert kinds == 2 * [Preference, Preference, Preference, Unusable]


def test_prompts_that_may_end_within_answers_are_told_of(tmp_path: Path) -> None:
    asked = [f"What is item {i}? ### Response: " for i in range(8)]
    rows = [
        {"chosen": f"{one}{begins}, a thing", "rejected": f"{one}{begins}, no idea"}
        for one in asked
        for begins in ("Sure", "No thanks")
    ]
    with pytest.warns(UserWarning, match="16 of 16 such prompts are like another"):
        list(Files(path=str(write_rows(tmp_path / "rows.jsonl", rows))).read())
    apart = [
        {"chosen": f"What is item {i}?\nA thing", "rejected": f"What is item {i}?\nBad"}
        for i in range(8)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(Files(path=str(write_rows(tmp_path / "rows.jsonl", apart))).read())) == 8


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**PAIR, "prompt": "[{'role': 'user', 'content': 'Hi?'}\n {'role': "}, "json.dumps"),
        ({**PAIR, "prompt": [{"from": "narrator", "value": "x"}]}, "ShareGPT's"),
        ({**PAIR, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({**WHOLE, "prompt": "Which one?"}, "data.prompt_column=none reads"),
        ({"instruction": "Sort.", "chosen": "a b", "rejected": "a c"}, "prompt_column=instruction"),
        ({"messages": "Sort.", "chosen": "a b", "rejected": "a c"}, "prompt_column=messages"),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b"}, "name: shp"),
        ({**PAIR, "tools": [{"type": "function"}]}, "Give the prompt as messages"),
        ({**PAIR, "prompt": "half \ud83d"}, "lone surrogate"),
        ({**WHOLE, "prompt": ASKED, "tools": [1]}, "column 'tools': expected JSON objects"),
        ({**PAIR, "chosen": 7}, "expected text or a list of messages, found 7"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_do(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        one(tmp_path, record)
    assert "line 1" in str(caught.value)


def test_a_prompt_column_that_is_nowhere_is_no_reason_to_guess(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", [{**PAIR, "prompt": "Which one?"}]))
    with pytest.raises(UserError, match=r"no column 'promt'.*Did you mean 'prompt'\?"):
        list(Files(path=file, prompt_column="promt").read())


def test_posts_of_shp_are_text_and_empty_ones_are_counted(tmp_path: Path) -> None:
    row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 3, "score_B": 1}
    bad = [{**row, "score_B": None}, {**row, "human_ref_B": None}, {**row, "history": None}]
    found = list(SHP(path=str(write_rows(tmp_path / "a.jsonl", [row, *bad]))).read())
    assert [isinstance(one, Unusable) for one in found] == [False, True, True, True]
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder/train.jsonl", [row, {**row, "score_B": ""}])
    found = list(SHP(path=str(tmp_path / "folder")).read())
    assert [isinstance(one, Unusable) for one in found] == [False, True]
    assert found[0].side is None, "posts are held out where no split is"  # type: ignore[union-attr]
    said = [{"role": "user", "content": "q"}]
    for column in ("history", "human_ref_A"):
        rows = write_rows(tmp_path / "b.jsonl", [{**row, column: said}])
        with pytest.raises(UserError, match=f"column '{column}'.* this is a conversation"):
            list(SHP(path=str(rows)).read())


def test_a_prompt_at_the_head_of_all_answers_stands_once(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q {i}?", "chosen": f"Q {i}? Yes.", "rejected": f"Q {i}? No."} for i in range(4)
    ]
    read_rows = list(Files(path=str(write_rows(tmp_path / "a.jsonl", rows))).read())
    assert [(row.chosen, row.rejected) for row in read_rows if isinstance(row, Preference)] == [
        (" Yes.", " No.")
    ] * 4
    mixed = [*rows, PAIR]
    with pytest.raises(UserError, match="in 4 of 5 rows the answers begin with their prompt"):
        list(Files(path=str(write_rows(tmp_path / "b.jsonl", mixed))).read())
    echo = [rows[0], *({**PAIR, "prompt": f"H {i}"} for i in range(3))]
    found = [*Files(path=str(write_rows(tmp_path / "c.jsonl", echo))).read()]
    assert [str(row.where)[-1] for row in found] == list("1234")
    first = found[0]
    assert isinstance(first, Preference)
    assert first.chosen == "Q 0? Yes."  # an answer may repeat the question


def test_tools_and_what_messages_say_beside_text_are_kept(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    record = {
        "prompt": [user("Weather?"), call, {"role": "tool", "name": "f", "content": "22"}],
        "chosen": [said("22.")],
        "rejected": [said("No idea.")],
        "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
        "chat_template_kwargs": {"enable_thinking": False, "unset": None},
    }
    row = one(tmp_path, record)
    assert isinstance(row.prompt, Conversation)
    assert row.prompt.given == {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "enable_thinking": False,
    }
    assert row.prompt[1]["tool_calls"] == call["tool_calls"]
    assert row.prompt[2]["name"] == "f"
    assert "tools" not in row.columns
    other = one(tmp_path, {**record, "tools": []})
    assert digest(row.prompt, "prompt") != digest(other.prompt, "prompt")
    # as logs write a message that calls none
    answer = one(tmp_path, {**record, "chosen": [{**said("22."), "tool_calls": []}]}).chosen
    assert answer == (said("22."),)
    dated = Conversation([user("?")], {"tools": [{"since": date(2024, 1, 2)}]})
    assert "2024-01-02" in key(dated)


def test_headers_with_blanks_and_labels_as_numbers_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt, chosen, rejected\nHi?,yes,no\n")
    (row,) = Files(path=str(tmp_path / "a.csv")).read()
    assert isinstance(row, Preference)
    (tmp_path / "b.csv").write_text("prompt,prompt \nHi?,yes\n")
    with pytest.raises(UserError, match="'prompt' twice"):
        list(read_table(str(tmp_path / "b.csv")))
    rows = [{"prompt": "Hi?", "completion": " a", "label": value} for value in (1.0, 0.0, "1.0")]
    judged = Files(path=str(write_rows(tmp_path / "c.jsonl", rows))).read()
    assert [row.label for row in judged] == [True, False, True]  # type: ignore[union-attr]


def scored(a: float, b: float, **more: Any) -> dict[str, Any]:
    return {
        "history": "How?",
        "human_ref_A": "So.",
        "human_ref_B": "Thus.",
        "score_A": a,
        "score_B": b,
        "domain": "askscience_train",
        **more,
    }


def test_scored_pairs_prefer_the_higher_score(tmp_path: Path) -> None:
    rows = [scored(9, 4), scored(2, 5), scored(3, 3), scored(3, 2)]
    source = SHP(path=str(write_rows(tmp_path / "shp.jsonl", rows)), min_score_ratio=2.0)
    found = list(source.read())
    assert [type(row).__name__ for row in found] == ["Preference", "Preference", "Unusable"]
    first, second, tie = found
    assert isinstance(first, Preference)
    assert isinstance(second, Preference)
    assert (first.prompt, first.chosen) == ("Human: How?\n\nAssistant:", " So.")
    assert second.chosen == " Thus."
    assert first.columns["domain"] == "askscience"
    assert isinstance(tie, Unusable)
    assert tie.kind == "no preference"
    with pytest.raises(UserError, match="expected a number"):
        list(SHP(path=str(write_rows(tmp_path / "x.jsonl", [scored(1, 2, score_A="x")]))).read())


# ---- damaged files end in a sentence


def deep(path: Path) -> None:
    path.write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n")


def digits(path: Path) -> None:
    path.write_text('{"prompt": ' + "7" * 5000 + "}\n")


def cut(path: Path) -> None:
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 99)[:40])


def flipped(path: Path) -> None:
    content = bytearray(gzip.compress(b'{"prompt": "x"}\n' * 99))
    content[20] ^= 255
    path.with_suffix(".jsonl.gz").write_bytes(bytes(content))


def latin(path: Path) -> None:
    path.write_bytes('{"prompt": "café"}\n'.encode("latin-1"))


def parquet(path: Path) -> None:
    file = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), file)
    file.write_bytes(file.read_bytes()[:-20])


def bytes_as_text(path: Path) -> None:
    column = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path.with_suffix(".parquet"))


def unclosed(path: Path) -> None:
    rows = [f'q{k},good,"bad answer {k}"\n' for k in range(60)]
    rows[40] = rows[40].rstrip('"\n') + "\n"
    path.with_suffix(".csv").write_text("prompt,chosen,rejected\n" + "".join(rows))


def cut_within_a_cell(path: Path) -> None:
    path.with_suffix(".csv").write_text('prompt,chosen,rejected\nq,good,"bad ans')


def said_twice(path: Path) -> None:
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}\n')


def empty(path: Path) -> None:
    path.write_text("")


def header_alone(path: Path) -> None:
    path.with_suffix(".csv").write_text("prompt,chosen,rejected\n")


DAMAGES = [deep, digits, cut, flipped, latin, parquet, bytes_as_text]
DAMAGES += [unclosed, cut_within_a_cell, said_twice, empty, header_alone]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(tmp_path / "rows.jsonl")
    (path,) = tmp_path.iterdir()
    with pytest.raises(UserError, match=path.name):
        read(Files(path=str(path)), IID(clients=1), 0)


# ---- clients


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([1, 1.0, "1", "1 ", " 1.0"], "1"),
        (["café", "cafe\u0301", " café "], "café"),
        (["a  b", "a b", "a\tb"], "a b"),
        ([7, Decimal("7"), Decimal("7.0"), np.int64(7), np.float32(7), "7"], "7"),
        ([7.5, Decimal("7.50"), "7.5"], "7.5"),
        ([12345678901234567890, Decimal("12345678901234567890")], "12345678901234567890"),
        ([date(2024, 1, 2), "2024-01-02"], "2024-01-02"),
        (
            [
                None,
                "",
                "  ",
                float("nan"),
                Decimal("NaN"),
                Decimal("sNaN"),
                "None",
                "nan",
                "NaN",
                "null",
                "<NA>",
                "NaT",
            ],
            None,
        ),
        (["none", "-nan", "NULL", "N/A", "n/a", "#N/A", r"\N"], None),
        (["NA", " NA "], "NA"),
    ],
)
def test_one_client_in_several_spellings_is_one(values: list[Any], name: str | None) -> None:
    assert {label(value) for value in values} == {name}


def test_a_client_that_is_no_name_is_refused(tmp_path: Path) -> None:
    for value in ({"id": 1}, float("inf")):
        path = write_rows(tmp_path / "rows.jsonl", [{**PAIR, "client": value}])
        with pytest.raises(UserError, match="expected a name or a number"):
            read(Files(path=str(path)), Natural(), 0)


NAMES = [
    "..",
    ".",
    "a/b",
    "ä" * 200,
    "x\x1b[31m",
    "A",
    "a",
    "a~" + "0" * 12,
    "con",
    "%2F",
    "名" * 40,
]


def test_names_never_are_paths_and_no_two_have_one_file() -> None:
    files = [file_name(name) for name in NAMES]
    assert len({name.lower() for name in files}) == len(NAMES)
    assert all(len(name.encode()) < 80 and name[0] not in "." for name in files)
    assert not any(set("/\\\x1b%") & set(name) for name in files)
    assert file_name("client-1") == "client-1"


@pytest.mark.long
def test_a_run_over_clients_of_any_name_can_be_exported(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    names = ["..", "x\x1b[31m", "名" * 40]
    rows = [{**row, "client": names[int(row["client"][-1])]} for row in make_rows([16, 16, 16])]
    spec = {
        **settings,
        "data": {**settings["data"], "path": str(write_rows(tmp_path / "rows.jsonl", rows))},
        "algorithm": {**settings["algorithm"], "name": "fedper"},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    out = tmp_path / "runs/one"
    ran = CliRunner().invoke(cli.app, ["run", str(tmp_path / "spec.yaml"), "--output", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "\x1b[31m" not in ran.output
    assert {path.name for path in out.parent.iterdir()} == {"one"}
    exported = CliRunner().invoke(
        cli.app, ["export", str(out), "--output", str(tmp_path / "export")]
    )
    assert exported.exit_code == 0, exported.output
    manifest = json.loads((tmp_path / "export/manifest.json").read_text())
    assert {entry["name"] for entry in manifest["adapters"]} >= set(names)
    folders = [tmp_path / "export" / entry["path"] for entry in manifest["adapters"]]
    cards = [(folder / "README.md").read_text() for folder in folders]
    assert all("differ by" in card and "\x1b" not in card for card in cards)


# ---- one summary


def awkward(tmp_path: Path) -> Path:
    rows = make_rows([24, 16])
    long = "word " * 300
    return write_rows(
        tmp_path / "rows.jsonl",
        [
            *rows,
            {**rows[0], "rejected": rows[0]["chosen"]},
            {**rows[1], "chosen": " "},
            {**rows[2], "chosen": long, "rejected": long + "x"},
            {**rows[3], "client": None},
            {**rows[4], "client": float("nan")},
        ],
    )


def of(settings: dict[str, Any], path: Path, **data: Any) -> Experiment:
    content = {**settings, "data": {**settings["data"], "path": str(path), **data}}
    return config.parse(Experiment, content, "test")


def test_all_rows_are_read_before_one_message_says_what_cannot_be_used(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = of(settings, awkward(tmp_path))
    with pytest.raises(UserError, match="5 of 45 rows cannot be used") as caught:
        encoded(spec, spec.build_task())
    message = str(caught.value)
    for part in (
        "1 state no preference",
        "1 have an empty prompt or answer",
        "1 are longer",
        "task.truncation_mode=keep_end",
        "2 belong to nobody",
        "line 44; ",
        "data.unusable=skip leaves them all out",
    ):
        assert part in message


def test_what_is_skipped_is_counted_by_check_in_the_run_and_on_its_page(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    content = {
        **settings,
        "rounds": 1,
        "data": {**settings["data"], "path": str(awkward(tmp_path)), "unusable": "skip"},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content))
    checked = CliRunner().invoke(cli.app, ["check", str(tmp_path / "spec.yaml")])
    assert checked.exit_code == 0, checked.output
    words = " ".join(checked.output.split())
    assert "5 of 45 rows cannot be used: 1 no preference, 1 empty" in words
    assert "have fewer than 10 held-out examples" in words
    out = tmp_path / "run"
    ran = CliRunner().invoke(cli.app, ["run", str(tmp_path / "spec.yaml"), "--output", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "5 of 45 rows cannot be used" in " ".join(ran.output.split())
    assert FinishedRun.at(out).data["unusable"] == {
        "no preference": 1,
        "empty": 1,
        "no client": 2,
        "too long": 1,
    }
    assert "2 unusable (no client)" in facts(read_run(out))["rows"]


# ---- the split is by what a prompt says


@pytest.mark.parametrize(
    "spelling",
    [
        "Where is the café?",
        "  Where is  the café?\n",
        "Where is the cafe\u0301?",
        "Human: Where is the café?\n\nAssistant:",
        "Human: Hello.\n\nAssistant: Hello.\n\nHuman: Where is the café?\n\nAssistant:",
        "Human: Where is the café?\n\nAssistant: Well,",
        "Human: Where is the café?\r\n\r\nAssistant:",
        "Be nice.\nHuman: Where is the café?\n\nAssistant:",
        "\ufeffWhere is the café?",
        "Where is the café?\u200b",
        (user("Where is the café?"),),
        ({"role": "system", "content": "Be short."}, user("Where is the café? ")),
        (user("Hello."), said("Hello."), user("Where is the café?")),
    ],
)
def test_a_question_is_one_in_every_spelling(spelling: Any) -> None:
    assert question(spelling) == "Where is the café?"
    assert keyed(spelling, "question", "k" * 16) == keyed(
        "Where is the café?", "question", "k" * 16
    )
    assert keyed(spelling, "question", "k" * 16) != keyed(spelling, "question", "l" * 16)


def test_no_question_is_on_both_sides_over_spellings_and_clients(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for i in range(60):
        rows.append({**PAIR, "prompt": f"Question {i}?", "client": "a"})
        rows.append({**PAIR, "prompt": f" Question  {i}? ", "client": "b"})
        rows.append(
            {
                "prompt": [user(f"Question {i}?")],
                "chosen": [said("Yes.")],
                "rejected": [said("No.")],
                "client": "c",
            }
        )
    path = write_rows(tmp_path / "rows.jsonl", rows)
    reading = read(Files(path=str(path)), Natural(), 0)
    sides = [
        {question(row.prompt) for client in reading.clients for row in getattr(client, side)}
        for side in ("train", "test")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 60


def test_prompts_that_all_end_in_one_question_can_be_told_by_all_of_their_turns(
    tmp_path: Path,
) -> None:
    rows = [
        {
            "prompt": [{"role": "system", "content": f"Text {i}"}, user("Summarise it.")],
            "chosen": [said("Yes.")],
            "rejected": [said("No.")],
        }
        for i in range(40)
    ]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=r"no (training|held-out) rows"):
        read(Files(path=path), IID(clients=1), 0)
    reading = read(Files(path=path, split_by="prompt"), IID(clients=1), 0)
    assert reading.clients[0].train
    assert reading.clients[0].test
    plain = "Human: Hello.\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    turns = (user("Hello."), said("Yes?"), user("Why?"))
    assert digest(plain, "prompt") == digest(turns, "prompt") != digest("Why?", "prompt")
    two = [
        {**row, "prompt": [*row["prompt"][:1], user(f"Do {i % 8}.")]} for i, row in enumerate(rows)
    ]
    noted = read(Files(path=str(write_rows(tmp_path / "b.jsonl", two))), IID(clients=1), 0).notes
    assert "40 prompts end in 8 different questions" in noted[0]


@pytest.mark.long
def test_newcomers_are_not_measured_on_what_the_run_has_trained_on(
    settings: dict[str, Any], rows_file: Path, tmp_path: Path
) -> None:
    content = {**settings, "rounds": 1, "algorithm": {**settings["algorithm"], "name": "fedper"}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content))
    out = tmp_path / "run"
    ran = CliRunner().invoke(cli.app, ["run", str(tmp_path / "spec.yaml"), "--output", str(out)])
    assert ran.exit_code == 0, ran.output
    run = FinishedRun.at(out)
    trained = [row for client in run.experiment.clients()[0] for row in client.train]
    known = [{**PAIR, "prompt": f" {row.prompt} "} for row in trained]

    def source(path: Path) -> Files:
        return Files(path=str(path), test_fraction=0.9)  # more than the run has held out

    with pytest.raises(UserError, match="ask what the run has trained on"):
        personalize(out, source(write_rows(tmp_path / "known.jsonl", known)))
    new = [{**PAIR, "prompt": f"Something new, {i}?"} for i in range(40)]
    path = write_rows(tmp_path / "new.jsonl", [*known, *new])
    joined = personalize(out, source(path))["new"]
    held_out = read(source(path), IID(clients=1), 0, run.trained_prompts or ())
    assert joined.test == len(held_out.clients[0].test)
    assert all("Something new" in str(row.prompt) for row in held_out.clients[0].test)


NAMED = ("q", "good", "bad", "client")  # prompt, chosen, rejected, client


@pytest.mark.long
def test_newcomers_are_read_as_the_runs_rows_were(settings: dict[str, Any], tmp_path: Path) -> None:
    def renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "q": row["prompt"],
                "good": row["chosen"],
                "bad": row["rejected"],
                "client": row["client"],
            }
            for row in rows
        ]

    columns = {"prompt_column": "q", "chosen_column": "good", "rejected_column": "bad"}
    path = write_rows(tmp_path / "rows.jsonl", renamed(make_rows([24, 16])))
    content = {
        **settings,
        "rounds": 1,
        "algorithm": {**settings["algorithm"], "name": "fedper"},
        "data": {"name": "files", "path": str(path), **columns, "test_fraction": 0.3},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content))
    out = tmp_path / "run"
    ran = CliRunner().invoke(cli.app, ["run", str(tmp_path / "spec.yaml"), "--output", str(out)])
    assert ran.exit_code == 0, ran.output
    later = renamed(
        [{**row, "prompt": f"New {i}?", "client": "z"} for i, row in enumerate(make_rows([30]))]
    )
    joined = personalize(out, Files(path=str(write_rows(tmp_path / "later.jsonl", later))))
    assert joined["later"].train + joined["later"].test == 30
    with (tmp_path / "later.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, NAMED)
        writer.writeheader()
        writer.writerows(later)
    again = personalize(out, Files(path=str(tmp_path / "later.csv")), name="again")
    assert again["again"].test == joined["later"].test


# ---- three sides


def test_settings_are_chosen_on_rows_that_nobody_trains_on_and_the_test_stays(
    tmp_path: Path,
) -> None:
    rows = [{**PAIR, "prompt": f"Question {i}?"} for i in range(200)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))

    def sides(evaluate_on: Any = "test", **settings: Any) -> tuple[set[str], set[str]]:
        reading = read(Files(path=path, **settings), IID(clients=1), 0, evaluate_on=evaluate_on)
        (client,) = reading.clients
        return {str(row.prompt) for row in client.train}, {str(row.prompt) for row in client.test}

    train, test = sides()
    assert len(train | test) == 200
    fewer, same = sides(validation_fraction=0.25)
    assert same == test
    again, validation = sides("validation", validation_fraction=0.25)
    assert again == fewer
    assert validation == train - fewer
    assert not validation & test
    assert 25 < len(validation) < 60
    _, other = sides(split_seed=1)
    assert other != test
    assert len(other & test) < 20
    _, other_validation = sides("validation", split_seed=1, validation_fraction=0.25)
    assert other_validation != validation
    with pytest.raises(UserError, match=r"Set data\.validation_fraction"):
        sides("validation")


# ---- configs


def test_a_config_reads_no_environment_however_it_is_written(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPREF_SECRET", "topsecret")
    for name in (
        "${oc.env:FEDPREF_SECRET}",
        "\\\\${oc.env:FEDPREF_SECRET}",
        "${${seed}:FEDPREF_SECRET}",
        "${${oc.env:FEDPREF_SECRET}}",
    ):
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump({**settings, "name": name}))
        with pytest.raises(UserError, match="is not read into a config"):
            Experiment.load(file)


@pytest.mark.long
def test_what_is_written_out_is_not_taken_for_aliases(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    chances = {f"client-{i}": 1.0 for i in range(6000)}
    federation = {"sampling": "weighted", "sampling_weights": chances, "clients_per_round": 2}
    spec = config.parse(Experiment, {**settings, "federation": federation}, "test")
    (tmp_path / "c.yaml").write_text(config.to_yaml(spec))
    assert Experiment.load(tmp_path / "c.yaml") == spec


def test_a_config_that_is_nested_without_end_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: " + "[" * 50_000 + "]" * 50_000)
    with pytest.raises(UserError, match=r"nested more than 100 deep|maximum nesting depth"):
        Experiment.load(tmp_path / "c.yaml")


# ---- clients that are left without rows


def too_long(path: Path, name: str) -> Path:
    """A client of whose rows none can be used."""
    long = "word " * 300
    rows = make_rows([20], seed=9)
    return write_rows(
        path, [{**row, "client": name, "chosen": long, "rejected": long + "x"} for row in rows]
    )


def test_nobody_joins_and_nothing_is_measured_without_rows(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    content = {**settings, "rounds": 1, "data": {**settings["data"], "unusable": "skip"}}
    place = tmp_path / "run"
    ran = run(config.parse(Experiment, content, "test"), place)
    late = too_long(tmp_path / "late.jsonl", "late")
    with (
        pytest.warns(UserWarning, match="cannot be used"),
        pytest.raises(UserError, match="has no training rows left"),
    ):
        personalize(place, Files(path=str(late)))
    assert not (place / "newcomers.jsonl").exists()
    assert FinishedRun.at(ran.path).joined == {}
    with (
        pytest.warns(UserWarning, match="cannot be used"),
        pytest.raises(UserError, match="has no held-out rows left"),
    ):
        evaluate(place, Files(path=str(late)))
    strict = (place / "config.yaml").read_text().replace("unusable: skip", "unusable: refuse")
    (place / "config.yaml").write_text(strict)
    with pytest.raises(UserError, match="20 of 20 rows cannot be used"):
        evaluate(place, Files(path=str(late)))


def test_a_site_whose_client_is_left_without_rows_says_so(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(settings["data"]["path"]).read_text().splitlines()]
    late = too_long(tmp_path / "late.jsonl", "late").read_text()
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps(row) + "\n" for row in rows) + late)
    content = {**settings, "data": {**settings["data"], "path": str(both), "unusable": "skip"}}
    with pytest.raises(UserError, match="client 'late' has no training rows left"):
        SimulatedSite(0, 1).host(content, tmp_path / "site")


def test_newcomers_of_a_validated_run_are_tested_on_all_they_hold_out(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    data = {**settings["data"], "validation_fraction": 0.3}
    content = {**settings, "rounds": 1, "data": data, "evaluate_on": "validation"}
    run(config.parse(Experiment, content, "test"), tmp_path / "run")
    late = write_rows(
        tmp_path / "late.jsonl",
        [{"prompt": f"Something new {i}?", "chosen": " yes", "rejected": " no"} for i in range(30)],
    )
    (one,) = personalize(
        tmp_path / "run", Files(path=str(late), split_by="prompt"), steps=1
    ).values()
    assert one.train + one.test == 30


def test_a_run_of_an_older_version_is_read_though_it_could_not_begin_now(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    place = tmp_path / "run"
    run(config.parse(Experiment, {**settings, "rounds": 1}, "test"), place)
    written = yaml.safe_load((place / "config.yaml").read_text())
    written["federation"] |= {"sampling": "examples", "weighting": "examples"}
    (place / "config.yaml").write_text(yaml.safe_dump(written))
    assert FinishedRun.at(place).experiment.federation.sampling == "examples"
    with pytest.raises(UserError, match="count a client's examples twice"):
        run(Experiment.load(place / "config.yaml"), tmp_path / "other")


def test_answers_that_are_trained_on_and_held_out_are_said(tmp_path: Path) -> None:
    def rows(chosen: str, rejected: str) -> list[dict[str, Any]]:
        return [
            {
                "prompt": f"Question {i}?",
                "chosen": chosen.format(i),
                "rejected": rejected.format(i + 1),
                "client": f"{i % 2}",
            }
            for i in range(60)
        ]

    long = "What is said of number {} in some forty characters or more."
    for name, content, is_said in (
        ("ring", rows(long, long), True),  # each answer loses where it does not win
        ("own", rows(long, "No: " + long), False),
        ("short", rows("Yes {}.", "Yes {}."), False),
    ):
        path = write_rows(tmp_path / f"{name}.jsonl", content)
        notes = read(Files(path=str(path)), Natural(), 0).notes
        assert bool(notes) == is_said
        assert all("have an answer that training rows have too" in note for note in notes)
        # a site's own split is its own
        assert not read(Files(path=str(path)), Natural(), 0, apart=True).notes
