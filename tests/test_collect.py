"""People choose on a page of their own machine, and judge blind."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedpref import Experiment, UserError, config, run
from fedpref.cli import collecting
from fedpref.cli.shared import console
from fedpref.collect.drawing import Ahead, Plan, candidates_of, prompts_of
from fedpref.collect.review import judged, sentence, write
from fedpref.collect.server import Page
from fedpref.collect.sitting import RefusedError, Sitting, Texts
from fedpref.collect.speakers import speaker
from fedpref.collect.store import Item, Store
from fedpref.data import Collected, held_out
from fedpref.data.collected import FILE
from fedpref.data.preferences import Preference
from fedpref.experiments.experiment import with_whole_paths
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.run_files import read_json
from fedpref.models.loading import generate
from fedpref.numerics.intervals import share
from fedpref.runs.sweep import plan, write_plan
from fedpref.sites.consent import Consenting, Limits, SiteFile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
ONE = Texts("Choose between two answers", ["Which answer is better?"], [""])
TWO = Texts(
    "Choose between two answers",
    ["Which answer is more helpful?", "Which answer is more harmless?"],
    ["helpful", "harmless"],
)


def items(count: int, **settings: Any) -> list[Item]:
    return [
        Item(
            prompt=f"Question {k}?",
            first=f"First answer to {k}.",
            second=f"Second answer to {k}.",
            origins={"first": "a", "second": "b"},
            side="test" if k % 5 == 4 else "train",
            **{"shared": True, **settings},
        )
        for k in range(count)
    ]


def sitting(folder: Path, count: int = 6, texts: Texts = ONE, **settings: Any) -> Sitting:
    store = Store(folder)
    if not store.items():
        store.add(items(count, **settings))
    return Sitting(store, texts, seed=0)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def read(store: Store) -> list[Any]:
    return list(Collected(path=str(store.folder)).read())


def chosen(where: Sitting, rater: str, shown: str, number: int = 0, **more: Any) -> dict[str, Any]:
    """Choose about what the rater sees, and return what comes next."""
    state = where.next(rater)
    return where.choose(
        {
            "address": f"{rater}-{time.monotonic_ns()}-{number}",
            "rater": rater,
            "item": state["item"]["number"],
            "name": state["item"]["name"],
            "shown": shown,
            "seconds": 2.0,
            **more,
        }
    )


# ---- choices become preferences


def test_a_choice_of_the_text_that_was_shown_is_the_chosen_answer(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices")
    texts = {}
    while (state := where.next("Ann")).get("item"):
        side = "left" if state["done"] % 2 else "right"
        texts[state["item"]["prompt"][0]["text"]] = state["item"][side]
        chosen(where, "Ann", side)
    rows = list(read(where.store))
    assert {row.prompt: row.chosen for row in rows if isinstance(row, Preference)} == texts
    assert len({row.chosen.split()[0] for row in rows}) == 2, "sides are drawn"


def test_ties_bad_answers_and_skips_are_no_preferences(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices")
    for shown in ("tie", "bad", "skip"):
        chosen(where, "Ann", shown)
    assert list(read(where.store)) == []
    assert where.next("Ann")["done"] == 3


def test_an_edited_answer_is_chosen_over_what_it_was_made_of(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices")
    shown = where.next("Ann")["item"]["left"]
    chosen(where, "Ann", "left-edited", edited="A better one.")
    (row,) = read(where.store)
    assert isinstance(row, Preference)
    assert (row.chosen, row.rejected) == ("A better one.", shown)
    assert row.columns["edited"]
    with pytest.raises(RefusedError, match="itself"):
        chosen(where, "Ann", "left-edited", edited=where.next("Ann")["item"]["left"])


def test_an_answer_of_several_turns_is_not_edited_as_one(tmp_path: Path) -> None:
    """The user's turn in it would become the assistant's."""
    says = [turn("assistant", "Yes."), turn("user", "And then?"), turn("assistant", "No.")]
    talk = {"prompt": (turn("user", "Hi?"),), "first": tuple(says), "second": tuple(says[:1])}
    store = Store(tmp_path / "choices")
    store.add([replace(one, **talk) for one in items(1)])
    where = Sitting(store, ONE, seed=0)
    sides = {where.next("Ann")["item"][side] == "Yes.": side for side in ("left", "right")}
    with pytest.raises(RefusedError, match="several turns"):
        chosen(where, "Ann", f"{sides[False]}-edited", edited="All of it.")
    assert list(read(store)) == []
    chosen(where, "Ann", f"{sides[True]}-edited", edited="Surely.")
    (row,) = read(store)
    assert (row.chosen[-1]["content"], row.rejected[-1]["content"]) == ("Surely.", "Yes.")


def test_each_objective_is_a_question_of_its_own(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices", texts=TWO)
    first = where.next("Ann")["item"]
    after = chosen(where, "Ann", "left")["item"]
    assert after["number"] == first["number"], "the second question is about the same item"
    assert (first["name"], after["name"]) == ("helpful", "harmless")
    assert after["left"] == first["left"]
    chosen(where, "Ann", "right")
    rows = [row for row in read(where.store) if isinstance(row, Preference)]
    assert [row.columns["objective"] for row in rows] == ["helpful", "harmless"]
    assert rows[0].chosen == rows[1].rejected


def test_undoing_brings_the_item_back_and_nothing_of_the_choice_stays(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices")
    first = where.next("Ann")["item"]
    chosen(where, "Ann", "left")
    state = where.undo({"address": "undo-number-1", "rater": "Ann"})
    assert state["item"]["number"] == first["number"]
    assert state["done"] == 0
    assert list(read(where.store)) == []
    again = where.undo({"address": "undo-number-1", "rater": "Ann"})
    assert again["item"]["number"] == first["number"], "sent twice, done once"
    chosen(where, "Ann", "right")
    (row,) = read(where.store)
    assert isinstance(row, Preference)
    assert row.chosen == first["right"]


def test_a_choice_that_is_sent_twice_is_written_once(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices")
    item = where.next("Ann")["item"]
    asked = {"rater": "Ann", "item": item["number"], "name": "", "shown": "left", "seconds": 1}
    for address in ("the-same-choice", "the-same-choice", "another-address"):
        where.choose({"address": address, **asked})
    assert len(where.store.standing()) == 1


def test_items_are_shared_or_of_one_rater(tmp_path: Path) -> None:
    store = Store(tmp_path / "choices")
    store.add(items(4, shared=False))
    store.add(
        [Item(prompt="All?", first="a", second="b", origins={}, shared=True)],
    )
    where = Sitting(store, ONE, seed=0)
    seen: dict[str, list[int]] = {"Ann": [], "Bob": []}
    for turn in range(20):
        rater = ("Ann", "Bob")[turn % 2]
        if "item" in (state := where.next(rater)):
            seen[rater].append(state["item"]["number"])
            chosen(where, rater, "left")
    assert sorted(seen["Ann"] + seen["Bob"]) == [1, 2, 3, 4, 5, 5]
    assert where.next("Ann") == where.next("Ann")
    assert not where.next("Bob")["waiting"]


def test_uncertain_items_come_least_sure_first_with_random_ones_in_their_share(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "choices")
    margins = [3.0, -0.5, 1.0, -2.0]
    store.add([*map(uncertain, margins), *items(4)])
    where = Sitting(store, ONE, seed=0)
    order = []
    while "item" in (state := where.next("Ann")):
        order.append(state["item"]["number"])
        chosen(where, "Ann", "left")
    assert [number for number in order if number <= 4] == [2, 3, 4, 1]
    assert order[:4] != [2, 3, 4, 1], "random ones stand in between"
    rows = [row for row in read(store) if isinstance(row, Preference)]
    assert sorted({row.columns["selected"] for row in rows}) == ["random", "uncertain"]


def uncertain(margin: float) -> Item:
    return Item(
        prompt=f"Sure by {margin}?",
        first="a",
        second="b",
        origins={"first": "m", "second": "m"},
        selected="uncertain",
        margin=margin,
    )


def test_held_out_prompts_are_those_that_a_run_holds_out(tmp_path: Path) -> None:
    plan = Plan(select="uncertain", random_share=0.0)
    made = [plan.item(f"Prompt {k}", "a", "b", ("x", "y"), 1.0) for k in range(200)]
    assert [item.side == "test" for item in made] == [held_out(f"Prompt {k}") for k in range(200)]
    assert all(item.selected == "random" for item in made if item.side == "test")
    assert 20 < sum(item.side == "test" for item in made) < 60


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"rater": ""}, "characters"),
        ({"rater": "x" * 61}, "characters"),
        ({"rater": "A\x1b[2J"}, "printed"),
        ({"rater": 3}, "characters"),
        ({"address": "short"}, "address"),
        ({"item": 99}, "no such item"),
        ({"item": True}, "no such item"),
        ({"item": "1"}, "no such item"),
        ({"shown": "first"}, "no such item"),
        ({"shown": ["left"]}, "no such item"),
        ({"name": "helpful"}, "no such item"),
        ({"seconds": "1"}, "seconds"),
        ({"seconds": math.nan}, "seconds"),
        ({"seconds": -1}, "seconds"),
        ({"shown": "left-edited"}, "text"),
        ({"shown": "left-edited", "edited": " "}, "text"),
        ({"shown": "left-edited", "edited": "x" * 30_000}, "characters at most"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_written(
    asked: dict[str, Any], why: str, tmp_path: Path
) -> None:
    where = sitting(tmp_path / "choices")
    good = {"address": "a-good-address", "rater": "Ann", "item": 1, "name": "", "shown": "left"}
    with pytest.raises(RefusedError, match=why):
        where.choose({**good, "seconds": 1, **asked})
    assert where.store.standing() == []


def test_a_question_that_was_undone_elsewhere_is_asked_again(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices", texts=TWO)
    item = where.next("Ann")["item"]
    chosen(where, "Ann", "left")
    where.undo({"address": "from-another-tab", "rater": "Ann"})
    second = {"rater": "Ann", "item": item["number"], "name": "harmless", "shown": "left"}
    state = where.choose({"address": "in-the-first-tab", "seconds": 1, **second})
    assert (state["item"]["number"], state["item"]["name"]) == (item["number"], "helpful")


def test_half_a_character_is_refused_and_the_file_stays_readable(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices")
    with pytest.raises(RefusedError, match="text"):
        chosen(where, "Ann", "left-edited", edited="bad \ud83d")
    chosen(where, "Ann", "left-edited", edited="good \U0001f600")
    assert len(where.store.export().read_text(encoding="utf-8").splitlines()) == 1


def test_a_commit_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices")
    where.store._db.execute("pragma busy_timeout = 50")
    with closing(sqlite3.connect(tmp_path / "choices" / "choices.sqlite")) as other:
        reading = other.execute("select * from items")
        reading.fetchone()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            chosen(where, "Ann", "left")
        assert where.store.standing() == []
        reading.close()
    chosen(where, "Ann", "left")
    assert len(where.store.standing()) == 1
    mode = (tmp_path / "choices" / "choices.sqlite").stat().st_mode
    assert mode & 0o077 == 0


def test_an_item_on_a_screen_is_somebody_elses_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = sitting(tmp_path / "choices", 1, shared=False)
    assert "item" in where.next("A name with a slip")
    assert "item" not in where.next("Ann")
    monkeypatch.setattr("fedpref.collect.sitting.LEASE", 0.0)
    assert "item" in where.next("Ann")
    assert "item" in where.next("\u0645\u06cc\u200c\u0631\u0648\u062f")


# ---- runs on choices


def test_a_run_keeps_to_the_choices_that_were_there_when_it_began(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices", 8)
    for _ in range(4):
        chosen(where, "Ann", "left")
    content = {
        "data": {"name": "collected", "path": str(tmp_path / "choices")},
        "partition": {"name": "natural", "column": "rater"},
        "algorithm": {"name": "feddpo"},
    }
    begun = with_whole_paths(config.parse(Experiment, content, "the test"))
    before = list(begun.data.read())
    where.undo({"address": "undo-after-it", "rater": "Ann"})
    for _ in range(3):
        chosen(where, "Ann", "right")
    assert list(begun.data.read()) == before
    assert with_whole_paths(begun) == begun
    now = with_whole_paths(config.parse(Experiment, content, "the test"))
    assert len(list(now.data.read())) == 6


def test_a_site_goes_on_with_the_choices_of_its_runs_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = sitting(tmp_path / "choices", 60, shared=True)
    for _ in range(40):
        chosen(where, "Ann", "left")
    source = Collected(path=str(where.store.folder))
    experiment = {"data": {"name": "builtin"}, "algorithm": {"name": "feddpo"}, "rounds": 1}
    file = SiteFile(
        data=source,
        algorithms=("feddpo",),
        folder=str(tmp_path / "site"),
        limits=Limits(least_examples=2, least_evaluated=1),
    )
    site = Consenting("clinic", file)

    def sizes(run: str) -> int:
        about = site.host(experiment, tmp_path / "site" / run).about["clinic"]
        return int(about["train"] + about["test"])

    with caplog.at_level("INFO"):
        assert sizes("one") == 40
        for _ in range(5):
            chosen(where, "Ann", "left")
        assert sizes("one") == 40, "the run goes on with what it began with"
        assert sizes("two") == 45
    said = [record.getMessage() for record in caplog.records if record.name == "fedpref"]
    assert said == [
        "40 preferences, 40 more than when the last run began",
        "45 preferences, 5 more than when the last run began",
    ]


def test_a_sweep_that_is_begun_again_keeps_to_its_choices(tmp_path: Path) -> None:
    where = sitting(tmp_path / "choices", 8)
    for _ in range(4):
        chosen(where, "Ann", "left")
    settings = ["data.name=collected", f"data.path={where.store.folder}"]
    begun = plan(Path("feddpo"), ["feddpo", "alone"], [0], settings, tmp_path / "sweep")
    assert len({one.data.until for one in begun.values()}) == 1  # type: ignore[attr-defined]
    write_plan(begun, tmp_path / "sweep")
    chosen(where, "Ann", "left")
    again = plan(Path("feddpo"), ["feddpo", "alone"], [0], settings, tmp_path / "sweep")
    assert list(map(with_whole_paths, again.values())) == list(
        map(with_whole_paths, begun.values())
    )
    other = plan(Path("feddpo"), ["feddpo"], [0], settings, tmp_path / "other")
    assert len(list(next(iter(other.values())).data.read())) == 5


def test_a_damaged_file_of_choices_is_a_sentence(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.agree({"raters": [f"person {k}" for k in range(2000)]})
    store.close()
    file = tmp_path / FILE
    content = file.read_bytes()
    file.write_bytes(content[:6000] + bytes(len(content) - 6000))
    for read in (lambda: list(Collected(path=str(tmp_path)).read()), lambda: Store(tmp_path)):
        with pytest.raises(UserError, match=r"damaged|malformed|no choices"):
            read()


def test_a_folder_without_choices_and_another_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(Collected(path=str(tmp_path)).read())
    (tmp_path / "choices.sqlite").write_text("something else")
    with pytest.raises(UserError, match="no choices of"):
        list(Collected(path=str(tmp_path)).read())
    where = sitting(tmp_path / "few")
    with pytest.raises(UserError, match="another file, or an older one"):
        list(Collected(path=str(where.store.folder), until=5).read())


def test_a_folder_goes_on_as_it_was_begun_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path / "choices")
    store.agree({"seed": 0, "objectives": ["a"]})
    store.agree({"seed": 0, "objectives": ["a"]})
    with pytest.raises(UserError, match="begun with seed 0"):
        store.agree({"seed": 1})


# ---- answers


def test_candidates_are_every_two_answers_of_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    rows = [
        {"prompt": "One?", "completions": ["a", "b", "a", "c"]},
        {"prompt": "Two?", "chosen": "yes", "rejected": "no"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = list(candidates_of(file, Plan()))
    pairs = [(item.first, item.second) for item in made]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c"), ("yes", "no")]
    assert list(candidates_of(file, Plan(), made)) == []
    turned = {"prompt": "Two?", "completions": ["no", "yes"]}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, turned, turned]))
    assert list(candidates_of(file, Plan())) == made
    said = [[{"role": "assistant", "content": text}] for text in "ab"]
    talk = {"prompt": [{"role": "user", "content": "Hi?"}], "completions": said}
    file.write_text(json.dumps(talk) + "\n" + json.dumps(talk) + "\n")
    assert len(list(candidates_of(file, Plan()))) == 1
    assert made[0].origins == {"first": "answers.jsonl 1", "second": "answers.jsonl 2"}
    file.write_text('{"prompt": "One?", "completions": ["a"]}\n')
    with pytest.raises(UserError, match=r"line 1.*two answers"):
        list(candidates_of(file, Plan()))


def test_candidates_are_read_as_rows_to_train_on_are(tmp_path: Path) -> None:
    file, asks = tmp_path / "answers.jsonl", turn("user", "Hi?")
    whole = [[asks, turn("assistant", text)] for text in "ab"]
    file.write_text(json.dumps({"prompt": [asks], "chosen": whole[0], "rejected": whole[1]}) + "\n")
    (item,) = candidates_of(file, Plan())
    assert (item.prompt, item.first, item.second) == ((asks,), (whole[0][1],), (whole[1][1],))
    tool = {"type": "function", "function": {"name": "f"}}
    call = {"role": "assistant", "tool_calls": [tool]}
    for row, match in (
        ({"prompt": [asks], "completions": [[call], [whole[0][1]]]}, "calls a tool"),
        (
            {"prompt": [asks], "completions": [answer[1:] for answer in whole], "tools": [tool]},
            "has tools",
        ),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=match):
            list(candidates_of(file, Plan()))


def test_prompts_come_once_each_in_an_order_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Two?\n\nOne?\nTwo?\n")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    assert sorted(map(str, prompts_of(file))) == ["One?", "Two?"]
    assert prompts_of(file) == prompts_of(rows)
    begun = [
        [{"role": "user", "content": what}, {"role": "assistant", "content": "Done."}]
        for what in ("Write a poem.", "Write a letter.")
    ]
    last = {"role": "user", "content": "Make it shorter."}
    rows.write_text("".join(json.dumps({"prompt": [*talk, last]}) + "\n" for talk in begun))
    assert len(prompts_of(rows)) == 2, "they end alike, and are two conversations"
    file.write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        prompts_of(file)


def test_answers_are_drawn_ahead_and_drawn_again_alike(tmp_path: Path) -> None:
    who = speaker("builtin")
    prompts: list[Any] = [f"How do I cook {what}?" for what in ("soup", "rice", "an egg", "peas")]
    made = []
    for folder in ("one", "two"):
        store = Store(tmp_path / folder)
        plan = Plan(select="uncertain", max_length=12)
        ahead = Ahead(store, [who], prompts, plan, lambda store=store: 3 - len(store.items()))
        ahead.start()
        while len(store.items()) < 3:
            time.sleep(0.02)
        ahead.end()
        assert not ahead.failure
        made.append(store.items())
    assert made[0] == made[1]
    assert 3 <= len(made[0]) <= 4
    one = made[0][0]
    assert one.margin is not None
    assert one.margin == pytest.approx(who.margin(one.prompt, one.first, one.second))
    assert one.margin == pytest.approx(-who.margin(one.prompt, one.second, one.first), abs=1e-5)
    assert one.prompt[0]["role"] == "user"  # type: ignore[index]


def test_where_models_are_judged_an_answer_may_say_nothing(tmp_path: Path) -> None:
    """Otherwise a model that has fallen silent would be judged by the few prompts it answers."""

    @dataclass(frozen=True)
    class Says:
        name: str
        said: tuple[str, ...]

        def laid_out(self, prompt: Any) -> Any:
            return prompt

        def answers(self, prompts: Any, *_: Any) -> list[list[str]]:
            return [[self.said[int(prompt)]] for prompt in prompts]

    speakers: list[Any] = [Says("a", ("one", "same", "")), Says("b", ("", "same", "two"))]
    for keeps, count in ((True, 2), (False, 0)):
        store = Store(tmp_path / str(keeps))
        ahead = Ahead(store, speakers, ["0", "1", "2"], Plan(keeps_empty=keeps), lambda: 1)
        ahead.start()
        ahead.join(10)
        assert not ahead.failure
        assert len(store.items()) == count
        assert judged(store)["alike"] == 3 - count
        again = Ahead(store, speakers, ["0", "1", "2"], Plan(keeps_empty=keeps), lambda: 1)
        assert again.left == 0


def test_a_clients_own_model_answers_as_its_export_does(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    own = {"parts": {"head": "full", "bottleneck": 0, "reward": True, "adapter": True}}
    local = {"steps": 4, "batch_size": 4, "learning_rate": 0.05}
    content = {
        **settings,
        "partition": {"name": "natural", "column": "client"},
        "algorithm": {"name": "fedpdpo", "local": local, **own},
    }
    run(config.parse(Experiment, content, "the test"), tmp_path / "run")
    client = next(iter(FinishedRun.at(tmp_path / "run").client_folders))
    who = speaker(str(tmp_path / "run"), client)
    prompt = "Human: Which fish?\n\nAssistant:"
    ((said,),) = who.answers([prompt], 1, 8, 0, 0)
    folder = FinishedRun.at(tmp_path / "run").model_folder(client)
    wanted = generate(folder, prompt, chat=False, max_new_tokens=8, temperature=0)
    assert str(said).strip() == wanted
    ((before,),) = who.before().answers([prompt], 1, 8, 0, 0)
    assert before != said


# ---- win rates


def test_what_several_judge_counts_once_for_what_most_of_them_said(tmp_path: Path) -> None:
    store = Store(tmp_path / "review")
    store.add(items(5))
    votes = {
        1: ("second", "second", "first"),
        2: ("second", "first"),
        3: ("tie", "tie", "second"),
        4: ("bad", "bad"),
        5: ("first", "skip"),
    }
    for item, said in votes.items():
        for rater, outcome in zip("ABC", said, strict=False):
            store.choose(
                f"address-{item}-{rater}",
                item,
                rater,
                "",
                outcome,  # type: ignore[arg-type]
                is_left_first=True,
                seconds=1,
            )
    found = judged(store)
    assert (found["preferred"], found["judged"], found["ties"], found["bad"]) == (1, 2, 2, 1)
    assert found["raters"]["A"] == {"preferred": 2, "judged": 3, "ties": 1, "bad": 1}
    assert (found["low"], found["high"]) == share(1, 2)
    assert found["alpha"] is not None
    names = [write(tmp_path, "shared against base", folder, found) for folder in "aba"]
    assert names == ["shared against base", "shared against base (2)", "shared against base"]
    assert len(read_json(tmp_path / "reviews.json")) == 2
    assert sentence({**found, "preferred": 31, "judged": 40, "low": 0.615, "high": 0.892}) == (
        "preferred in 31 of 40, 62 to 89 %"
    )


# ---- the page: who may ask


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    pytest.importorskip("uvicorn")
    where = sitting(tmp_path / "choices")
    opened = Page(where)
    yield opened
    opened.end()
    where.store.close()


def asked(
    page: Page, path: str, content: Any = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    """Ask the page's port for something, and return status, headers and text."""
    data = None if content is None else json.dumps(content).encode()
    wanted = {"content-type": "application/json"} if data else {}
    wanted |= {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{page.port}{path}", data, wanted)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read().decode()


def test_only_who_has_the_whole_address_is_answered(page: Page) -> None:
    api = f"/{page.token}/api/next"
    assert asked(page, api, {"rater": "Ann"})[0] == 200
    assert asked(page, "/", None)[0] in (403, 404)
    assert asked(page, f"/{page.token[:-1]}x/api/next", {"rater": "Ann"})[0] == 403
    assert asked(page, f"/{page.token}/../../etc/passwd")[0] in (403, 404)
    assert asked(page, f"/{page.token}/page.html")[0] == 404
    for headers in (
        {"host": "evil.example"},
        {"host": f"127.0.0.1.evil.example:{page.port}"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site", "sec_fetch_dest": "document"},
    ):
        status, answered, text = asked(page, api, {"rater": "Ann"}, **headers)
        assert status == 403, headers
        assert "item" not in text
        assert "access-control-allow-origin" not in answered
    assert asked(page, api, {"rater": "Ann"}, content_type="text/plain")[0] == 415
    link = {"sec_fetch_site": "cross-site", "sec_fetch_dest": "document"}
    assert asked(page, f"/{page.token}/", None, **link)[0] == 200
    assert asked(page, f"/{page.token}/", None, sec_fetch_site="cross-site")[0] == 403
    assert asked(page, api, {"rater": "A" * 300_000})[0] == 413
    assert asked(page, api, ["Ann"])[0] == 400
    assert asked(page, api, {"rater": ""})[0] == 400


def test_nothing_of_the_page_is_from_elsewhere_or_kept(page: Page) -> None:
    status, headers, text = asked(page, f"/{page.token}/")
    assert status == 200
    assert "http" not in text
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"


def test_the_page_listens_on_loopback_alone(page: Page) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no other address")
        own = probe.getsockname()[0]
    with closing(socket.socket()) as other:
        other.settimeout(2)
        assert other.connect_ex((own, page.port)) != 0


# ---- the page: a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no Chromium here; install it to have the page used")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def begun(browser: Any, page: Page, rater: str, width: int = 1280, scheme: str = "light") -> Any:
    """Open the page in a window of its own and begin under a name."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab = context.new_page()
    tab.messages = []
    tab.on("console", lambda message: tab.messages.append(message.text))
    tab.on("pageerror", lambda error: tab.messages.append(str(error)))
    tab.goto(page.address)
    tab.get_by_label("Your name").fill(rater)
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#item:not([hidden])")
    return tab


def settled(tab: Any, done: int) -> None:
    tab.locator("#count", has_text=re.compile(f"^{done} of ")).wait_for(timeout=10_000)


def test_a_sitting_by_keyboard(browser: Any, page: Page) -> None:
    tab = begun(browser, page, "Ann")
    for number, key in enumerate(["1", "2", "3", "4", "s"], 1):
        tab.keyboard.press(key)
        settled(tab, number)
    tab.keyboard.press("u")
    settled(tab, 4)
    tab.keyboard.press("1")
    settled(tab, 5)
    tab.keyboard.press("2")
    settled(tab, 6)
    tab.get_by_text("That was all").wait_for()
    store = page.sitting.store
    outcomes = [event.outcome for event in store.standing()]
    assert outcomes[2:4] == ["tie", "bad"]
    assert {*outcomes[:2], *outcomes[4:]} == {"first", "second"}
    assert len(outcomes) == 6
    assert tab.messages == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_sitting_by_mouse(browser: Any, page: Page, width: int, scheme: str) -> None:
    tab = begun(browser, page, "Bob", width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for number, name in enumerate(["This one", "Equally good", "Both bad", "Skip"], 1):
        tab.get_by_role("button", name=name).first.click()
        settled(tab, number)
    tab.get_by_role("button", name="Undo").click()
    settled(tab, 3)
    tab.get_by_role("button", name="Edit").first.click()
    tab.get_by_label("Answer 1, edited").fill("Better <b>so</b>.")
    tab.get_by_role("button", name="Take the edited answer").click()
    settled(tab, 4)
    assert tab.messages == []


def test_two_raters_at_once_and_a_reload(browser: Any, page: Page) -> None:
    ann, bob = begun(browser, page, "Ann"), begun(browser, page, "Bob")
    ann.keyboard.press("1")
    settled(ann, 1)
    bob.keyboard.press("2")
    settled(bob, 1)
    ann.reload()
    ann.wait_for_selector("#item:not([hidden])")
    settled(ann, 1)
    assert ann.locator("#rater").inner_text() == "Ann"


@pytest.mark.parametrize("line", ["page: ", "Ctrl-C ends it."])
def test_a_page_that_ends_while_it_prints_leaves_a_console_that_prints(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ends(io.StringIO):
        """Where the command is ended by who reads its line."""

        def write(self, text: str) -> int:
            if line in text:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().write(text)

    file = Ends()
    monkeypatch.setattr(console, "_file", file)  # not the property, whose value would stay
    before = signal.getsignal(signal.SIGTERM)
    where = sitting(tmp_path / "choices")
    with closing(where.store):
        collecting._serve(where, 0, opens=False)
    assert signal.getsignal(signal.SIGTERM) is before
    console.print("what was chosen")
    written = file.getvalue()
    assert [written.count(said) for said in ("page: ", "Ctrl-C", "what was chosen")] == [1, 1, 1]


def test_markup_in_an_answer_is_text(browser: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "odd")
    attack = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    store.add([Item(prompt=attack, first=attack, second="b", origins={}, shared=True)])
    opened = Page(Sitting(store, ONE, seed=0))
    try:
        tab = begun(browser, opened, "Ann")
        assert attack in {tab.locator("#left").inner_text(), tab.locator("#right").inner_text()}
        assert tab.title() == "Choose between two answers"
        assert tab.locator("#item img").count() == 0
    finally:
        opened.end()
        store.close()


def test_a_page_on_another_port_can_neither_read_nor_choose(browser: Any, page: Page) -> None:
    """It knows the whole address, which it cannot, and is refused all the same."""
    script = """
    async () => {
      const tried = {};
      const say = async (name, what) => {
        try { const answer = await what(); tried[name] = answer.type === 'opaque' ? 'opaque' :
          String(answer.status); } catch (error) { tried[name] = 'failed'; }
      };
      const content = JSON.stringify({rater: 'Eve', address: 'an-address-of-eve', item: 1, name: '',
        shown: 'left', seconds: 1});
      await say('read', () => fetch(BASE));
      await say('json', () => fetch(BASE + 'api/choose', {method: 'POST', body: content,
        headers: {'content-type': 'application/json'}}));
      await say('plain', () => fetch(BASE + 'api/choose', {method: 'POST', body: content,
        mode: 'no-cors', headers: {'content-type': 'text/plain'}}));
      const frame = document.createElement('iframe');
      frame.src = BASE; document.body.append(frame);
      await new Promise((done) => setTimeout(done, 500));
      try { tried.frame = frame.contentDocument ? 'blank' : 'closed'; }
      catch (error) { tried.frame = 'closed'; }
      return tried;
    }
    """.replace("BASE", json.dumps(page.address))

    class Evil(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<body>evil</body>")

        def log_message(self, *_: Any) -> None:
            pass

    evil = HTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=evil.serve_forever, daemon=True).start()
    try:
        tab = browser.new_context().new_page()
        tab.goto(f"http://127.0.0.1:{evil.server_port}/")
        tried = tab.evaluate(script)
    finally:
        evil.shutdown()
        evil.server_close()
    assert tried["read"] == "failed"
    assert tried["json"] == "failed"
    assert tried["plain"] in ("opaque", "failed")
    status, _, text = asked(page, f"/{page.token}/api/next", {"rater": "Eve"})
    assert status == 200
    assert json.loads(text)["done"] == 0, "nothing was chosen"


# ---- killed at any moment


@pytest.mark.long
def test_what_was_answered_is_there_after_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(
            json.dumps({"prompt": f"{k}?", "completions": ["a", "b"]}) + "\n" for k in range(40)
        )
    )
    command = [sys.executable, "-m", "fedpref", "collect", "--candidates", str(answers)]
    command += ["--output", str(tmp_path / "choices")]
    acknowledged = 0
    for turn in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("page: "))
        address = line.split()[1]
        killer = threading.Timer(0.1, process.kill)
        try:
            while True:
                state = posted(address + "api/next", {"rater": "Ann"})
                assert state["done"] in (acknowledged, acknowledged + 1), "nothing lost"
                acknowledged = state["done"]
                if "item" not in state:
                    break
                choice = {
                    "address": f"choice-{turn}-{acknowledged}",
                    "rater": "Ann",
                    "item": state["item"]["number"],
                    "name": "",
                    "shown": "left",
                    "seconds": 1,
                }
                acknowledged = posted(address + "api/choose", choice)["done"]
                if not killer.ident:  # after a first choice, however slow the machine is
                    killer.start()
        except (OSError, ValueError):
            pass  # killed
        process.kill()
        process.wait()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("page: "))
    process.send_signal(signal.SIGTERM)  # one that runs in the background ignores the other
    rest, _ = process.communicate(timeout=60)
    assert "preferences: " in rest
    written = (tmp_path / "choices" / "preferences.jsonl").read_text().splitlines()
    prompts = [json.loads(row)["prompt"] for row in written]
    assert len(prompts) == len(set(prompts)), "nothing doubled"
    assert acknowledged <= len(prompts) <= acknowledged + 1
    assert acknowledged > 0
    database = sqlite3.connect(tmp_path / "choices" / "choices.sqlite")
    with closing(database):
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    assert (tmp_path / "choices").stat().st_mode & 0o077 == 0, "nobody else reads it"


def posted(address: str, content: Any) -> Any:
    request = urllib.request.Request(
        address, json.dumps(content).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


# ---- a review, from the command line


@pytest.mark.long
def test_people_judge_a_run_blind_and_its_page_says_what_they_said(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("uvicorn")
    content = {**settings, "partition": {"name": "natural", "column": "client"}}
    run(config.parse(Experiment, content, "the test"), tmp_path / "run")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Which fish, number {k}?\n" for k in range(4)))
    command = [sys.executable, "-m", "fedpref", "review", str(tmp_path / "run")]
    command += ["--prompts", str(prompts), "--items", "3", "--max-new-tokens", "6"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("page: "))
    address = line.split()[1]
    judged_by = {"Ann": 0, "Bob": 0}
    for rater in judged_by:
        while (state := posted(address + "api/next", {"rater": rater})).get("item") or state.get(
            "waiting"
        ):
            if "item" not in state:
                time.sleep(0.1)
                continue
            assert set(state["item"]) == {"number", "prompt", "left", "right", "question", "name"}
            choice = {
                "address": f"choice-{rater}-{judged_by[rater]}",
                "rater": rater,
                "item": state["item"]["number"],
                "name": "",
                "shown": "left",
                "seconds": 1,
            }
            posted(address + "api/choose", choice)
            judged_by[rater] += 1
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert judged_by["Ann"] == judged_by["Bob"] > 0
    (found,) = json.loads((tmp_path / "run" / "reviews.json").read_text()).values()
    assert found["judged"] + found["ties"] == judged_by["Ann"]
    assert found["raters"]["Ann"]["judged"] == judged_by["Ann"]
    assert "preferred in" in rest or "nothing was preferred" in rest
    assert "What people judged blind" in (tmp_path / "run" / "report.html").read_text()
