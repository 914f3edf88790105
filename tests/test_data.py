"""Rows in every format, from every kind of place, to clients by every partition."""

from __future__ import annotations

import csv
import gzip
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from conftest import make_rows, write_rows
from fedpref import config
from fedpref.data import (
    HH,
    IID,
    Builtin,
    BySize,
    Dirichlet,
    Feedback,
    Files,
    MovieReviews,
    Natural,
    Persona,
    Preference,
    UKPConvArg,
    partition,
    split,
)
from fedpref.data.parsing import parse
from fedpref.data.preferences import key
from fedpref.data.reading import read
from fedpref.data.splits import held_out, question
from fedpref.data.tables import read_table
from fedpref.errors import UserError

ROWS = make_rows([20, 10])
PLAIN = {"prompt": "Human: Hi?\n\nAssistant:", "chosen": " Hello.", "rejected": " No."}


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def texts(row: Preference) -> tuple[Any, Any, Any]:
    return row.prompt, row.chosen, row.rejected


# ---- formats


def test_explicit_prompts_stay_as_they_are() -> None:
    row = parse({**PLAIN, "client": "a"}, "here")
    assert texts(row) == tuple(PLAIN.values())
    assert row.columns == {"client": "a"}


def test_columns_may_have_other_names() -> None:
    row = parse(
        {"q": "Hi?", "good": " Hello.", "bad": " No."},
        "here",
        prompt="q",
        chosen="good",
        rejected="bad",
    )
    assert texts(row) == ("Hi?", " Hello.", " No.")


def test_an_implicit_prompt_is_cut_at_the_last_common_assistant_turn() -> None:
    opening = "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    row = parse(
        {"chosen": opening + " Because of rain.", "rejected": opening + " Because of snow."}, "here"
    )
    assert texts(row) == (opening, " Because of rain.", " Because of snow.")


