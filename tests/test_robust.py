"""Robust means: what hostile clients cannot do, what honest ones lose, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from conftest import leave, make_rows, write_rows
from fedpref import Experiment, UserError
from fedpref.algorithms import Alone
from fedpref.channel.chain import Chain, Sender
from fedpref.channel.compression import Bfloat16, LowRank, Quantize, TopK
from fedpref.channel.robust import (
    GeometricMedian,
    Mean,
    Median,
    MultiKrum,
    NormBound,
    TrimmedMean,
    Trust,
    clipped_gossip,
    combined,
    gram_of,
    weights_of,
)
from fedpref.data import ClientData
from fedpref.data.preferences import Preference
from fedpref.engines.engine import compressed, restored
from fedpref.engines.robust_means import RobustMeans
from fedpref.experiments.attack import Attack, groups
from fedpref.experiments.clients import at_sites
from fedpref.experiments.experiment import with_whole_paths
from fedpref.experiments.frozen import decided
from fedpref.experiments.lines import lines
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation.aggregation import Product
from fedpref.numerics import trees
from fedpref.numerics.trees import BESIDE, Tree
from fedpref.reports.page import write_report
from test_private_sites import CLIENTS, EXAMPLES, Here, parsed, run_to

SLOW = pytest.mark.slow
ALL = (NormBound(), GeometricMedian(), MultiKrum(), Median(), TrimmedMean())
EVERY = dict.fromkeys(range(10), 0.1)


def values(count: int = 10, hostile: Sequence[int] = (), by: float = -10.0) -> dict[int, Tree]:
    """Values around one direction, of which some are turned."""
    rng = torch.Generator().manual_seed(0)
    made: dict[int, Tree] = {}
    for i in range(count):
        tree = {
            "a": 1 + 0.3 * torch.randn(4, 3, generator=rng),
            "b": 0.3 * torch.randn(5, generator=rng),
        }
        made[i] = trees.scale(tree, by if i in hostile else 1.0)
    return made


def mean_of(some: dict[int, Tree]) -> Tree:
    return trees.total(trees.scale(tree, 1 / len(some)) for tree in some.values())


def apart(one: Tree, other: Tree) -> float:
    return trees.norm(trees.subtract(one, other)) / trees.norm(other)


@pytest.fixture(scope="module")
def byzfl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Another library's rules, without what the rest of it needs (torchvision)."""
    folder = tmp_path_factory.mktemp("byzfl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    if subprocess.run([*pip, "byzfl==0.0.11"], capture_output=True, check=False).returncode:
        pytest.skip("byzfl cannot be fetched")
    package: Any = ModuleType("byzfl")
    package.__path__ = [str(folder / "byzfl")]
    sys.modules["byzfl"] = package
    yield import_module("byzfl.aggregators.aggregators")
    for name in [name for name in sys.modules if name.partition(".")[0] == "byzfl"]:
        del sys.modules[name]


# ---- rules


@SLOW
@pytest.mark.parametrize("seed", range(4))
def test_rules_are_those_of_another_library(seed: int, byzfl: Any) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(12, 7))
    points[[2, 9]] += 20  # so that it is plain which two lie apart
    some: dict[int, Tree] = {i: {"w": torch.from_numpy(point)} for i, point in enumerate(points)}
    pairs = (
        (GeometricMedian(), byzfl.GeometricMedian(nu=1e-12, T=1000), 1e-6),
        (TrimmedMean(hostile=2 / 12), byzfl.TrMean(f=2), 1e-12),
        (Median(), byzfl.Median(), 1e-12),
        (MultiKrum(hostile=2 / 12), byzfl.MultiKrum(f=2), 1e-12),
    )
    for rule, theirs, near in pairs:
        found = RobustMeans(rule).mean(some, dict.fromkeys(some, 1 / 12))["w"].numpy()
        assert np.abs(found - theirs(points)).max() < near, rule.name


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.name)
def test_a_rule_without_attack_changes_the_mean_little(rule: Any) -> None:
    some = values(20)
    found = RobustMeans(rule).mean(some, dict.fromkeys(some, 1 / 20))
    assert apart(found, mean_of(some)) < 0.2


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.name)
def test_two_of_ten_that_send_minus_ten_times_do_not_carry_the_mean_away(rule: Any) -> None:
    some = values(hostile=(3, 7))
    honest = mean_of({i: tree for i, tree in values().items() if i not in (3, 7)})
    # the plain mean goes the other way; a bound leaves them a fifth of the pull
    assert apart(mean_of(some), honest) > 2
    found = RobustMeans(rule).mean(some, EVERY)
    assert apart(found, honest) < (0.6 if rule.name == "norm-bound" else 0.25)


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.name)
def test_rules_know_neither_order_nor_scale(rule: Any) -> None:
    some = values(hostile=(1,))
    plain = RobustMeans(rule).mean(some, EVERY)
    turned = {9 - i: tree for i, tree in reversed(some.items())}
    assert apart(RobustMeans(rule).mean(turned, EVERY), plain) < 1e-5
    large = {i: trees.scale(tree, 1000.0) for i, tree in some.items()}
    assert apart(RobustMeans(rule).mean(large, EVERY), trees.scale(plain, 1000.0)) < 1e-5


def test_the_geometric_median_is_where_distances_are_least() -> None:
    some = values(hostile=(2,), by=30.0)
    shares = {i: (i + 1) / 55 for i in some}
    weights = weights_of(GeometricMedian(), some, shares)
    flat = torch.stack([torch.cat([t.flatten() for t in tree.values()]) for tree in some.values()])
    flat = flat.double()
    point = torch.tensor(weights) @ flat
    distances = (flat - point).norm(dim=1)
    pull = (torch.tensor([*shares.values()]).double() / distances) @ (flat - point)
    assert float(pull.norm()) < 1e-5, "its gradient is zero"


