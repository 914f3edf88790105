"""What leaves a client: the rule on labels, hostile messages, and what an attacker gets."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import attacks
from fedpref import Experiment, config
from fedpref.engines.host import SETTLED
from fedpref.engines.messages import RefusedError, unpack, version
from fedpref.engines.requests import FORMS, beneath, parsed
from fedpref.engines.site import Site
from fedpref.engines.values import OVERHEAD, Kept, Values
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation.leaving import Audience, Label, labels
from fedpref.federation.verbs import ANYTHING, Client, WithheldError, Work
from fedpref.numerics.trees import Tree

NOBODY, NEIGHBOURS, COORDINATOR = Audience
OWN = Label(NOBODY, "own")


def made(name: str, **declared: Any) -> Work[Any, Any]:
    def function(client: Client, shared: Tree, own: Tree, *parts: Tree) -> Tree:
        return shared

    usual: dict[str, Any] = {"sends": (0,), "tells": (), "keeps": {}, "reads": {}}
    return Work(name, function, **{**usual, **declared})


TREE = {"x": torch.ones(1)}


@pytest.mark.parametrize(
    ("declared", "arguments", "audience", "kind"),
    [
        ({}, {}, COORDINATOR, ""),
        ({"sends": ()}, {}, NOBODY, ""),
        ({"sends": (), "keeps": {0: "own"}}, {}, NOBODY, "own"),
        ({"sends": (), "tells": (0,), "keeps": {0: "theta"}}, {}, NEIGHBOURS, "theta"),
        ({}, {1: OWN}, NOBODY, ""),  # not declared
        ({"reads": {"own": "own"}}, {1: OWN}, COORDINATOR, ""),
        ({"reads": {"own": "own"}}, {0: OWN}, NOBODY, ""),  # in another place
        ({"reads": {"own": "moments"}}, {1: OWN}, NOBODY, ""),  # of another kind
        ({"reads": {"own": "own"}}, {1: Label(NOBODY)}, NOBODY, ""),  # of no kind
        ({}, {1: Label(NOBODY)}, NOBODY, ""),
        ({"keeps": {0: "own"}}, {1: Label(NOBODY)}, NOBODY, ""),  # which loses its kind
        ({}, {1: Label(NEIGHBOURS, "theta")}, NEIGHBOURS, ""),
        ({"reads": {"own": "own"}}, {1: OWN, 0: Label(NEIGHBOURS, "theta")}, NEIGHBOURS, ""),
        ({"reads": {"parts": ANYTHING}}, {2: OWN, 5: Label(NOBODY)}, COORDINATOR, ""),
        ({"reads": {"parts": ANYTHING}}, {1: OWN}, NOBODY, ""),
        ({}, {1: Label(COORDINATOR, "x")}, COORDINATOR, ""),
    ],
)
def test_a_result_is_for_no_more_than_its_arguments_but_where_they_are_read(
    declared: dict[str, Any], arguments: dict[int, Label], audience: Audience, kind: str
) -> None:
    (found,) = labels(made("t", **declared), arguments, [TREE])
    assert (found.audience, found.kind) == (audience, kind)
    # however it is copied, and copied again
    for _ in range(3):
        (copied,) = labels(made("copy"), {0: found}, [TREE])
        assert copied.audience == found.audience
        found = copied


def test_metrics_are_for_the_coordinator_unless_a_private_value_is_in_them() -> None:
    metrics = {"loss": 1.0}
    trained = made("t", keeps={1: "moments"}, reads={"own": "own"})
    said = labels(trained, {1: OWN}, [TREE, TREE, metrics, {}])
    assert [one.audience for one in said] == [COORDINATOR, NOBODY, COORDINATOR, NOBODY]
    assert labels(made("t"), {1: OWN}, [TREE, metrics])[1].audience == NOBODY
    with pytest.raises(WithheldError, match="'t' does not declare that it reads a private 'own'"):
        labels(made("t"), {1: OWN}, [TREE])[0].refuse(COORDINATOR, 3)


@given(st.lists(st.sampled_from([OWN, Label(), Label(NEIGHBOURS, "theta"), Label(NOBODY)])))
def test_what_is_mixed_is_for_neighbours_at_most(some: list[Label]) -> None:
    for label in some:
        assert label.mixed.audience <= NEIGHBOURS
        assert label.mixed.audience <= label.audience
        assert label.mixed.kind == label.kind


def test_a_name_that_is_taken_is_not_written_to_and_values_have_a_bound() -> None:
    values = Values([0, 1], room=2 * OVERHEAD + 100)
    values.put(0, "3.0", Kept(TREE))
    for clients in ([0], [1, 0]):
        with pytest.raises(RefusedError, match="has values called '3' already"):
            values.refuse_taken(clients, "3")
    values.refuse_taken([1], "3")
    with pytest.raises(RefusedError, match="none of those here"):
        values.refuse_taken([2], "4")
    with pytest.raises(RefusedError, match="MB that this site lends"):
        values.put(1, "4.0", Kept({"x": torch.zeros(25)}))
    values.drop(0, "3.0")
    values.put(1, "4.0", Kept({"x": torch.zeros(25)}))


# ---- messages


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    attacks.make_model(folder / "model")
    attacks.make_rows(folder / "rows.jsonl", [40, 32, 28, 24])
    return folder


@pytest.fixture(scope="module")
def site(world: Path) -> Iterator[Site]:
    logging.disable(logging.CRITICAL)
    with attacks.small_site(world, {"name": "ditto", "local": attacks.LOCAL}) as made:
        yield made
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def messages(world: Path, site: Site) -> list[dict[str, Any]]:
    spec = attacks.settings(world, algorithm={"name": "ditto", "local": attacks.LOCAL})
    good = attacks.valid_messages(spec)
    assert {message["verb"] for message in good} == set(FORMS)
    for message in good[:4]:
        more = attacks.numbers(site) if message["verb"] == "number" else {}
        assert "refused" not in attacks.said(site, {**message, **more})[0]
    return [message for message in good if not attacks.opens(message)]


def take_hostile(site: Site, messages: list[dict[str, Any]], draw: random.Random) -> None:
    header, _ = unpack(site.answer(attacks.hostile(messages, draw)))
    assert header["format"] == version()["format"]
    assert set(site._folder.parent.iterdir()) == {site._folder, site._folder.parent / "site.yaml"}


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_hostile_messages_get_an_answer_and_nothing_else(
    site: Site, messages: list[dict[str, Any]], draw: random.Random
) -> None:
    take_hostile(site, messages, draw)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(st.randoms(use_true_random=False))
def test_twenty_thousand_hostile_messages(
    site: Site, messages: list[dict[str, Any]], draw: random.Random
) -> None:
    take_hostile(site, messages, draw)


NAMES = ("", ".", "..", "../up", "/abs", "a/../b", "a\x00b", ".hidden", "x" * 300, "é" * 101)


@pytest.mark.parametrize("name", NAMES)
def test_no_path_leads_out_of_a_sites_folder(name: str, site: Site, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "years of work").write_text("")
    for field in ("checkpoint", "fields", "run", "own"):
        header: Mapping[str, Any] = {
            "checkpoint": {"verb": "save", "own": {}, "checkpoint": name or str(victim)},
            "fields": {"verb": "load", "checkpoint": "round-000001", "fields": [name], "name": "9"},
            "run": {**attacks.valid_messages({})[0], "run": name},
            "own": {"verb": "save", "own": {name: {}}, "checkpoint": "round-000001"},
        }[field]
        assert "refused" in attacks.said(site, header)[0], field
    assert (victim / "years of work").exists()
    with pytest.raises(RefusedError, match="leads out"):
        beneath(tmp_path / "site", "..", "other")


def test_checkpoints_are_few_and_a_refusal_changes_nothing(world: Path) -> None:
    how = {"name": "ditto", "local": attacks.LOCAL}
    with attacks.small_site(world, how) as made:
        good = attacks.valid_messages(attacks.settings(world, algorithm=how, rounds=60))
        for message in good[:4]:
            more = attacks.numbers(made) if message["verb"] == "number" else {}
            assert "refused" not in attacks.said(made, {**message, **more})[0]
        save = {"verb": "save", "own": {}}
        for number in (*range(50, 0, -1), *range(1, 9)):
            header = {**save, "checkpoint": f"round-{number:06d}"}
            assert "refused" not in attacks.said(made, header)[0]
        kept = sorted(made._run.glob("checkpoints/round-*"))
        assert [folder.name for folder in kept] == ["round-000007", "round-000008"]
        (made._run / SETTLED).write_text("{}")
        begin = next(message for message in good if message["verb"] == "open")
        wrong = {**begin["experiment"], "rounds": -1}
        header = {**begin, "experiment": wrong, "resumes": False, "is_known": True}
        assert "refused" in attacks.said(made, header)[0]
        assert (made._run / SETTLED).read_text() == "{}"


def test_requests_are_strict() -> None:
    for verb, header, where in (
        ("names", {"more": 1}, "more"),
        ("report", {"own": {"0": 3}}, "own"),
        ("report", {"own": {"-1": "1.0"}}, "own"),
        ("report", {"own": {"1_0": "1.0"}}, "own"),
        ("load", {"checkpoint": "round-1", "fields": [], "name": "1"}, "checkpoint"),
        ("contribute", {"own": {}, "shares": {"0": float("nan")}}, "shares"),
        ("contribute", {"own": {}, "shares": {"0": 2.0}}, "shares"),
    ):
        with pytest.raises(RefusedError, match=f"{verb!r} is malformed: {where}"):
            parsed(verb, header)
    assert parsed("report", {"own": {"12": "1.moments"}}) == {"own": {12: "1.moments"}}


# ---- private trees

SOME = ("fedsa-lora", "choco", "fedpdpo")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.slow)
        for name in attacks.ALGORITHMS
    ],
)
@pytest.mark.long
def test_no_private_tree_comes_by_works_in_any_order(name: str, world: Path) -> None:
    tried, private, taken, _ = attacks.steal(world, name, 2, 3, seed=1)
    assert tried > 10
    assert private
    assert taken == set()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.slow)
        for name in attacks.ALGORITHMS
    ],
)
@pytest.mark.long
def test_a_site_takes_part_in_all_that_an_algorithm_asks(
    name: str, world: Path, tmp_path: Path
) -> None:
    more = {
        key: value for key, value in attacks.ALGORITHMS[name].items() if key != "keep_optimizer"
    }
    content = {"name": name, "local": {"steps": 2, "batch_size": 4}, **more}
    gossips = name in ("choco",)
    spec = config.parse(
        Experiment,
        attacks.settings(
            world,
            algorithm=content,
            rounds=2,
            evaluate_every=1,
            evaluate_pairs=8,
            federation={} if gossips else {"newcomers": 1, "join_steps": 2},
        ),
        name,
    )
    with attacks.small_site(world, content) as taking_part:
        folder = RunDirectory(tmp_path / "run")
        for _ in events(spec, folder, transport=attacks.Direct({"site": taking_part})):
            pass
    assert folder.done
    assert [row["late"] for row in folder.read_rows("metrics.jsonl")] == [0, 0]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("fedsa-lora", {"learning_rate": 1.0}),
        ("feddpo", {"weight_decay": 1e3}),
        ("ditto", {"batch_size": 8}),
    ],
)
@pytest.mark.long
def test_settings_are_those_that_the_site_has_consented_to(
    name: str, changed: dict[str, Any], world: Path
) -> None:
    with attacks.target(world, name, {}) as goal:
        algorithm: Any = goal.spec.algorithm
        local = replace(algorithm.local, **changed)
        own = [{"own": {"0": value}} for value in goal.private.values()]
        method = local if name == "fedsa-lora" else replace(algorithm, local=local)
        header = {
            "verb": "each",
            "work": f"{name}.train",
            "args": [{"tree": 0}, *own, {"plain": config.dump(method)}],
            "clients": [0],
            "purpose": "train",
            "round": 5,
            "call": 1,
            "name": "9999",
        }
        refused = attacks.said(goal.site, header)[0]["refused"]
        assert "none of the experiment's settings" in refused


def test_what_work_reads_does_not_come_with_a_message(world: Path) -> None:
    with attacks.target(world, "feddpo", {}) as goal:
        header = {
            "verb": "each",
            "work": "feddpo.train",
            "args": [{"tree": 0}, {"tree": 1}, {"plain": config.dump(goal.spec.algorithm)}],
            "clients": [0],
            "purpose": "train",
            "round": 5,
            "call": 1,
            "name": "9999",
        }
        place = {"1/epochs:4:None:length": torch.tensor([123, 0, 0])}
        answer = attacks.said(goal.site, header, place)[0]
        assert "not of the kind that is read there" in answer["refused"]


def test_a_run_is_not_taken_up_under_other_settings(world: Path) -> None:
    local = {"steps": 2, "batch_size": 4}
    with attacks.small_site(world, {"name": "feddpo", "local": local}) as opened:
        message = attacks.valid_messages({})[0]
        for steps, resumes, is_refused in ((2, False, False), (3, True, True), (2, True, False)):
            spec = attacks.settings(
                world, algorithm={"name": "feddpo", "local": {**local, "steps": steps}}
            )
            answer = attacks.said(opened, {**message, "experiment": spec, "resumes": resumes})[0]
            assert ("begun with another experiment" in str(answer.get("refused"))) == is_refused


@pytest.mark.long
def test_without_labels_the_same_attack_takes_them(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedpref.engines.site.labels", lambda work, arguments, results: [Label()] * len(results)
    )
    monkeypatch.setattr("fedpref.engines.site.fits", lambda work, place, label: True)
    wanted = ["own", "moments"]
    _, private, taken, never = attacks.steal(world, "fedsa-lora", 40, 0, seed=1, wanted=wanted)
    assert not never
    assert taken, "by works alone"
    assert taken <= private == {"own", "moments"}


def test_every_algorithm_with_its_own_works_is_attacked() -> None:
    from fedpref.algorithms import AnyAlgorithm
    from fedpref.config import kinds

    named = {kind.name for kind in kinds(AnyAlgorithm)}  # type: ignore[attr-defined]
    # fedopt has feddpo's works, pluralllm feddpo's program, pooled no sites
    assert named - attacks.ALGORITHMS.keys() == {"fedopt", "pluralllm", "pooled"}