def test_the_last_human_turn_is_one_that_begins_a_line() -> None:
    asked = "What does Human: mean in a file?"
    assert question(f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: {asked}\n\nAssistant:") == asked
    assert question(f"Human: {asked}\n\nAssistant:") == asked
    assert question(asked) == asked


def test_an_implicit_prompt_without_turns_is_cut_at_a_whole_word() -> None:
    row = parse({"chosen": "The sky is blue", "rejected": "The sky is black"}, "here")
    assert texts(row) == ("The sky is", " blue", " black")


def test_conversations_may_have_explicit_or_implicit_prompts() -> None:
    explicit = parse(
        {
            "prompt": chat("Hi?"),
            "chosen": chat("Hi?", "Yes.")[1:],
            "rejected": chat("Hi?", "No.")[1:],
        },
        "here",
    )
    implicit = parse({"chosen": chat("Hi?", "Yes."), "rejected": chat("Hi?", "No.")}, "here")
    assert (
        texts(explicit)
        == texts(implicit)
        == (tuple(chat("Hi?")), tuple(chat("Hi?", "Yes.")[1:]), tuple(chat("Hi?", "No.")[1:]))
    )


BAD_ROWS = [
    ({"prompt": "Hi?", "chosen": " a"}, "no column 'rejected'"),
    ({**PLAIN, "chosen": "  "}, "column 'chosen': expected text"),
    ({**PLAIN, "prompt": None}, "column 'prompt': expected text"),
    ({**PLAIN, "chosen": [{"role": "assistant", "content": None}]}, "expected messages"),
    ({**PLAIN, "rejected": None}, "column 'rejected': expected text"),
    ({**PLAIN, "rejected": PLAIN["chosen"]}, "identical"),
    ({**PLAIN, "prompt": chat("Hi?")}, "must all be text or all be conversations"),
    ({"chosen": "up", "rejected": "down"}, "no prompt column"),
    ({"chosen": chat("a", "b"), "rejected": chat("c", "d")}, "share no opening"),
    ({**PLAIN, "chosen": [{"role": "assistant"}]}, "expected messages"),
]


@pytest.mark.parametrize(("record", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_a_row_that_cannot_be_used_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(record, "rows.jsonl, line 7")
    assert str(caught.value).startswith("rows.jsonl, line 7")


def test_judgements_are_read_from_files_in_trls_unpaired_format(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi?", "completion": " Hello.", "label": True, "client": "a"},
        {
            "prompt": chat("Hi?"),
            "completion": chat("Hi?", "Hello.")[1:],
            "label": False,
            "client": "b",
        },
    ]
    read = list(Files(path=str(write_rows(tmp_path / "rows.jsonl", rows))).read())
    assert read[0] == Feedback("Hi?", " Hello.", True, read[0].where, {"client": "a"})
    assert isinstance(read[1], Feedback)
    assert (read[1].prompt, read[1].label) == (tuple(chat("Hi?")), False)
    (tmp_path / "rows.csv").write_text("q,a,good\nHi?, Hello.,0\nHo?, No.,TRUE\n")
    named = Files(
        path=str(tmp_path / "rows.csv"),
        prompt_column="q",
        completion_column="a",
        label_column="good",
    )
    assert [row.label for row in named.read() if isinstance(row, Feedback)] == [False, True]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"completion": " a", "label": True}, "no column 'prompt'"),
        ({"prompt": "Hi?", "completion": "", "label": True}, "column 'completion': expected text"),
        (
            {"prompt": "Hi?", "completion": " a", "label": "good"},
            "column 'label': expected true or false",
        ),
        (
            {"prompt": chat("Hi?"), "completion": " a", "label": 1},
            "must both be text or both be conversations",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_judgement_that_cannot_be_used_is_named(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = Files(path=str(write_rows(tmp_path / "rows.jsonl", [record])))
    with pytest.raises(UserError, match=message) as caught:
        read(source, IID(clients=1), 0)
    assert "rows.jsonl, line 1" in str(caught.value)


# ---- places


def write(path: Path) -> Path:
    """The rows in the format that the path's name asks for."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    elif path.name == "saved":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    elif path.name == "folder":
        path.mkdir()
        datasets.Dataset.from_list(ROWS).to_parquet(path / "train-00000-of-00001.parquet")
    else:
        write_rows(path, ROWS)
    return path


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet", "saved", "folder"],
)
def test_every_place_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    read = list(Files(path=str(write(tmp_path / name))).read())
    assert [texts(row) for row in read] == [(r["prompt"], r["chosen"], r["rejected"]) for r in ROWS]
    assert [row.columns["client"] for row in read] == [r["client"] for r in ROWS]
    assert read[2].where.endswith(("row 3", "line 3"))


BAD_FILES = [
    ("rows.txt", b"x", "unknown kind of file"),
    ("rows.jsonl", b'{"a": 1}\n{"b"', "line 2: not valid JSON"),
    ("rows.jsonl", b"[1]", "expected a JSON object"),
    ("rows.json", b"{}", "expected a JSON list"),
    ("rows.jsonl", b"\xff\xfe", "cannot be read as UTF-8"),
    ("rows.jsonl.gz", b"plain", "cannot be read as gzipped"),
    ("rows.parquet", b"PAR0", "not a Parquet file"),
    ("rows.csv", b"a,b\n1,2,3\n", "row 1: more or fewer cells"),
    ("rows.csv", b"a,b\n1\n", "row 1: more or fewer cells"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), BAD_FILES, ids=[message for *_, message in BAD_FILES]
)
def test_a_file_that_cannot_be_read_is_a_sentence(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_table(str(tmp_path / name)))


def test_marks_that_editors_leave_and_separators_within_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\nHi?, yes, no\n")
    assert [texts(row) for row in Files(path=str(tmp_path / "rows.csv")).read()] == [
        ("Hi?", " yes", " no")
    ]
    odd = {**PLAIN, "chosen": " one\u2028two\u0085three"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(odd, ensure_ascii=False) + "\n")
    assert [row.chosen for row in Files(path=str(tmp_path / "rows.jsonl")).read()] == [
        odd["chosen"]
    ]


def test_a_place_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        list(Files(path=str(tmp_path / "absent.jsonl")).read())
    with pytest.raises(UserError, match="could not be loaded as a Hub dataset"):
        list(Files(path="nobody/nothing-at-all").read())
    write(tmp_path / "saved")
    with pytest.raises(UserError, match="no split 'test'"):
        list(Files(path=str(tmp_path / "saved"), test_split="test").read())


# ---- sides


def test_no_prompt_stands_on_both_sides() -> None:
    rows = [Preference(f"prompt {i % 40}", " a", " b", f"row {i}") for i in range(400)]
    placed, left_out = split(rows, 0.3)
    train, test = (
        {row.prompt for side, row in placed if side == wanted} for wanted in ("train", "test")
    )
    assert not train & test
    assert left_out == 0
    assert 4 <= len(test) <= 20


def test_a_sources_own_split_wins_and_shared_prompts_leave_the_training_side() -> None:
    rows = [
        Preference("p", " a", " b", "1", side="train"),
        Preference("p", " a", " c", "2", side="test"),
    ]
    rows.append(Preference("q", " a", " b", "3", side="train"))
    placed, left_out = split(rows, 0.5)
    assert [(side, row.where) for side, row in placed] == [("test", "2"), ("train", "3")]
    assert left_out == 1


def test_a_prompt_that_one_part_of_a_source_tests_is_trained_on_by_no_other(tmp_path: Path) -> None:
    train_side = next(f"p{i}" for i in range(99) if not held_out(f"p{i}", 0.5))
    test_side = next(f"p{i}" for i in range(99) if held_out(f"p{i}", 0.5))
    rows = [
        Preference(train_side, " a", " b", "1"),
        Preference(train_side, " a", " c", "2", side="test"),
    ]
    rows += [
        Preference(test_side, " a", " b", "3"),
        Preference(test_side, " a", " c", "4", side="train"),
    ]
    placed, left_out = split(rows, 0.5)
    assert [(side, row.where) for side, row in placed] == [
        ("test", "1"),
        ("test", "2"),
        ("test", "3"),
    ]
    assert left_out == 1


def test_a_side_that_is_none_trains() -> None:
    odd: Any = "dev"
    rows = [Preference(f"p{i}", " a", " b", f"{i}", side=odd) for i in range(20)]
    placed, _ = split(rows, 0.9)
    assert [side for side, _ in placed] == ["train"] * 20


def test_rows_are_passed_on_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "{no row"]))
    rows = Files(path=str(tmp_path / "rows.jsonl")).read()
    first = next(rows)
    assert isinstance(first, Preference)
    assert first.where.endswith("line 1")
    with pytest.raises(UserError, match=f"line {len(lines) + 1}: not valid JSON"):
        list(rows)


def test_files_take_their_split_from_a_column_or_from_a_test_split(tmp_path: Path) -> None:
    rows = [{**row, "fold": "test" if i % 5 == 0 else "train"} for i, row in enumerate(ROWS)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert [row.side for row in Files(path=str(path), split_column="fold").read()] == [
        row["fold"] for row in rows
    ]
    with pytest.raises(UserError, match="must say"):
        list(Files(path=str(path), split_column="client").read())
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(ROWS[:20]),
            "heldout": datasets.Dataset.from_list(ROWS[20:]),
        }
    ).save_to_disk(tmp_path / "both")
    sides = [row.side for row in Files(path=str(tmp_path / "both"), test_split="heldout").read()]
    assert sides == ["train"] * 20 + ["test"] * 10
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert len(list(Files(path=str(tmp_path / "one")).read())) == len(ROWS)
    with pytest.raises(UserError, match=r"data\.test_split: .* is one table and has no splits"):
        list(Files(path=str(tmp_path / "one"), test_split="test").read())


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
def test_a_folder_is_read_alike_whatever_form_it_was_kept_in(form: str, tmp_path: Path) -> None:
    rows = [{**row, "client": i % 2} for i, row in enumerate(ROWS)]
    table = datasets.Dataset.from_list(rows)
    table.with_format(form, columns=["client"]).save_to_disk(tmp_path / form)
    table.save_to_disk(tmp_path / "plain")
    read = [list(Files(path=str(tmp_path / name)).read()) for name in (form, "plain")]
    assert [(row.prompt, row.columns) for row in read[0]] == [
        (row.prompt, row.columns) for row in read[1]
    ]


def test_pictures_beside_texts_are_not_looked_at(tmp_path: Path) -> None:
    none = {"image": b"no picture", "images": [b"none"], "more": {"image": b"none"}}
    table = datasets.Dataset.from_list([{**row, **none} for row in ROWS])
    kinds = {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    shown = {**table.features, **kinds, "more": {"image": datasets.Image()}}
    table.cast(datasets.Features(shown)).save_to_disk(tmp_path / "one")
    assert len(list(Files(path=str(tmp_path / "one")).read())) == len(ROWS)


def test_the_side_of_a_prompt_never_changes() -> None:
    assert [i for i in range(40) if held_out(f"prompt {i}")] == [0, 4, 9, 26, 28, 29, 39]
    share = sum(held_out(f"prompt {i}", 0.25) for i in range(4000)) / 4000
    assert abs(share - 0.25) < 0.03


# ---- partitions


def placed(count: int = 300, labels: int = 3) -> list[tuple[Any, Preference]]:
    rows = [
        Preference(f"prompt {i}", " a", " b", f"row {i}", {"label": f"l{i % labels}"})
        for i in range(count)
    ]
    return split(rows, 0.3)[0]


@pytest.mark.parametrize(
    "how",
    [
        Natural(column="label"),
        IID(clients=7),
        Dirichlet(clients=5, alpha=1.0),
        BySize(clients=6, exponent=0.7),
    ],
)
def test_a_partition_gives_every_row_to_one_client_and_depends_on_its_seed_alone(how: Any) -> None:
    rows = placed()
    clients = partition(rows, how, seed=3)
    given = [row.where for client in clients for row in client.train + client.test]
    assert sorted(given) == sorted(row.where for _, row in rows)
    assert clients == partition(rows, how, seed=3)
    sides = {row.where: side for side, row in rows}
    assert all(sides[row.where] == "train" for client in clients for row in client.train)


def test_iid_shares_are_equal_to_one_row() -> None:
    sizes = [len(client.train) for client in partition(placed(), IID(clients=7), seed=0)]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_skews_labels_more_when_alpha_is_small() -> None:
    def skew(alpha: float) -> float:
        clients = partition(placed(3000), Dirichlet(clients=4, alpha=alpha), seed=1)
        shares = [
            np.bincount([int(row.columns["label"][1]) for row in c.train], minlength=3)
            / len(c.train)
            for c in clients
        ]
        return float(np.mean([share.max() for share in shares]))

    assert skew(0.3) > skew(100.0) + 0.15


def test_sizes_fall_off_as_the_power_law_says() -> None:
    clients = partition(placed(3000), BySize(clients=4, exponent=1.0), seed=0)
    first = len(clients[0].train)
    assert [round(first / len(client.train), 1) for client in clients] == pytest.approx(
        [1, 2, 3, 4], abs=0.1
    )


def test_natural_clients_can_be_chosen_by_size() -> None:
    rows = placed(90)
    few = [("train", Preference("x", " a", " b", "extra", {"label": "small"}))]
    assert [c.name for c in partition(rows + few, Natural(column="label", min_rows=2), 0)] == [
        "l0",
        "l1",
        "l2",
    ]
    assert [
        c.name
        for c in partition(rows + few, Natural(column="label", min_test_rows=1, max_clients=2), 0)
    ] == ["l0", "l1"]
    held = [("test", replace(few[0][1], prompt=f"y{k}")) for k in range(3)]
    with pytest.raises(UserError, match="have no training rows"):
        partition(rows + held, Natural(column="label"), 0)
    kept = partition(rows + held, Natural(column="label", min_test_rows=1), 0)
    assert [c.name for c in kept] == ["l0", "l1", "l2"]
    several = partition(rows, Natural(column="label", clients_per_value=2), 0)
    assert {
        c.name.rsplit("-", 1)[0]: {row.columns["label"] for row in c.train + c.test}
        for c in several
    } == {label: {label} for label in {row.columns["label"] for _, row in rows}}
    assert (
        sum(len(c.train) + len(c.test) for c in several)
        == len(rows)
        == len({row.where for c in several for row in c.train + c.test})
    )
    for how in (Natural(column="label", max_rows=20), IID(clients=2, max_rows=20)):
        thin = partition(rows, how, 0)
        assert all(len(c.train) + len(c.test) == 20 for c in thin)
        shares = [len(c.test) / 20 for c in thin]
        assert shares == pytest.approx(
            [sum(side == "test" for side, _ in rows) / len(rows)] * len(thin), abs=0.06
        )
        assert len({row.where for c in thin for row in c.train + c.test}) == 20 * len(thin)
    with pytest.raises(UserError, match="lower min_rows"):
        partition(rows, Natural(column="label", min_rows=1000), 0)


def test_rows_in_memory_are_grouped_as_those_of_files() -> None:
    rows: list[Any] = [
        ("train", Preference("p", " a", " b", "row 1", {"label": 1.0})),
        ("test", Preference("q", " a", " b", "row 2", {"label": "1 "})),
    ]
    (one,) = partition(rows, Natural(column="label"), 0)
    assert [row.columns["label"] for row in one.rows] == ["1", "1"]
    with pytest.raises(UserError, match="share rows out by partition"):
        partition(rows, Natural(column="town"), 0)
    with pytest.raises(UserError, match="no client has 1 rows"):
        partition([], Natural(), 0)


def test_few_rows_of_a_client_without_a_side_leave_it_without_that_side() -> None:
    pairs: list[Any] = [(side, row) for side, row in placed(90) if side == "test"]
    with pytest.raises(UserError, match="no training rows"):
        partition(pairs, Natural(column="label", max_rows=1), 0)


def test_clients_without_rows_on_a_side_are_named() -> None:
    rows = placed(90)
    only_train = [("train", Preference("x", " a", " b", "extra", {"label": "small"}))]
    with pytest.raises(UserError, match=r"1 of 4 clients have no held-out rows \(small\)"):
        partition(rows + only_train, Natural(column="label"), 0)
    only_test = [("test", Preference("x", " a", " b", "extra", {"label": "small"}))]
    with pytest.raises(UserError, match=r"1 of 4 clients have no training rows \(small\)"):
        partition(rows + only_test, Natural(column="label"), 0)
    with pytest.raises(UserError, match="take fewer clients"):
        partition(rows, IID(clients=80), 0)
    with pytest.raises(UserError, match=r"row 0: partition.column is 'town'"):
        partition(sorted(rows, key=lambda r: int(r[1].where[4:])), Natural(column="town"), 0)


# ---- shipped data


def test_the_shipped_clients_disagree_as_their_tastes_say() -> None:
    folder = Path(__file__).resolve().parent.parent / "src/fedpref/data/builtin"
    population = json.loads((folder / "population.json").read_text())
    requests = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    rows = list(Builtin().read())
    clients = partition(split(rows, 0.2)[0], Natural(column="client"), 0)
    assert len(clients) == 12
    assert len(requests) >= 120
    assert all(4 <= len(request["answers"]) <= 6 for request in requests)
    style = {(r["prompt"], a["text"]): a for r in requests for a in r["answers"]}
    styles = ("thorough", "warm", "bold", "formal")
    for client in clients:
        taste = population[client.name]["taste"]
        gaps = []
        for row in client.train + client.test:
            better, worse = (
                style[key(row.prompt).removeprefix("user: "), side[0]["content"]]
                for side in (row.chosen, row.rejected)
            )
            gaps.append(sum(taste[s] * (better[s] - worse[s]) for s in styles))
        agree = sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)
        assert agree > 0.6, client.name


# ---- public sets, in small local copies of their layouts


def hh_row(number: int, answer: str) -> dict[str, str]:
    opening = f"\n\nHuman: Question {number}?\n\nAssistant:"
    return {"chosen": f"{opening} {answer} yes.", "rejected": f"{opening} {answer} no."}


def test_hh_reads_the_hubs_layout_and_the_prepared_tables(tmp_path: Path) -> None:
    hub, tables = tmp_path / "hub", tmp_path / "tables"
    tables.mkdir()
    for objective in ("helpful", "harmless"):
        (hub / f"{objective}-base").mkdir(parents=True)
        rows = []
        for side in ("train", "test"):
            part = [hh_row(i + (100 if side == "test" else 0), objective) for i in range(4)]
            content = "\n".join(map(json.dumps, part)).encode()
            (hub / f"{objective}-base" / f"{side}.jsonl.gz").write_bytes(gzip.compress(content))
            for row in part:
                prompt, better, worse = texts(parse(row, "x"))
                rows.append(
                    {
                        "split": side,
                        "prompt": prompt.strip(),
                        "chosen": better.strip(),
                        "rejected": worse.strip(),
                    }
                )
        write_rows(tables / f"hh_rlhf_{objective}.jsonl", rows)
    read = {
        path: [(texts(r), r.side, r.columns["objective"]) for r in HH(path=str(path)).read()]
        for path in (hub, tables)
    }
    assert read[hub] == read[tables]
    assert len(read[hub]) == 16
    assert len(list(HH(path=str(tables), max_rows=2, objectives=("helpful",)).read())) == 4


def test_ukpconvarg_makes_a_row_of_every_vote_that_decides(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "ukpconvarg_topics.jsonl",
        [{"id": "t", "title": "Tea or coffee?", "stance": "Tea"}],
    )
    write_rows(
        tmp_path / "ukpconvarg_arguments.jsonl",
        [{"arg": "x", "text": "Leaves."}, {"arg": "y", "text": "Calm."}],
    )
    votes = [{"topic": "t", "a": "x", "b": "y", "votes": [["w1", 1], ["w2", 2, "same"], ["w3", 0]]}]
    write_rows(tmp_path / "ukpconvarg_votes.jsonl", votes)
    rows = list(UKPConvArg(path=str(tmp_path)).read())
    assert [(r.chosen, r.rejected, r.columns["worker"]) for r in rows] == [
        (" Leaves.", " Calm.", "w1"),
        (" Calm.", " Leaves.", "w2"),
    ]
    assert rows[0].prompt == "Human: Tea or coffee?\nArgue for this side: Tea\n\nAssistant:"
    with pytest.raises(UserError, match="there is no ukpconvarg_topics"):
        list(UKPConvArg(path=str(tmp_path / "absent")).read())


def test_persona_asks_about_statements_and_knows_its_personas(tmp_path: Path) -> None:
    (tmp_path / "persona_statements.csv").write_text(
        'persona,statement,persona_agrees\nopenness,"I like art, and new food",1\nopenness,I '
        "avoid change,0\n"
    )
    rows = list(Persona(path=str(tmp_path), personas=("openness",)).read())
    assert [(r.chosen, r.rejected) for r in rows] == [(" Yes", " No"), (" No", " Yes")]
    assert '"I like art, and new food"' in str(rows[0].prompt)
    with pytest.raises(UserError, match="has no persona"):
        list(Persona(path=str(tmp_path), personas=("kindness",)).read())


def test_persona_reads_the_hubs_layout(tmp_path: Path) -> None:
    (tmp_path / "persona").mkdir()
    rows = [
        {"statement": "I like art", "answer_matching_behavior": " Yes"},
        {"statement": "I rest", "answer_matching_behavior": " No"},
    ]
    write_rows(tmp_path / "persona" / "openness.jsonl", rows)
    assert [r.chosen for r in Persona(path=str(tmp_path), personas=("openness",)).read()] == [
        " Yes",
        " No",
    ]


@pytest.mark.parametrize("layout", ["tables", "hub"])
def test_movie_review_clients_disagree_about_the_same_endings(layout: str, tmp_path: Path) -> None:
    reviews = [
        (
            f"{i} opening words of a long film",
            ("a joy to see", "a waste of time")[i % 2],
            i % 2 == 0,
            i // 8,
        )
        for i in range(64)
    ]
    if layout == "tables":
        rows = [
            {"text": f"{a} {b}", "label": "pos" if good else "neg", "fold": fold}
            for a, b, good, fold in reviews
        ]
        write_rows(tmp_path / "movie_reviews_polarity.jsonl", rows)
    else:
        for side in ("train", "test"):
            part = [
                {"text": f"{a}<br />{b}", "label": int(good)}
                for a, b, good, fold in reviews
                if (fold >= 6) == (side == "test")
            ]
            write_rows(tmp_path / f"{side}.jsonl", part)
    rows = list(
        MovieReviews(
            path=str(tmp_path), likes=("positive", "negative"), opening_words=3, ending_words=4
        ).read()
    )
    assert len(rows) == 32
    assert len({row.prompt for row in rows}) == 32, "each review opens one pair, or ends one"
    for row in rows:
        wanted = " a joy to see" if row.columns["client"] == "01-positive" else " a waste of time"
        assert row.chosen == wanted
        assert row.rejected != wanted
        assert str(row.prompt).endswith(" ...")
    owned = [
        row.chosen
        == (" a joy to see" if row.columns["sentiment"] == "positive" else " a waste of time")
        for row in rows
    ]
    assert sum(owned) == len(rows) / 2  # belonging together decides nothing


def test_no_review_is_in_two_pairs(tmp_path: Path) -> None:
    reviews = [
        {"text": f"{i} opens and {i} ends", "label": ("pos", "neg")[i % 2], "fold": 0}
        for i in range(40)
    ]
    write_rows(tmp_path / "movie_reviews_polarity.jsonl", reviews)
    source = MovieReviews(path=str(tmp_path), opening_words=1, ending_words=2)
    used = []
    for row in source.read():
        used += [str(row.prompt).split()[0], *(str(text).split()[0] for text in row.said)]
    # of each pair the opening and an ending are one review's, and the other ending another's
    assert sorted(used) == sorted([*map(str, range(40)), *used[::3]])
    assert len(set(used[::3])) == 20


def test_natural_clients_can_be_some_of_the_values() -> None:
    rows = placed(30)
    assert [
        client.name for client in partition(rows, Natural(column="label", only=("l2", "l0")), 0)
    ] == ["l0", "l2"]
    spec = config.parse(Natural, {"column": "label", "only": [1, "l2"]}, "test")
    assert spec.only == (1, "l2")
    with pytest.raises(UserError, match="no row with label 'l9'"):
        partition(rows, Natural(column="label", only=("l9",)), 0)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_rows_are_chosen_by_values_however_their_file_writes_them(
    suffix: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"q{i}", "chosen": "a", "rejected": "b", "year": 2020.0, "ok": i % 2 == 0}
        for i in range(6)
    ]
    rows[0]["year"] = None
    file = tmp_path / f"rows.{suffix}"
    if between := {"csv": ",", "tsv": "\t"}.get(suffix):
        lines = [between.join(map(str, row.values())).replace("None", "") for row in rows]
        file.write_text("\n".join([between.join(rows[0]), *lines]) + "\n")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(list(Files(path=str(file), only={"ok": (True,)}).read())) == 3
    assert len(list(Files(path=str(file), only={"year": (2020,)}).read())) == 5
    assert len(list(Files(path=str(file), only={"year": ("2020",), "ok": ("False",)}).read())) == 3
    with pytest.raises(UserError, match="is one table and has no splits"):
        list(Files(path=str(file), test_split="test").read())
    for setting in ({"train_split": "all"}, {"config": "en"}):
        with pytest.warns(UserWarning, match="is one table and has no splits"):
            assert len(list(Files(path=str(file), **setting).read())) == 6


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_a_folders_text_files_are_read_as_they_stand(suffix: str, tmp_path: Path) -> None:
    clients = ["NA", "007", "2020-01-01"]
    rows = [
        {"prompt": f"{name} {number}", "chosen": "a", "rejected": "b", "client": name}
        for name in clients
        for number in range(10)
    ]
    between = {"csv": ",", "tsv": "\t"}.get(suffix)
    lines = [json.dumps(row) if between is None else between.join(row.values()) for row in rows]
    header = [between.join(rows[0])] if between else []
    (tmp_path / f"train.{suffix}").write_text("\n".join([*header, *lines]) + "\n")
    found = read(Files(path=str(tmp_path)), Natural(), 0).clients
    assert sorted(client.name for client in found) == sorted(clients)


def test_a_folders_files_are_read_or_it_is_said_which_are_not(tmp_path: Path) -> None:
    rows = make_rows([4, 4, 4])
    apart = [[row for row in rows if row["client"] == f"client-{k}"] for k in range(3)]
    folder = tmp_path / "kinds"
    folder.mkdir()
    write_rows(folder / "a.jsonl", apart[0])
    names = list(rows[0])
    lines = [",".join(f'"{row[name]}"' for name in names) for row in apart[1]]
    (folder / "b.csv").write_text("\n".join([",".join(names), *lines]) + "\n")
    datasets.Dataset.from_list(apart[2]).to_parquet(folder / "c.parquet")
    assert len(list(Files(path=str(folder)).read())) == 12
    (folder / "config.json").write_text("{}")  # which describes something
    assert len(list(Files(path=str(folder)).read())) == 12
    with pytest.raises(UserError, match='Unknown split "test"'):
        list(read_table(str(folder), split="test"))
    parted = tmp_path / "parted"
    for name in ("train", "raw"):
        (parted / name).mkdir(parents=True)
        write_rows(parted / name / "rows.jsonl", apart[0])
    with pytest.warns(UserWarning, match=r"not read \(raw"):
        assert len(list(Files(path=str(parted)).read())) == 4
    named = tmp_path / "named"
    named.mkdir()
    write_rows(named / "train.jsonl", apart[0])
    write_rows(named / "more.jsonl", apart[1])
    with pytest.warns(UserWarning, match=r"1 of its files are not read \(more\.jsonl\)"):
        assert len(list(Files(path=str(named)).read())) == 4
    (named / "train.jsonl").rename(named / "test.jsonl")
    with (
        pytest.warns(UserWarning, match=r"more\.jsonl"),
        pytest.raises(UserError, match="without any are all of the split 'train'") as said,
    ):
        list(Files(path=str(named)).read())
    assert "auth" not in str(said.value)
    (named / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: more.jsonl\n---\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(Files(path=str(named)).read())) == 4


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.json", '{"prompt": "q"}\n{"prompt": "r"}\n', "One row a line is a .jsonl file"),
        ("missing.jsonl.gz", None, "there is no file or folder"),
        ("missing.tsv", None, "there is no file or folder"),
    ],
)
def test_a_file_of_another_form_says_so(
    name: str, content: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content:
        Path(name).write_text(content)
    with pytest.raises(UserError, match=says):
        list(Files(path=name).read())


def test_who_has_no_held_out_rows_is_told_what_took_them(tmp_path: Path) -> None:
    asked = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "And now?"},
    ]
    rows = [
        {
            "prompt": [{**asked[0], "content": f"Hello {i}"}, *asked[1:]],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
            "client": "one",
        }
        for i in range(20)
    ]
    source = Files(path=str(write_rows(tmp_path / "rows.jsonl", rows)))
    with pytest.raises(UserError, match=r"let data.split_by=prompt tell prompts apart"):
        read(source, Natural(), 0).settled()
    few = replace(source, split_by="prompt")
    with pytest.raises(UserError, match=r"raise partition.max_rows \(2 rows"):
        read(few, Natural(max_rows=2), 0).settled()