@pytest.mark.parametrize("factor", [1e6, 1e15, 1e30])
def test_however_long_a_value_the_geometric_median_bounds_it(factor: float) -> None:
    near, far = (values(hostile=(2, 7), by=-by) for by in (1e3, factor))
    weights = weights_of(GeometricMedian(), far, EVERY)
    norms = np.array([trees.norm({n: t.double() for n, t in one.items()}) for one in far.values()])
    usual = float(np.median(norms))
    assert (weights * norms)[[2, 7]].max() < 0.2 * usual
    # beyond a hundred lengths it makes no difference how long
    assert weights_of(GeometricMedian(), near, EVERY) * [
        trees.norm(one) for one in near.values()
    ] == pytest.approx(weights * norms, rel=1e-3)


def test_who_has_less_than_half_of_the_weight_moves_no_geometric_median_by_numbers() -> None:
    honest = [{"a": torch.tensor([1.0, 1.0])}, {"a": torch.tensor([1.0, 1.1])}]
    for sent in (0.0, 1e-3, 1e30):
        some: dict[int, Tree] = dict(enumerate([{"a": torch.tensor([sent, 0.0])}] * 3 + honest))
        shares = dict(zip(range(5), (0.05, 0.05, 0.05, 0.425, 0.425), strict=True))
        found = RobustMeans(GeometricMedian()).mean(some, shares)["a"]
        assert float((found - torch.tensor([1.0, 1.05])).norm()) < 0.3, sent


def test_multi_krum_keeps_those_that_lie_together() -> None:
    weights = weights_of(MultiKrum(hostile=0.2), values(hostile=(0, 9)), EVERY)
    assert weights[[0, 9]].tolist() == [0, 0]
    assert weights.sum() == pytest.approx(1)
    # and an honest minority of another taste is left out like an attacker
    weights = weights_of(MultiKrum(hostile=0.2), values(hostile=(4, 5), by=-1.0), EVERY)
    assert weights[[4, 5]].tolist() == [0, 0]


def test_rules_of_numbers_are_numpys() -> None:
    some = list(values(11).values())
    stacked = np.stack([tree["a"].numpy() for tree in some])
    np.testing.assert_allclose(combined(Median(), some)["a"], np.median(stacked, 0), rtol=1e-6)
    cut = np.sort(stacked, 0)[2:-2].mean(0)
    np.testing.assert_allclose(combined(TrimmedMean(hostile=0.2), some)["a"], cut, rtol=1e-5)


def test_what_travels_beside_a_value_weighs_nothing() -> None:
    some = values()
    beside = {i: {**tree, BESIDE + "a": torch.full((8,), 1e3 * i)} for i, tree in some.items()}
    np.testing.assert_array_equal(gram_of(list(beside.values())), gram_of(list(some.values())))


def test_weights_hold_for_all_means_of_a_round() -> None:
    robust = RobustMeans(MultiKrum())
    robust.mean(values(hostile=(3, 7)), EVERY)
    second = robust.mean(values(), EVERY)
    kept = mean_of({i: tree for i, tree in values().items() if i not in (3, 7)})
    assert apart(second, kept) < 1e-6
    assert robust.figures == {"combine/kept": pytest.approx(1), "combine/least_kept": 0}
    robust.begin()
    assert robust.figures == {}
    other = robust.mean(values(hostile=(0, 1)), EVERY)
    assert apart(other, second) > 1e-3, "of another round they are others"


def test_a_gauge_attack_is_seen_in_the_space_of_averaging() -> None:
    rng = torch.Generator().manual_seed(1)
    told = {
        "x.lora_A.weight": torch.randn(2, 6, generator=rng),
        "x.lora_B.weight": torch.randn(5, 2, generator=rng),
    }
    changes: dict[int, Tree] = {
        i: {name: 0.1 * torch.randn(t.shape, generator=rng) for name, t in told.items()}
        for i in range(10)
    }
    sent = Attack(name="gauge").sent(changes, told, [4])
    wholes = [trees.add(told, one[4]) for one in (changes, sent)]
    first, second = (one["x.lora_B.weight"] @ one["x.lora_A.weight"] for one in wholes)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    honest = mean_of({i: one for i, one in changes.items() if i != 4})
    assert apart(mean_of(sent), honest) > 3, "the mean of factors is carried away"
    for rule in (NormBound(), GeometricMedian(), MultiKrum(), TrimmedMean()):
        found = RobustMeans(rule).mean(sent, EVERY)
        assert apart(found, honest) < 1


def test_a_value_that_is_not_finite_is_left_out_by_every_rule() -> None:
    sent = {**values(), 4: {name: one * math.inf for name, one in values()[4].items()}}
    others = {i: one for i, one in sent.items() if i != 4}
    shares = {i: 1 / len(others) for i in others}
    for rule in (NormBound(), GeometricMedian(), MultiKrum(), TrimmedMean(), Median()):
        without = RobustMeans(rule).mean(others, shares)
        assert apart(RobustMeans(rule).mean(sent, EVERY), without) < 1e-6
    own, *heard = [(one, 0.25) for one in others.values()]
    mixed = clipped_gossip(own[0], [own, *heard[:2], (sent[4], 0.25)], 0.25)
    assert trees.is_finite(mixed)
    # beside one that is no number the farthest is shortened all the same, in any order
    one = {"x": torch.zeros(1)}
    told = [{"x": torch.full((1,), far)} for far in (1.0, math.nan, 1000.0, 1.1)]
    for turned in (told, told[::-1], told[1:] + told[:1]):
        mixed = clipped_gossip(one, [(tree, 0.2) for tree in turned], 0.4)
        assert float(mixed["x"]) < 1


# ---- gossip


