"""Figures of clients as sums, with noise, or not at all: what is told, and what is not."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_rows, write_rows
from fedpref import Experiment, UserError, config
from fedpref.engines.messages import NO_TENSORS, RefusedError, pack, unpack
from fedpref.engines.private_figures import CHANGE, PrivateFigures
from fedpref.engines.site import OWN_FIGURES
from fedpref.experiments.clients import SimulatedSite, hosted
from fedpref.experiments.run_directory import OUTCOMES
from fedpref.numerics import tallies
from fedpref.numerics.metrics import ACCURACY
from fedpref.privacy import Ledger, Secret
from fedpref.reports.comparison import compare
from fedpref.reports.page import write_report
from fedpref.reports.python import Result
from fedpref.sites.consent import Limits
from test_private_sites import CLIENTS, KEY, Here, parsed, run_to

MASKS = {"name": "masks", "min_sites": 2}


@pytest.fixture
def content(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([12, 12, 13, 12, 12, 12]))
    return deepcopy(
        {
            **settings,
            "data": {"name": "files", "path": str(rows), "test_fraction": 0.3},
            "algorithm": {**settings["algorithm"], "aggregate": {"name": "frozen-a"}},
            "federation": {"weighting": "equal"},
            "rounds": 2,
            "evaluate_every": 1,
        }
    )


def sites(folder: Path) -> Here:
    return Here(folder, [SimulatedSite(k, 3) for k in range(3)])


def rows_of(count: int) -> tuple[list[dict[str, float]], list[float]]:
    rng = np.random.default_rng(count)
    values = rng.random(count)
    rows = [{ACCURACY: float(v), "loss": float(-37 * v), "num_pairs": 4e9} for v in values]
    return rows, (rng.integers(1, 50, count)).astype(float).tolist()


# ---- sums


@pytest.mark.parametrize("parts", [1, 3])
def test_sums_of_tallies_are_those_of_the_figures(parts: int) -> None:
    rows, weights = rows_of(12)
    total: dict[str, torch.Tensor] = {}
    for k in range(parts):
        for name, words in tallies.tally(rows[k::parts], weights[k::parts]).items():
            total[name] = total.get(name, torch.zeros_like(words)) + words
    found = tallies.read(total)
    values, w = np.array([row[ACCURACY] for row in rows]), np.array(weights)
    summary = found[ACCURACY].summary()
    assert summary["mean"] == pytest.approx(values.mean(), abs=1e-5)
    assert summary["weighted_mean"] == pytest.approx((w * values).sum() / w.sum(), abs=1e-4)
    assert summary["std"] == pytest.approx(values.std(ddof=1), abs=1e-4)
    assert list(found[ACCURACY].bins) == np.histogram(values, 10, (0, 1))[0].tolist()
    assert found["loss"].total == pytest.approx(-37 * values.sum(), abs=1e-4), "below zero too"
    assert found["loss"].bins == (0.0,) * 10
    assert found["num_pairs"].total == 48e9
    assert all(int(words.abs().max()) < 2**31 for words in total.values())


def test_what_cannot_be_summed_and_what_nobody_has_is_left_out() -> None:
    for value in (math.nan, math.inf, 2e13):
        found = tallies.read(tallies.tally([{"loss": value}, {"loss": 2.0}], [1.0, 1.0]))
        assert (found["loss"].count, found["loss"].total) == (1, 2), "it counts as none"
        assert tallies.read(tallies.tally([{"loss": value}], [1.0])) == {}
    assert tallies.read({"loss": torch.zeros(15, 4, dtype=torch.long)}) == {}
    assert [tallies.bin_of(value) for value in (-0.1, 0.0, 0.99, 1.0)] == [0, 0, 9, 9]
    one = tallies.Figure(1.0, 0.5, 0.25, 0.0, 0.0, (0.0,) * 10)
    assert one.summary() == {"mean": 0.5, "weighted_mean": 0.5, "std": 0.0}


# ---- under masks


@pytest.mark.long
def test_under_masks_no_clients_figures_reach_the_coordinator(
    content: dict[str, Any], tmp_path: Path
) -> None:
    here = run_to(parsed(content), tmp_path / "here")
    transport = sites(tmp_path / "sites")
    there = run_to(parsed(content, secrecy=MASKS), tmp_path / "there", transport)
    rows, plain = (run.read_rows("evaluation.jsonl") for run in (there, here))
    assert [row["round"] for row in rows] == [1, 2]
    assert not any(row["clients"] for row in rows)
    for row, other in zip(rows, plain, strict=True):
        for metric in ("mean", "weighted_mean", "std"):
            expected = other["summary"][ACCURACY][metric]
            assert row["summary"][ACCURACY][metric] == pytest.approx(expected, abs=1e-2)
        assert sum(row["bins"][ACCURACY]) == 6
    for row, other in zip(*(run.read_rows("metrics.jsonl") for run in (there, here)), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-3), "of the training too"
        assert row["num_pairs"] == other["num_pairs"]
    # and what a site has of its own clients stays there
    own = (tmp_path / "sites/site-0/there" / OWN_FIGURES).read_text().splitlines()
    last = json.loads(own[-1])
    assert last["place"] == "conclude"
    assert sorted(last["clients"]) == ["client-0", "client-3"]
    assert list((tmp_path / "sites/site-0/there" / OUTCOMES).glob("*.json"))
    said = [unpack(message)[0] for message in transport.up]
    assert not any("metrics" in header for header in said)


def test_a_site_tells_no_clients_figures_whatever_is_asked(
    content: dict[str, Any], tmp_path: Path
) -> None:
    transport = sites(tmp_path / "sites")

    class Curious(Here):
        def ask(self, messages: Any, seconds: float) -> dict[str, bytes]:
            found = super().ask(messages, seconds)
            for site, message in messages.items():
                header, tensors = unpack(message)
                if header.get("verb") != "tally":
                    continue
                address = header["masked"]["address"]
                lies = (
                    {"verb": "report", "own": header["own"]},
                    {**header, "own": dict(list(header["own"].items())[:1])},
                    {**header, "verb": "contribute", "shares": dict.fromkeys(header["own"], 1.0)},
                    {**header, "masked": {**header["masked"], "address": {**address, "call": 7}}},
                )
                for lie in lies:
                    answer, sent = unpack(self.all[site].answer(pack(lie, tensors)))
                    assert answer.get("refused"), lie
                    assert not sent
                    tried.append(lie["verb"])
            return found

    tried: list[str] = []
    transport = Curious(tmp_path / "sites", [SimulatedSite(k, 3) for k in range(3)])
    run_to(parsed(content, secrecy=MASKS, rounds=1), tmp_path / "run", transport)
    assert {"report", "tally", "contribute"} == set(tried)


def test_figures_that_would_hardly_be_more_than_one_sites_are_not_told(
    content: dict[str, Any], tmp_path: Path
) -> None:
    class Some(SimulatedSite):
        """One site has the client with half of the rows, another all others."""

        def host(self, experiment: Any, folder: Path, held_out: Any = ()) -> Any:
            spec = config.parse(Experiment, experiment, "the experiment")
            clients = spec.read().settled().clients
            mine = (0,) if self._number else range(1, len(clients))
            return hosted(spec, {i: clients[i] for i in mine}, folder)

    rows = write_rows(tmp_path / "uneven.jsonl", make_rows([60, 12, 12, 12, 12, 12]))
    uneven = {"data": {**content["data"], "path": str(rows)}, "federation": {}, "secrecy": MASKS}
    transport = Here(tmp_path / "sites", [Some(k, 2) for k in range(2)])
    run = run_to(parsed(content, **uneven), tmp_path / "run", transport)
    assert [row["summary"] for row in run.read_rows("evaluation.jsonl")] == [{}, {}]
    rounds = run.read_rows("metrics.jsonl")
    assert [row["clients"] for row in rounds] == [6, 6], "which ends no round"
    assert "loss" not in rounds[0]


# ---- with noise, and not at all


def test_private_figures_are_charged_before_they_are_told(tmp_path: Path) -> None:
    rows, weights = rows_of(2000)
    figures = tallies.read(tallies.tally(rows, weights))
    ledger = Ledger.at(tmp_path, "evaluations.jsonl")
    private = PrivateFigures(Secret(KEY), ledger, 20.0, 2000, planned=2)
    told = private.told(figures, 0, 2)
    assert list(told) == [ACCURACY], "nothing that has no bounds"
    summary = told[ACCURACY].summary()
    assert summary["noise"] == pytest.approx(20 * CHANGE / 2000, rel=0.01)
    assert 0 < abs(summary["mean"] - figures[ACCURACY].total / 2000) < 6 * summary["noise"]
    apart = np.array(told[ACCURACY].bins) - np.array(figures[ACCURACY].bins)
    assert 5 < apart.std() / CHANGE < 45
    assert private.told(figures, 0, 2) == told, "once more it is the same, and free"
    assert private.events.total() == 1
    again = PrivateFigures(Secret(KEY), Ledger.at(tmp_path, "evaluations.jsonl"), 20.0, 2000, 2)
    assert again.told(figures, 0, 2) == told
    other = tallies.read(tallies.tally(rows[1:], weights[1:]))
    assert again.told(other, 0, 2)[ACCURACY].total != told[ACCURACY].total
    assert sum(one["sums"] for one in again._ledger.entries) == 2
    again.allows = lambda events: False
    assert again.told(figures, 1, 2) == {}, "beyond the budget nothing is told"
    assert again.told({"reward": figures[ACCURACY]}, 2, 2) == {}


def test_one_client_changes_private_figures_by_no_more_than_is_said() -> None:
    for value in (0.0, 0.03, 0.5, 0.99, 1.0):
        one = tallies.read(tallies.tally([{ACCURACY: value}], [1.0]))[ACCURACY]
        changes = [one.total - one.count / 2, *one.bins]
        assert math.hypot(*changes) <= CHANGE + 1e-6


@pytest.mark.parametrize("secrecy", [None, pytest.param(MASKS, marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_run_tells_evaluations_with_noise_within_its_budget(
    secrecy: Any, content: dict[str, Any], tmp_path: Path
) -> None:
    privacy = {"epsilon": 8.0, "delta": 0.01, "metrics": "private", "metrics_noise": 3.0}
    spec = parsed(content, privacy=privacy, secrecy=secrecy)
    run = run_to(spec, tmp_path / "run", sites(tmp_path / "sites") if secrecy else None)
    rows, rounds = run.read_rows("evaluation.jsonl"), run.read_rows("metrics.jsonl")
    assert [list(row["summary"]) for row in rows] == [[ACCURACY]] * 2
    assert not any(row["clients"] for row in rows)
    assert "loss" not in rounds[0], "nothing of the training"
    entries = Ledger.at(run.path / "privacy", "evaluations.jsonl").entries
    assert [one["noise_multiplier"] for one in entries] == [3.0, 3.0]
    assert rounds[-1]["epsilon"] <= 8.0
    alone = run_to(parsed(content, privacy={**privacy, "metrics": "none"}), tmp_path / "none")
    ledgers = [Ledger.at(one.path / "privacy") for one in (run, alone)]
    noise = [ledger.entries[0]["noise_multiplier"] for ledger in ledgers]
    assert noise[0] > noise[1], "evaluations have a part of the budget"
    assert not list((run.path / OUTCOMES).glob("*")), "what came of each example is not kept"
    page = write_report([run.path], tmp_path / "page.html").read_text()
    assert "figures of evaluations are within it" in page
    assert "Counts have noise" in page


@pytest.mark.long
def test_with_none_nothing_is_told_and_nothing_is_asked(
    content: dict[str, Any], tmp_path: Path
) -> None:
    transport = sites(tmp_path / "sites")
    spec = parsed(content, privacy={**CLIENTS, "metrics": "none"})
    run = run_to(spec, tmp_path / "run", transport)
    assert [row["summary"] for row in run.read_rows("evaluation.jsonl")] == [{}, {}]
    assert "loss" not in run.read_rows("metrics.jsonl")[0]
    for site in transport.all.values():
        message = pack({"verb": "report", "own": {}}, NO_TENSORS)
        assert "figures are not told" in unpack(site.answer(message))[0]["refused"]
    page = write_report([run.path], tmp_path / "page.html").read_text()
    assert "Nothing is told of clients" in page
    with pytest.raises(UserError, match="not told one by one, so that they cannot be compared"):
        compare([run.path])
    assert "not told one by one" in Result.at(run.path)._repr_html_()
    other = run_to(parsed(content, name="other"), tmp_path / "other")
    with pytest.raises(UserError, match="give it a report of its own"):
        write_report([run.path, other.path], tmp_path / "both.html")


def test_a_site_that_counts_for_itself_takes_no_private_figures(content: dict[str, Any]) -> None:
    privacy = {"epsilon": 2.0, "delta": 0.01, "metrics": "private"}
    limits = Limits(max_epsilon={"client": 4.0}, least_examples=1, least_batch=1)
    with pytest.raises(RefusedError, match="private evaluations are the coordinator's to count"):
        limits.refuse(parsed(content, privacy=privacy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": {**CLIENTS, "unit": "example", "metrics": "private"}}, "beside which nothing"),
        ({"privacy": {**CLIENTS, "against": "coordinator", "metrics": "kept"}}, "Take none"),
        ({"privacy": {**CLIENTS, "metrics": "none"}, "baselines": ["alone"]}, "Leave baselines"),
    ],
)
def test_promises_of_figures_that_cannot_be_kept_are_refused(
    changes: dict[str, Any], message: str, content: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        parsed(content, **changes)