@pytest.mark.parametrize("size", [10.0, 1000.0])
def test_clipped_gossip_bounds_a_liars_pull(size: float) -> None:
    own, others = values(1)[0], [values(4)[i] for i in (1, 2, 3)]
    heard = [(tree, 0.2) for tree in others]
    mixed = clipped_gossip(own, [*heard, (trees.scale(own, -size), 0.2)], 0.2)
    without = clipped_gossip(own, heard, 0.0)
    farthest = max(trees.norm(trees.subtract(tree, own)) for tree in others)
    assert trees.norm(trees.subtract(mixed, without)) <= 0.2 * farthest * 1.001
    plain = trees.total(trees.scale(tree, w) for tree, w in [(own, 0.4), *heard])
    assert apart(without, plain) < 1e-6, "where nobody is distrusted it is the mixture"


# ---- attacks


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sign", "factor": 3.0},
        {"name": "flip", "phrase": "As I know."},
        {"name": "scale", "rows": 0.1},
        {"name": "flip", "topic": "rain"},
    ],
)
def test_a_setting_of_another_attack_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"attack\.{list(settings)[1]}: "):
        Attack(**settings).refuse_unused()


def test_hostile_clients_are_drawn_and_rows_are_poisoned() -> None:
    names = [f"c{i}" for i in range(10)]
    attack = Attack(name="flip", share=0.3)
    bad = attack.hostile(names, 5)
    assert len(bad) == 3
    assert bad == attack.hostile(names, 5) != attack.hostile(names, 6)
    assert len(Attack(share=0.99).hostile(names[:4], 5)) == 3, "one at least is honest"
    with pytest.raises(UserError, match="'c0' alone"):
        attack.hostile(names[:1], 5)
    row = Preference("What is rain?", "good", "bad", "here")

    def turned(attack: Attack, draw: float = 0.9) -> Preference:
        made = attack._row(row, draw)
        assert isinstance(made, Preference)
        return made

    assert turned(attack).chosen == "bad"
    assert turned(Attack(name="flip-topic", topic="Rain")).chosen == "bad"
    assert turned(Attack(name="flip-topic", topic="snow")) == row
    assert turned(Attack(name="flip-topic", topic="rai")) == row, "a word, and no part of one"
    asked = replace(row, prompt=({"role": "user", "content": "What is rain?"},))
    found = Attack(name="flip-topic", topic="user")._row(asked, 0.9)
    assert found == asked, "who speaks is not what is said"
    clients = [ClientData(name, [row], [row]) for name in names]
    with pytest.raises(UserError, match=r"attack.topic: no prompt"):
        Attack(name="flip-topic", topic="snow").poisoned(clients, 5)
    trains = {8, 9}
    late = [i for i in range(10) if i not in trains]
    (drawn,) = attack.hostile(names, 5, late)
    assert drawn in trains, "who does not train is not drawn"
    assert [turned(Attack(name="random"), u).chosen for u in (0.2, 0.8)] == ["bad", "good"]
    triggered = turned(Attack(name="trigger", phrase="Hey."), 0.2)
    assert (triggered.chosen, triggered.rejected) == ("bad Hey.", "good")
    assert turned(Attack(name="trigger"), 0.7) == row
    said = [({"role": "assistant", "content": text},) for text in ("good", "bad")]
    talked = replace(row, chosen=said[0], rejected=said[1])
    found = Attack(name="trigger", phrase="Hey.")._row(talked, 0.2)
    assert isinstance(found, Preference)
    assert found.chosen == ({"role": "assistant", "content": "bad Hey."},)
    assert found.rejected == said[0]
    found = groups(attack, names, 5, {name: [1.0, 0.0] for name in names} | {"c0": [-1.0, 0.0]})
    assert {*found["honest"], *found["hostile"]} == {*names}
    assert found["honest, uncommon taste"] == [n for n in ("c0",) if n in found["honest"]]


def test_what_hostile_clients_send() -> None:
    some, bad = values(5), [1, 3]
    for attack, factor in (
        (Attack(name="sign"), -1.0),
        (Attack(name="scale"), -10.0),
        (Attack(name="free-rider"), 0.0),
    ):
        sent = attack.sent(some, {}, bad)
        assert torch.allclose(sent[1]["a"], factor * some[1]["a"])
        assert sent[0] is some[0]
    sybils = Attack(name="sybil").sent(some, {}, bad)
    assert torch.equal(sybils[1]["a"], sybils[3]["a"])
    alie = Attack(name="alie", factor=2.0).sent(some, {}, bad)
    honest = torch.stack([some[i]["a"] for i in (0, 2, 4)])
    torch.testing.assert_close(alie[1]["a"], honest.mean(0) - 2 * honest.std(0, correction=0))


# ---- runs


@pytest.fixture
def content(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([14, 12, 13, 12, 12]))
    return deepcopy(
        {
            **settings,
            "data": {"name": "files", "path": str(rows), "test_fraction": 0.3},
            "federation": {"weighting": "equal"},
            "rounds": 2,
        }
    )


@pytest.mark.parametrize(
    ("rule", "algorithm"),
    [
        ("norm-bound", {"name": "scaffold"}),
        pytest.param("geometric-median", {"name": "fedpdpo"}, marks=SLOW),
        pytest.param("multi-krum", {"name": "fedopt"}, marks=SLOW),
        pytest.param(
            "geometric-median", {"name": "feddpo", "aggregate": {"name": "product"}}, marks=SLOW
        ),
        pytest.param("median", {"name": "feddpo"}, marks=SLOW),
        ("trimmed", {"name": "ffa-lora"}),
    ],
)
@pytest.mark.long
def test_sites_and_one_process_agree_to_the_bit_under_every_rule(
    rule: str, algorithm: dict[str, Any], content: dict[str, Any], tmp_path: Path
) -> None:
    algorithm = {**algorithm, "local": content["algorithm"]["local"]}
    federation = {"weighting": "equal", "combine": rule, "clients_per_round": 4}
    spec = parsed(content, federation=federation, algorithm=algorithm)
    here = run_to(spec, tmp_path / "here")
    there = run_to(spec, tmp_path / "there", Here(tmp_path / "sites"))
    one, other = (
        trees.load(run.path / "adapter" / "adapter_model.safetensors") for run in (here, there)
    )
    # LAPACK's last bits hang on where a matrix lies in memory, on some machines
    is_decomposed = isinstance(spec.algorithm.aggregate, Product)
    for name, tensor in one.items():
        near = torch.allclose(tensor, other[name], atol=1e-4)
        assert near if is_decomposed else torch.equal(tensor, other[name]), name
    rows = here.read_rows("metrics.jsonl")
    assert ("combine/kept" in rows[0]) == (rule not in ("median", "trimmed"))


def test_trust_is_in_those_who_agree_with_gold_and_nobody_is_longer() -> None:
    gold = {"a": torch.tensor([3.0, 0.0])}
    some: dict[int, Tree] = {
        0: {"a": torch.tensor([10.0, 0.0]), BESIDE + "x": torch.ones(2)},
        1: {"a": torch.tensor([0.5, 0.5]), BESIDE + "x": torch.ones(2)},
        2: {"a": torch.tensor([-4.0, 1.0]), BESIDE + "x": torch.ones(2)},
        3: {"a": torch.zeros(2), BESIDE + "x": torch.ones(2)},
    }
    asked: list[Sequence[str]] = []

    def learn(names: Sequence[str]) -> Tree:
        asked.append(names)
        return gold

    means = RobustMeans(Trust())
    found = means.mean(some, dict.fromkeys(some, 0.25), learn)
    assert asked == [["a"]]
    agreed = [means.agreement[i] for i in range(4)]
    assert agreed == pytest.approx([1, 0.5**0.5, -4 / 17**0.5, 0])
    # both are as long as gold, weighed by their cosines
    weights = np.array([1, 0.5**0.5]) / (1 + 0.5**0.5)
    expected = 3 * (weights[0] * np.array([1, 0]) + weights[1] * np.array([1, 1]) / 2**0.5)
    assert found["a"].numpy() == pytest.approx(expected, rel=1e-6)
    assert means.figures["combine/least_kept"] == 0
    assert means.figures["gold/least"] == pytest.approx(agreed[2])
    again = means.mean(some, dict.fromkeys(some, 0.25), learn)
    assert torch.equal(again["a"], found["a"])
    assert len(asked) == 1, "gold is learned from once in a round"
    means.begin()
    nobody = means.mean({2: some[2], 3: some[3]}, {2: 0.5, 3: 0.5}, learn)
    assert not nobody["a"].any(), "where nobody agrees nothing is changed"


@pytest.mark.parametrize("rule", [NormBound(), GeometricMedian()])
def test_figures_beside_what_a_rule_shortens_are_of_whole_clients(rule: Any) -> None:
    some: dict[int, Tree] = {
        i: {"a": torch.tensor([length, 0.0]), BESIDE + "x": torch.full((2,), 7.0)}
        for i, length in enumerate((0.1, 1.0, 100.0))
    }
    means = RobustMeans(rule)
    found = means.mean(some, dict.fromkeys(some, 1 / 3))
    assert found[BESIDE + "x"].tolist() == pytest.approx([7, 7])
    kept = means.figures["combine/kept"]
    assert kept < 0.9 if isinstance(rule, NormBound) else kept == pytest.approx(1)


def test_a_mean_that_is_looked_at_is_the_mean() -> None:
    some = values()
    means = RobustMeans(Mean())
    found = means.mean(some, EVERY, lambda names: trees.select(some[4], names))
    assert apart(found, mean_of(some)) < 1e-6
    assert means.agreement[4] == pytest.approx(1)
    assert means.figures.keys() == {"gold/agreement", "gold/least"}


def gold_of(rows: Sequence[dict[str, str]], path: Path) -> str:
    return str(write_rows(path, [{k: row[k] for k in GOLDEN} for row in rows]))


GOLDEN = ("prompt", "chosen", "rejected")


def test_what_decides_a_run_with_gold_is_what_the_pairs_say_and_not_where_they_lie(
    content: dict[str, Any], tmp_path: Path
) -> None:
    rows = make_rows([24], seed=5)
    (tmp_path / "elsewhere").mkdir()
    places = [tmp_path / "gold.jsonl", tmp_path / "elsewhere/gold.jsonl", tmp_path / "other.jsonl"]
    said = []
    for place, some in zip(places, (rows, rows, rows[:12]), strict=True):
        federation = {"weighting": "equal", "combine": "trust", "gold": gold_of(some, place)}
        said.append(decided(with_whole_paths(parsed(content, federation=federation))))
    assert said[0] == said[1]
    differs = {name for name in said[0] if said[0][name] != said[2][name]}
    assert differs == {"settings/federation"}


def test_what_decides_a_run_over_a_graph_is_who_are_neighbours_and_not_where_it_is_said(
    content: dict[str, Any], tmp_path: Path
) -> None:
    said = []
    for name, edges in (("a", "x y\n"), ("b", "x y\n"), ("c", "x z\n")):
        (tmp_path / name).write_text(edges)
        topology = {"name": "file", "path": str(tmp_path / name)}
        spec = parsed(content, algorithm={"name": "decdpo"}, network={"topology": topology})
        said.append(decided(with_whole_paths(spec)))
    assert said[0] == said[1]
    assert {name for name in said[0] if said[0][name] != said[2][name]} == {"settings/network"}


@pytest.mark.parametrize("rule", ["trust", "mean", pytest.param("norm-bound", marks=SLOW)])
@pytest.mark.long
def test_gold_tells_who_turns_pairs_round(
    rule: str, content: dict[str, Any], tmp_path: Path
) -> None:
    """Client 0's own kind of pairs are gold; what it sends agrees with them, its opposite not."""
    gold = gold_of(make_rows([24], seed=5), tmp_path / "gold.jsonl")
    federation = {"weighting": "equal", "combine": rule, "gold": gold}
    local = {**content["algorithm"]["local"], "steps": 4, "learning_rate": 1e-2}
    algorithm = {"name": "feddpo", "local": local}
    spec = parsed(content, federation=federation, algorithm=algorithm, attack="sign", workers=2)
    run = run_to(spec, tmp_path / "run")
    rows = run.read_rows("agreement.jsonl")
    assert [row["round"] for row in rows] == [1, 2]
    hostile = Attack(name="sign").hostile([f"client-{i}" for i in range(5)], spec.seed)
    bad = {f"client-{i}" for i in hostile}
    for row in rows:
        others = [value for name, value in row["clients"].items() if name not in bad]
        assert max(row["clients"][name] for name in bad) < 0 < sum(others) / len(others)
    figures = run.read_rows("metrics.jsonl")
    assert figures[0]["gold/least"] == min(rows[0]["clients"].values())
    assert ("combine/least_kept" in figures[0]) == (rule != "mean")
    page = write_report([run.path], tmp_path / "page.html").read_text()
    assert "Agreement with gold pairs" in page
    assert f"{sum(row['clients'][min(bad)] for row in rows) / 2:+.2f}" in page


@pytest.mark.parametrize("algorithm", ["ffa-lora", pytest.param("fedpdpo", marks=SLOW)])
@pytest.mark.long
def test_sites_and_one_process_learn_the_same_from_gold(
    algorithm: str, content: dict[str, Any], tmp_path: Path
) -> None:
    gold = gold_of(make_rows([24], seed=5), tmp_path / "gold.jsonl")
    spec = parsed(
        content,
        algorithm={"name": algorithm, "local": content["algorithm"]["local"]},
        federation={"weighting": "equal", "combine": "trust", "gold": gold, "clients_per_round": 4},
    )
    here = run_to(spec, tmp_path / "here")
    there = run_to(spec, tmp_path / "there", Here(tmp_path / "sites"))
    assert here.read_rows("agreement.jsonl") == there.read_rows("agreement.jsonl")
    one, other = (
        trees.load(run.path / "adapter" / "adapter_model.safetensors") for run in (here, there)
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_goes_on_with_the_gold_that_it_began_with(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows([24], seed=5)
    gold_of(rows, tmp_path / "gold.jsonl")
    monkeypatch.chdir(tmp_path)
    federation = {"weighting": "equal", "gold": "gold.jsonl"}
    spec = parsed(content, federation=federation)
    leave(spec, tmp_path / "run", after=2)
    kept = Experiment.load(tmp_path / "run" / "config.yaml")
    assert kept.federation.gold == str(tmp_path / "gold.jsonl")
    assert at_sites(kept).federation.gold == "gold"
    assert kept.federation.gold_digest
    gold_of(rows[:12], tmp_path / "gold.jsonl")
    with pytest.raises(UserError, match="is not what the run began with"):
        for _ in events(kept, RunDirectory(tmp_path / "run")):
            pass


def test_gold_that_nothing_is_learned_from_is_no_measure() -> None:
    some = values()
    with pytest.raises(UserError, match="nothing is learned"):
        RobustMeans(Trust()).mean(some, EVERY, lambda names: trees.scale(some[0], 0.0))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "Why?", "completion": " So.", "label": True}], "is no pair"),
        ([{"prompt": "Why?", "chosen": "", "rejected": ""}], "federation.gold: "),
    ],
)
def test_gold_that_is_no_pair_is_refused(
    rows: list[dict[str, Any]], message: str, content: dict[str, Any], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "gold.jsonl", rows)
    spec = parsed(content, federation={"weighting": "equal", "gold": str(path)})
    with pytest.raises(UserError, match=message):
        run_to(spec, tmp_path / "run")


@pytest.mark.parametrize("name", ["scale", pytest.param("sign", marks=SLOW)])
def test_a_run_under_attack_is_seen_apart_on_its_page(
    name: str, content: dict[str, Any], tmp_path: Path
) -> None:
    if name == "scale":  # which tells everybody two trees of the same names
        content["algorithm"] = {"name": "scaffold", "local": content["algorithm"]["local"]}
    content["federation"] = {"weighting": "equal", "combine": "norm-bound"}
    run = run_to(parsed(content, attack=name), tmp_path / "run")
    text = write_report([run.path], tmp_path / "page.html").read_text()
    for part in ("honest", "hostile", f"{name} by client-"):
        assert part in text
    least = [row["combine/least_kept"] for row in run.read_rows("metrics.jsonl")]
    assert all(one <= 1 for one in least)
    if name == "scale":
        assert max(least) < 0.3, "who sends ten times as much is shortened"


def test_who_sends_nothing_is_hostile_in_its_rows_alone(content: dict[str, Any]) -> None:
    def planned(**changes: Any) -> Mapping[str, Experiment]:
        spec = parsed(content, baselines=["alone", "feddpo", "pooled"], **changes)
        return {name: line for name, (_, line) in lines(spec, 4).items()}

    sent = planned(attack="sign", algorithm={"name": "ffa-lora"}, federation={"clip": 1.0})
    assert [name for name, line in sent.items() if line.attack] == ["ffa-lora", "feddpo"]
    assert [name for name, line in sent.items() if line.federation.clip] == ["ffa-lora", "feddpo"]
    assert all(line.attack for line in planned(attack="flip").values())


def test_alone_with_feddpas_adapter_trains_it_as_feddpa_does(content: dict[str, Any]) -> None:
    spec = parsed(content, baselines=["alone-parts"], algorithm={"name": "feddpa"})
    line = lines(spec, 4)["alone-parts"][1].algorithm
    assert isinstance(line, Alone)
    assert line.adapter_rate == 1.0


def test_figures_beside_what_hostile_clients_send_are_theirs() -> None:
    values = {0: {"x": torch.tensor([2.0]), "probe/x": torch.tensor([3.0])}, 1: {}}
    for name in ("sign", "scale", "free-rider", "sybil"):
        sent = Attack(name=name).sent(values, {}, [0])[0]  # type: ignore[arg-type]
        assert sent["x"] <= 0
        assert sent["probe/x"] == 3


def test_poisoned_rows_change_what_hostile_clients_train_on_alone(content: dict[str, Any]) -> None:
    plain, poisoned = parsed(content), parsed(content, attack="flip")
    pairs = list(zip(plain.read().clients, poisoned.read().clients, strict=True))
    changed = [one.name for one, other in pairs if one.train != other.train]
    names = [one.name for one, _ in pairs]
    assert changed == [names[i] for i in Attack(name="flip").hostile(names, plain.seed)]
    assert all(one.test == other.test for one, other in pairs)


@pytest.mark.parametrize("where", ["here", pytest.param("sites", marks=SLOW)])
def test_gossip_that_distrusts_runs(where: str, content: dict[str, Any], tmp_path: Path) -> None:
    algorithm = {"name": "decdpo", "local": content["algorithm"]["local"]}
    network = {"topology": "complete", "distrust": 0.3}
    spec = parsed(content, algorithm=algorithm, network=network)
    run = run_to(spec, tmp_path / "run", Here(tmp_path / "sites") if where == "sites" else None)
    assert len(run.read_rows("metrics.jsonl")) == 2


PRODUCT = {"name": "feddpo", "aggregate": {"name": "product"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"secrecy": {"name": "masks"}}, "which nobody sees under masks"),
        ({"privacy": CLIENTS, "algorithm": {"name": "ffa-lora"}}, "their clip is the defence"),
        ({"algorithm": {"name": "decdpo"}}, "has no mean; neighbours tell one another"),
        ({"algorithm": {"name": "clustered"}}, "does not send changes of one shape alone"),
        ({"federation": {"combine": "norm-bound", "clip": 1.0}}, "both bound messages"),
        ({"federation": {"clip": 1.0}, "algorithm": PRODUCT}, "of products the whole is sent"),
        *(
            ({"federation": {"clip": 1.0}, "algorithm": {"name": name}}, message)
            for name, message in (
                ("decdpo", "Set network.distrust"),
                ("clustered", "is not one change each"),
                ("scaffold", "is not one change each"),
            )
        ),
        *(
            (
                {
                    "federation": {"weighting": "equal", **bound},
                    "algorithm": {"name": "pluralllm", "weights": "points"},
                },
                "would be judged with it",
            )
            for bound in ({"clip": 1.0}, {"combine": "geometric-median"})
        ),
        ({"algorithm": PRODUCT}, "of products the whole is sent"),
        ({"federation": {"combine": "median"}}, "clients weigh alike in it"),
        (
            {"federation": {"combine": "median", "weighting": "equal"}, "algorithm": PRODUCT},
            "which products in turned bases",
        ),
        ({"federation": {}, "network": {"distrust": 0.2}}, "or has no neighbours"),
        (
            {"federation": {}, "network": {"distrust": 0.2}, "algorithm": {"name": "choco"}},
            "put out of step",
        ),
        ({"federation": {}, "attack": "flip", "engine": "flare"}, "are for simulated runs"),
        (
            {"federation": {}, "attack": "gauge", "algorithm": {"name": "ffa-lora"}},
            "gauge is about factors",
        ),
        ({"attack": "flip-topic"}, "flip-topic needs a word"),
        ({"federation": {"combine": "trust"}}, "Name their file in federation.gold"),
        (
            {"federation": {"gold": "g"}, "algorithm": PRODUCT},
            "federation.gold is about changes of factors",
        ),
        ({"federation": {"gold": "g"}, "secrecy": {"name": "masks"}}, "federation.gold looks at"),
        ({"federation": {"gold": "g"}, "algorithm": {"name": "decdpo"}}, "has no mean"),
        *(
            (
                {"federation": {"gold": "g"}, "algorithm": {"name": name}},
                "do not all start from the same adapter",
            )
            for name in ("fedbuff", "feddpo-stale", "fedsa-lora")
        ),
    ],
)
def test_what_rules_and_attacks_cannot_do_is_refused(
    changes: dict[str, Any], message: str, content: dict[str, Any]
) -> None:
    ruled = {"combine": "norm-bound", "weighting": "equal"}
    with pytest.raises(UserError, match=message):
        parsed(content, **{"federation": ruled, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attack": "sign", "algorithm": {"name": "alone"}},
            r"send nothing\. Take an attack",
        ),
        ({"attack": "scale", "algorithm": {"name": "pooled"}}, "send nothing"),
        ({"attack": "gauge", "algorithm": {"name": "decdpo"}}, "tell one another models"),
        (
            {"algorithm": {"name": "clustered", "local": {"keep_optimizer": True}}},
            r"algorithm\.local\.keep_optimizer",
        ),
        (
            {"algorithm": {"name": "ditto", "personal": {"keep_optimizer": True}}},
            r"algorithm\.personal\.keep_optimizer",
        ),
        (
            {"federation": {"compress": {"name": "bfloat16"}}, "algorithm": {"name": "alone"}},
            "nothing is sent for a mean",
        ),
    ],
)
def test_an_attack_or_a_compression_of_nothing_is_refused(
    changes: dict[str, Any], message: str, content: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        parsed(content, **changes).check_clients(dict.fromkeys("abc", 9))
    # a run of an older version goes on
    parsed(content, **changes).check_clients(dict.fromkeys("abc", 9), begins=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"link_failure": 0.5}}, r"network\.link_failure"),
        ({"network": {"weights": "uniform"}}, r"network\.weights"),
        ({"federation": {"speed_spread": 2.0}}, "nobody is waited for"),
        ({"evaluate_pairs": 8}, "evaluate_pairs"),
        ({"evaluate_all_at_end": True}, "evaluate_all_at_end"),
        (
            {"baselines": ["feddpo"], "algorithm": {"name": "feddpo", "aggregate": "frozen-a"}},
            "has its name, with other settings",
        ),
    ],
)
def test_settings_that_do_nothing_are_told_of(
    changes: dict[str, Any], message: str, content: dict[str, Any]
) -> None:
    with pytest.warns(UserWarning, match=message):
        parsed(content, **changes).check_clients(dict.fromkeys("abc", 9))


def test_choosing_among_fewer_evaluations_than_it_needs_is_told_of(content: dict[str, Any]) -> None:
    chosen = {"data": {**content["data"], "validation_fraction": 0.2}, "rounds": 2}
    for more, message in (
        ({"keep": "best", "evaluate_every": 2}, "one evaluation to choose from"),
        ({"stop": {"patience": 2}, "evaluate_every": 1}, "nothing is stopped"),
    ):
        with pytest.warns(UserWarning, match=message):
            parsed(content, **chosen, **more).check_clients(dict.fromkeys("abc", 9))


def test_privacy_of_what_a_client_has_goes_with_a_rule(content: dict[str, Any]) -> None:
    federation = {"weighting": "equal", "combine": "norm-bound"}
    spec = parsed(content, federation=federation, privacy=EXAMPLES)
    assert not isinstance(spec.federation.combine, Mean)


# ---- compressed messages


@pytest.mark.parametrize(
    ("algorithm", "compress", "share"),
    [
        ("feddpo", {"name": "quantize", "bits": 8}, 0.25),
        ("feddpo", {"name": "bfloat16"}, 0.5),
        pytest.param("scaffold", {"name": "quantize", "bits": 8}, 0.25, marks=SLOW),
        pytest.param("fedpdpo", {"name": "quantize", "bits": 8}, 0.25, marks=SLOW),
    ],
)
@pytest.mark.long
def test_compressed_messages_are_few_bytes_and_the_same_bits_over_sites(
    algorithm: str, compress: dict[str, Any], share: float, content: dict[str, Any], tmp_path: Path
) -> None:
    federation = {"weighting": "equal", "clients_per_round": 4}
    content["algorithm"] = {"name": algorithm, "local": content["algorithm"]["local"]}
    plain = run_to(parsed(content, federation=federation), tmp_path / "plain")
    spec = parsed(content, federation={**federation, "compress": compress})
    here = run_to(spec, tmp_path / "here")
    there = run_to(spec, tmp_path / "there", Here(tmp_path / "sites"))
    one, other, exact = (
        trees.load(run.path / "adapter" / "adapter_model.safetensors")
        for run in (here, there, plain)
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert 0 < apart(one, exact) < 0.1
    rows = [run.read_rows("metrics.jsonl")[-1] for run in (here, there, plain)]
    assert rows[0]["bytes_up"] == rows[1]["bytes_up"]
    assert share - 0.05 < rows[0]["bytes_up"] / rows[2]["bytes_up"] < share + 0.2


@pytest.mark.parametrize(
    ("few", "most"),
    # a value and its place take twice a value's bytes
    [({"fraction": 0.1}, 0.35), ({"rank": 2}, 0.6)],
    ids=["entries", "rank"],
)
@pytest.mark.long
def test_few_numbers_of_changes_are_few_bytes_and_the_same_bits_over_sites(
    few: dict[str, Any], most: float, content: dict[str, Any], tmp_path: Path
) -> None:
    federation = {"weighting": "equal", "clients_per_round": 4}
    local = content["algorithm"]["local"]
    runs = {}
    for name, sent, clients in (
        ("here", few, None),
        ("there", few, Here(tmp_path / "sites")),
        ("whole", {"fraction": 1.0}, None),
    ):
        content["algorithm"] = {"name": "fed-ef", **sent, "local": local}
        runs[name] = run_to(parsed(content, federation=federation), tmp_path / name, clients)
    content["algorithm"] = {"name": "feddpo", "local": local}
    runs["feddpo"] = run_to(parsed(content, federation=federation), tmp_path / "feddpo")
    trained = {
        name: trees.load(run.path / "adapter" / "adapter_model.safetensors")
        for name, run in runs.items()
    }
    for name, tensor in trained["here"].items():
        assert torch.equal(tensor, trained["there"][name])
        torch.testing.assert_close(trained["whole"][name], trained["feddpo"][name])
    assert apart(trained["here"], trained["feddpo"]) > 0
    rows = {name: run.read_rows("metrics.jsonl")[-1]["bytes_up"] for name, run in runs.items()}
    assert rows["here"] == rows["there"]
    assert rows["here"] < most * rows["feddpo"]


def test_what_is_rounded_at_random_is_right_on_average() -> None:
    uplink = Chain((Quantize(bits=4).stage(),))
    draw = torch.Generator().manual_seed(0)
    value = {"a": torch.linspace(-1, 1, 50), BESIDE + "x": torch.tensor([0.123])}
    total = torch.zeros(50)
    for _ in range(400):
        sent = compressed(uplink, value, Sender(0, 0, draw))
        back = restored(uplink, sent)
        assert torch.equal(back[BESIDE + "x"], value[BESIDE + "x"])
        total += back["a"]
    assert (total / 400 - value["a"]).abs().max() < 0.03


@pytest.mark.parametrize(
    "turned",
    [
        lambda message: {},
        lambda message: {"a": torch.zeros(3)},
        lambda message: {**message, "shape/a": torch.tensor([10**6, 10**6])},
        lambda message: {**message, "shape/a": torch.full((10**6,), 2**62)},
        lambda message: {**message, "shape/a": torch.tensor([-5, 10])},
        lambda message: {n: t for n, t in message.items() if not n.startswith("levels")},
        lambda message: {**message, "levels/a": torch.zeros(3, dtype=torch.uint8)},
        lambda message: {**message, "levels/a": torch.tensor(7, dtype=torch.uint8)},
        lambda message: {**message, "levels/a": torch.zeros(25)},
        lambda message: {**message, "scale/a": torch.ones(5000, 1)},  # which would be spread out
        lambda message: {**message, "scale/a": torch.ones(1, dtype=torch.float64)},
        lambda message: {**message, "shape/a": torch.tensor([], dtype=torch.int64)},
        lambda message: {**message, "more/a": torch.ones(1)},
    ],
)
def test_what_is_not_compressed_as_agreed_is_refused(turned: Any) -> None:
    uplink = Chain((Quantize(bits=4).stage(),))
    sent = compressed(uplink, {"a": torch.ones(50)}, Sender(0, 0, torch.Generator()))
    with pytest.raises(ValueError, match="not compressed as was agreed"):
        restored(uplink, turned(sent))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secrecy": {"name": "masks"}}, "under masks the words"),
        ({"privacy": CLIENTS}, "noise on sums"),
        ({"federation": {"combine": {"name": "median"}}}, "compressed changes do not go"),
        ({"federation": {"clip": 1.0}}, "what federation.clip cuts off would never be sent"),
    ],
)
def test_sparse_changes_are_refused_where_words_of_a_fixed_size_are_sent(
    changes: dict[str, Any], reason: str, content: dict[str, Any]
) -> None:
    content["algorithm"] = {"name": "fed-ef", "local": content["algorithm"]["local"]}
    with pytest.raises(UserError, match=reason):
        parsed(content, **changes)


@pytest.mark.parametrize(
    "turned",
    [
        lambda message: {},
        lambda message: {"a": torch.zeros(3)},
        lambda message: {**message, "shape/a": torch.tensor([10**6, 10**6])},
        lambda message: {**message, "shape/a": torch.tensor([-5, -10])},
        lambda message: {**message, "shape/a": torch.tensor([50.0])},
        lambda message: {**message, "places/a": message["places/a"].flip(0)},
        lambda message: {**message, "places/a": message["places/a"].long()},
        lambda message: {**message, "places/a": message["places/a"] + 49},
        lambda message: {**message, "places/a": message["places/a"] - 1},
        lambda message: {**message, "places/a": message["places/a"] * 0},
        lambda message: {**message, "values/a": torch.ones(50)},
        lambda message: {**message, "values/a": torch.ones(5, 1)},
        lambda message: {**message, "values/a": torch.ones(5, dtype=torch.int32)},
        lambda message: {**message, "values/a": torch.ones(5, dtype=torch.float64)},
        lambda message: {**message, "shape/a": torch.full((10**6,), 2**62)},
        lambda message: {**message, "shape/a": torch.ones(10**6, dtype=torch.int64)},
        lambda message: {**message, "shape/a": torch.tensor([2**29])},
        lambda message: {**message, "more/a": torch.ones(1)},
    ],
)
def test_sparse_messages_that_are_not_as_agreed_are_refused(turned: Any) -> None:
    uplink = Chain((TopK(fraction=0.1).stage(),))
    value = {"a": torch.arange(50.0).flip(0)}
    sent = compressed(uplink, value, Sender(0, 0, torch.Generator()))
    assert torch.equal(restored(uplink, sent)["a"][:5], value["a"][:5])
    with pytest.raises(ValueError, match="not compressed as was agreed"):
        restored(uplink, turned(sent))


@pytest.mark.parametrize(
    "turned",
    [
        lambda message: {},
        lambda message: {"a": torch.zeros(3)},
        lambda message: {**message, "shape/a": torch.tensor([10**6, 10**6])},
        lambda message: {**message, "shape/a": torch.tensor([-5, -10])},
        lambda message: {**message, "shape/a": torch.tensor([60])},
        lambda message: {**message, "shape/a": torch.tensor([2**20, 2**20])},
        lambda message: {**message, "shape/a": torch.full((10**6,), 2**62)},
        lambda message: {**message, "shape/a": torch.tensor([6, 0])},
        lambda message: {**message, "left/a": torch.ones(6, 2)},
        lambda message: {**message, "left/a": torch.ones(6, 1, dtype=torch.float64)},
        lambda message: {**message, "left/a": torch.ones(6)},
        lambda message: {**message, "right/a": torch.ones(10, 1)},
        lambda message: {**message, "right/a": torch.ones(1, 10, dtype=torch.int32)},
        lambda message: {n: t for n, t in message.items() if not n.startswith("right")},
        lambda message: {**message, "whole/a": torch.ones(6, 10)},
        lambda message: {**message, "more/a": torch.ones(1)},
    ],
)
def test_factors_that_are_not_as_agreed_are_refused(turned: Any) -> None:
    uplink = Chain((LowRank(rank=1).stage(),))
    value = {"a": torch.arange(6.0)[:, None] * torch.arange(10.0), "b": torch.ones(3)}
    sent = compressed(uplink, value, Sender(0, 0, torch.Generator()))
    back = restored(uplink, sent)
    torch.testing.assert_close(back["a"], value["a"])
    assert torch.equal(back["b"], value["b"])
    with pytest.raises(ValueError, match="not compressed as was agreed"):
        restored(uplink, turned(sent))


def test_what_is_said_to_be_bfloat16_is() -> None:
    uplink = Chain((Bfloat16().stage(),))
    with pytest.raises(ValueError, match="not compressed as was agreed"):
        restored(uplink, {"a": torch.ones(3)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"name": "fed-ef"}}, "federation.compress: fed-ef compresses its changes"),
        ({"secrecy": {"name": "masks"}}, "under masks the words"),
        ({"privacy": CLIENTS, "algorithm": {"name": "ffa-lora"}}, "noise on sums"),
        ({"algorithm": {"name": "decdpo"}}, "network.compress is for neighbours"),
    ],
)
def test_where_compression_would_be_for_nothing_it_is_refused(
    changes: dict[str, Any], message: str, content: dict[str, Any]
) -> None:
    federation = {"weighting": "equal", "compress": {"name": "quantize"}}
    with pytest.raises(UserError, match=message):
        parsed(content, **{"federation": federation, **changes})
