"""Private sums: noise that is noise, norms that are bounded, a ledger that forgets nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from conftest import leave, make_rows, write_rows
from fedpref import Experiment, UserError, config, resume, run
from fedpref.channel.lattice import LARGEST, Lattice, fixed, unfixed
from fedpref.channel.noise import DISTANCE, DiscreteGaussian, RoundedGaussian
from fedpref.engines.private_sums import PrivateSums
from fedpref.experiments.rounds import events, new_directory
from fedpref.experiments.run_directory import RunDirectory
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.privacy import FixedClip, Guarantee, Ledger, QuantileClip, Secret
from fedpref.privacy.accountant import epsilon_of_discrete
from fedpref.privacy.audit import audit_sums, lower_bound
from fedpref.runs.export import export

KEY = bytes(range(32))


def sums(folder: Path, dimensions: int = 50, **changes: Any) -> PrivateSums:
    given: dict[str, Any] = {
        "secret": Secret(KEY),
        "ledger": Ledger.at(folder),
        "guarantee": Guarantee(1.0, 1.0, 1e-3),
        "budget": None,
        "clip": FixedClip(norm=1.0),
        "expected": 10.0,
        "template": {"change": torch.zeros(dimensions)},
    }
    return PrivateSums(**{**given, **changes})


def change(dimensions: int = 50, length: float = 1.0, seed: int = 0) -> Tree:
    flat = torch.randn(dimensions, generator=torch.Generator().manual_seed(seed))
    return {"change": length * flat / flat.norm()}


# ---- noise


def test_the_sampler_has_the_cells_of_a_gaussian() -> None:
    noise = RoundedGaussian(40)
    words = Secret(KEY).words(2 * 400_000, "noise")
    drawn = noise.draw(words)
    edges = np.arange(-140, 141, 7)
    counts = np.histogram(drawn, bins=np.concatenate([[-10_000], edges - 0.5, [10_000]]))[0]
    cells = np.concatenate([[-np.inf], edges - 0.5, [np.inf]]) / 40
    expected = len(drawn) * np.diff(scipy.stats.norm.cdf(cells))
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3
    assert abs(drawn.std() / 40 - 1) < 0.005
    # the extreme words are the extreme cells, and the middle one is nothing
    last = 2**64 - 1
    ends = noise.draw(np.array([0, 0, 2**63, 2**63, last, last], np.uint64))
    assert ends[0] < -8.5 * 40
    assert abs(ends[1]) <= noise._within.shape[1] + 1, "within the middle block"
    assert ends[2] > 8.5 * 40
    assert RoundedGaussian(2**12).distance < RoundedGaussian(2**14).distance < DISTANCE
    # cell by cell, against erfc in 200 bits
    with mpmath.workprec(200):
        apart = sum(abs(mine - exact) for mine, exact in cells_of(noise)) / 2
    assert apart < noise.distance


def test_the_discrete_sampler_has_the_chances_of_a_discrete_gaussian() -> None:
    noise = DiscreteGaussian(3)
    drawn = noise.draw(Secret(KEY).words(2 * 300_000, "noise"))
    cells = np.arange(-11, 12)
    chances = np.exp(-(cells**2) / 18)
    counts = np.array([(drawn == cell).sum() for cell in cells])
    assert counts.sum() > 299_900
    expected = chances / chances.sum() * counts.sum()
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_discrete_noise_costs_a_little_more_than_a_gaussians_by_its_own_accountant() -> None:
    # z 1, 30 sums, delta 1e-3: 33.8 by zCDP, as computed with another program; 31.1 of a Gaussian
    found = epsilon_of_discrete([1.0] * 30, 1e-3)
    assert found == pytest.approx(33.7, abs=0.3)
    assert found > Guarantee(1.0, 1.0, 1e-3).epsilon(30)
    assert epsilon_of_discrete([], 1e-3) == 0.0
    with pytest.raises(UserError, match="no noise keeps 1000 sums within"):
        Guarantee.of_discrete(1e-3, 1e-5, 1000)
    least = Guarantee.of_discrete(8.0, 1e-3, 10)
    assert least.epsilon(10) <= 8.0
    assert least.epsilon(10) == pytest.approx(8.0, rel=1e-3)


def cells_of(noise: RoundedGaussian) -> list[tuple[Any, Any]]:
    """The chance of each cell as the tables have it, and as it is."""
    found = []
    blocks = [0, *map(int, noise._blocks), 2**64]
    width = noise._within.shape[1] + 1
    for block, row in enumerate(noise._within):
        bounds = [0, *map(int, row), 2**64]
        for k in range(width):
            mine = mpmath.mpf(blocks[block + 1] - blocks[block]) / 2**64
            mine *= mpmath.mpf(bounds[k + 1] - bounds[k]) / 2**64
            cell = block * width + k - noise._half
            edges = [(cell + side * mpmath.mpf("0.5")) / noise.deviation for side in (1, -1)]
            found.append((mine, mpmath.ncdf(edges[0]) - mpmath.ncdf(edges[1])))
    return found


def test_a_secret_is_its_owners_alone_and_gives_the_same_draws_again(tmp_path: Path) -> None:
    secret = Secret.of(tmp_path / "run")
    file = tmp_path / "run/.secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = Secret.of(tmp_path / "run")
    assert np.array_equal(secret.words(4, "noise"), again.words(4, "noise"))
    addresses: list[dict[str, int]] = [{}, {"round": 1}, {"call": 1}, {"client": 3}, {"attempt": 1}]
    drawn = {tuple(secret.words(2, "noise", **one).tolist()) for one in addresses}
    assert len(drawn) == 5
    assert "32" not in repr(secret)
    assert file.read_bytes().hex() not in repr(secret)
    file.chmod(0o640)
    with pytest.raises(UserError, match="others may read the run's secret"):
        Secret.of(tmp_path / "run")
    file.chmod(0o600)
    file.write_bytes(b"short")
    with pytest.raises(UserError, match="expected 32 bytes, found 5"):
        Secret.of(tmp_path / "run")
    secret.forget(tmp_path / "run")
    assert not file.exists()
    with pytest.raises(ValueError, match="32 bytes"):
        Secret(b"short")


# ---- the lattice


@pytest.mark.parametrize("dimensions", [1, 50, 20_000])
@pytest.mark.parametrize("length", [0.0, 0.3, 1.0, 7.0])
def test_the_integer_norm_never_exceeds_what_noise_is_for(dimensions: int, length: float) -> None:
    lattice = Lattice.of(1.0, 2.0, dimensions)
    assert lattice.most * 2.0 == lattice.deviation
    rng = torch.Generator().manual_seed(1)
    for seed in range(5):
        tree = change(dimensions, length, seed)
        message = lattice.encode(tree, rng)
        assert message["change"].dtype == torch.int32
        assert float(message["change"].double().norm()) <= lattice.most
        meant = tree["change"].double() * min(1.0, 1 / length if length else 1.0)
        assert float((message["change"] * lattice.unit - meant).abs().max()) <= lattice.unit


def test_what_cannot_be_rounded_within_its_norm_goes_towards_zero() -> None:
    lattice = dataclasses.replace(Lattice.of(1.0, 1.0, 4), most=1.0, unit=0.3)
    message = lattice.encode({"change": torch.full((4,), 0.5)}, torch.Generator().manual_seed(0))
    assert message["change"].tolist() == [1, 1, 1, 1]


def test_a_lattice_is_fine_or_there_is_none() -> None:
    assert Lattice.of(1.0, 1.0, 10**6).unit < Lattice.of(1.0, 1.0, 10).unit * 2
    with pytest.raises(ValueError, match="no lattice is fine enough"):
        Lattice.of(1.0, 1e5, 10**6)
    nothing = Lattice.of(1.0, 1.0, 3).encode({"a": torch.tensor([math.inf])}, torch.Generator())
    assert nothing["a"].tolist() == [0], "a run that stopped would tell of it"


def test_a_sums_lattice_counts_the_rounding_of_both_neighbours() -> None:
    for dimensions in (10, 10_000, 200_000):
        lattice = Lattice.of_sums(1.0, 0.7, dimensions)
        assert lattice.deviation == pytest.approx(0.7 * lattice.most)
        rng = torch.Generator().manual_seed(0)
        one = torch.randn(dimensions, generator=rng).double()
        step = torch.randn(dimensions, generator=rng).double()
        other = one + step / step.norm()
        moved = (lattice.round(one) - lattice.round(other)).double().norm()
        assert float(moved) <= lattice.most
    with pytest.raises(ValueError, match="no lattice is fine enough"):
        Lattice.of_sums(1.0, 1e6, 10**6)


def test_numbers_are_integers_and_back() -> None:
    tree = {"a": torch.tensor([0.5, -3.25, 1e-7]), "b": torch.zeros(0)}
    back = unfixed(fixed(tree))
    assert torch.allclose(back["a"], tree["a"], atol=2**-25)
    for wrong in (LARGEST * 1.01, float("nan")):
        with pytest.raises(ValueError, match="beyond 64, or none"):
            fixed({"a": torch.tensor([wrong])})


def test_a_sum_is_the_mean_but_for_the_noise_that_was_asked_for(tmp_path: Path) -> None:
    private = sums(tmp_path, 5000)
    trees_sent = [change(5000, 0.8, seed) for seed in range(4)]
    messages = [private.encode(tree, i, 0, 1) for i, tree in enumerate(trees_sent)]
    mean = private.release(messages, 0, 1)["change"]
    expected = sum(tree["change"] for tree in trees_sent) / 10
    noise = (mean - expected) * 10
    longest = private.lattice.most * private.lattice.unit
    assert float(noise.std()) == pytest.approx(1.0 * longest, rel=0.05)
    assert longest == pytest.approx(1.0, rel=0.011)
    assert scipy.stats.kstest(noise.numpy() / float(noise.std()), "norm").pvalue > 1e-3


def test_an_empty_round_moves_by_noise_alone(tmp_path: Path) -> None:
    mean = sums(tmp_path, 5000).release([], 0, 1)["change"]
    assert float(mean.std()) == pytest.approx(0.1, rel=0.06)


def test_a_sum_of_other_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other tensors"):
        sums(tmp_path).encode({"other": torch.zeros(50)}, 0, 0, 1)


# ---- the accountant and the ledger


@pytest.mark.parametrize(
    ("multiplier", "chance", "count", "delta", "epsilon"),
    [
        (1.0, 0.1, 100, 1e-3, 4.785),
        (1.0, 0.05, 100, 1e-4, 2.870),
        (0.8, 0.01, 1000, 1e-5, 3.141),
        (5.0, 1.0, 30, 1e-3, 3.515),
    ],
)
def test_epsilon_agrees_with_another_accountant_within_a_hundredth(
    multiplier: float, chance: float, count: int, delta: float, epsilon: float
) -> None:
    ours = Guarantee(multiplier, chance, delta).epsilon(count)
    assert ours == pytest.approx(epsilon, rel=0.01)
    if chance == 1:  # a closed form (Balle and Wang 2018)
        mu = math.sqrt(count) / multiplier
        cdf = scipy.stats.norm.cdf
        left = cdf(-ours / mu + mu / 2) - math.exp(ours) * cdf(-ours / mu - mu / 2)
        assert left == pytest.approx(delta, rel=0.01)
    else:
        prv = pytest.importorskip("prv_accountant")
        mechanism = prv.PoissonSubsampledGaussianMechanism(
            noise_multiplier=multiplier, sampling_probability=chance
        )
        accountant = prv.PRVAccountant(
            prvs=mechanism, max_self_compositions=count, eps_error=0.01, delta_error=delta / 1000
        )
        _, estimate, _ = accountant.compute_epsilon(delta=delta, num_self_compositions=[count])
        assert ours == pytest.approx(float(estimate), rel=0.01)


@pytest.mark.long
def test_the_least_noise_that_keeps_a_budget_keeps_it() -> None:
    for epsilon, chance in ((8.0, 1.0), (1.0, 0.1), (50.0, 0.02)):
        found = Guarantee.of(epsilon, 1e-3, chance, 20)
        assert found.epsilon(20) <= epsilon
        less = dataclasses.replace(found, noise_multiplier=0.98 * found.noise_multiplier)
        assert less.epsilon(20) > epsilon or found.noise_multiplier == pytest.approx(0.2)
    assert found.epsilon(0) == 0.0
    with pytest.raises(UserError, match="takes more than 1e-05 of it at epsilon 20"):
        Guarantee.of(20.0, 1e-5, 1.0, 10, inexact=1e-12)
    with pytest.raises(UserError, match="no noise keeps 5 sums within"):
        Guarantee.of(1e-6, 1e-9, 1.0, 5)
    exact, near = Guarantee(1.0, 1.0, 1e-5), Guarantee(1.0, 1.0, 1e-5, inexact=1e-9)
    # (1 + exp(epsilon)) times the distance is what is taken of delta
    left = 1e-5 - (1 + math.exp(near.epsilon(2))) * 2e-9
    assert near.epsilon(2) == pytest.approx(Guarantee(1.0, 1.0, left).epsilon(2), rel=1e-6)
    assert near.epsilon(2) > exact.epsilon(2)
    with pytest.raises(UserError, match="less than what noise that is not exact takes"):
        Guarantee(1.0, 1.0, 1e-9, inexact=1e-8).epsilon(1)


def test_the_same_sum_is_free_and_another_is_charged_with_fresh_noise(tmp_path: Path) -> None:
    private = sums(tmp_path)
    first = private.release([private.encode(change(), 0, 3, 2)], 3, 2)
    # as a run that was killed does it again, in another process
    again = sums(tmp_path)
    same = again.release([again.encode(change(), 0, 3, 2)], 3, 2)
    assert torch.equal(first["change"], same["change"])
    assert again.ledger.charged == 1
    other = again.release([again.encode(change(seed=1), 0, 3, 2)], 3, 2)
    assert again.ledger.charged == 2
    assert [one["attempt"] for one in Ledger.at(tmp_path).entries] == [0, 1]
    # what is left of the noise when the sums are taken away is not the same
    noises = []
    for released, seed in ((first, 0), (other, 1)):
        summed = private.encode(change(seed=seed), 0, 3, 2)["change"] * private.lattice.unit / 10
        noises.append(released["change"] - summed)
    assert float((noises[0] - noises[1]).norm()) > 0.5 * float(noises[0].norm())
    assert again.epsilon > private.epsilon


def test_a_budget_is_kept_and_a_charged_round_can_be_done_again(tmp_path: Path) -> None:
    guarantee = Guarantee(2.0, 1.0, 1e-3)
    private = sums(tmp_path, guarantee=guarantee, budget=guarantee.epsilon(2))
    for round in (0, 1):
        assert private.affords(round)
        private.release([], round, 1)
    assert not private.affords(2)
    assert private.affords(1), "what is spent is spent"
    private.release([], 1, 1)
    other = [private.encode(change(), 0, 1, 1)]
    with pytest.raises(UserError, match="would be charged beyond the budget"):
        private.release(other, 1, 1)
    assert private.ledger.charged == 2


def test_cohorts_are_drawn_by_words_of_the_secret(tmp_path: Path) -> None:
    private = sums(tmp_path, guarantee=Guarantee(1.0, 0.25, 1e-3), chance=0.25)
    drawn = [private.cohort(range(40), round) for round in range(200)]
    sizes = [len(one) for one in drawn]
    assert np.mean(sizes) == pytest.approx(10, abs=0.8)
    assert np.var(sizes) == pytest.approx(7.5, rel=0.4), "each by a draw of its own"
    assert drawn == [private.cohort(range(40), round) for round in range(200)]
    other = sums(
        tmp_path, guarantee=Guarantee(1.0, 0.25, 1e-3), chance=0.25, secret=Secret(bytes(32))
    )
    assert drawn[0] != other.cohort(range(40), 0)
    assert sums(tmp_path).cohort([3, 5], 0) == (3, 5), "everybody"


def test_a_ledger_that_a_crash_cut_short_is_whole_and_a_damaged_one_ends_the_run(
    tmp_path: Path,
) -> None:
    private = sums(tmp_path)
    private.release([], 0, 1)
    private.release([], 1, 1)
    file = tmp_path / "ledger.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"round": 2, "ca')
    assert Ledger.at(tmp_path).charged == 2
    assert file.read_text() == whole
    file.write_text("nothing\n" + whole)
    with pytest.raises(UserError, match="line 1: the ledger is damaged"):
        Ledger.at(tmp_path)
    (tmp_path / "blocked").write_text("")
    with pytest.raises(UserError, match="cannot be written down, so that nothing is"):
        Ledger(tmp_path / "blocked/ledger.jsonl").charge(0, 1, "d", (1.0, 1.0))


# ---- runs


def private_spec(settings: dict[str, Any], tmp_path: Path, **changes: Any) -> Experiment:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([12] * 8))
    content = {
        **settings,
        "data": {"name": "files", "path": str(rows), "test_fraction": 0.3},
        "algorithm": {
            "name": "feddpo",
            "aggregate": {"name": "frozen-a"},
            "local": settings["algorithm"]["local"],
        },
        "federation": {"weighting": "equal", "sampling": "poisson", "clients_per_round": 2},
        "privacy": {"noise_multiplier": 2.0, "delta": 0.01},
        "rounds": 5,
    }
    return config.parse(Experiment, {**content, **changes}, "test")


@pytest.mark.long
def test_a_private_run_ends_within_its_budget_and_forgets_its_secret(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    privacy = {"epsilon": 8.0, "delta": 0.01, "clip": {"name": "fixed", "norm": 0.1}}
    everybody = {"weighting": "equal"}
    spec = private_spec(
        settings, tmp_path, baselines=["alone"], privacy=privacy, federation=everybody
    )
    path = run(spec, tmp_path / "run").path
    rows = RunDirectory(path).read_rows("metrics.jsonl")
    spent = [row["epsilon"] for row in rows]
    assert spent == sorted(spent)
    assert spent[-1] <= 8.0
    assert spent[-1] == pytest.approx(8.0, rel=0.01), "no more noise than the budget asks for"
    assert Ledger.at(path / "privacy").charged == 5
    assert not (path / "privacy/.secret").exists()
    assert "epsilon" not in RunDirectory(path / "baselines/alone").read_rows("metrics.jsonl")[0]
    export(path, "peft", tmp_path / "model")
    card = (tmp_path / "model/shared/README.md").read_text()
    assert "Differential privacy: epsilon" in card
    assert "seed" not in card
    assert "held-out" not in card
    assert "8 clients" not in card


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (".secret", r"\.secret: the run's secret is gone"),
        ("ledger.jsonl", "its ledgers say less than what has been done has cost"),
        ("../metrics.jsonl", r"metrics\.jsonl: the row of round 2 is gone"),
    ],
)
def test_a_private_run_that_has_lost_what_it_counts_by_does_not_go_on(
    lost: str, message: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = private_spec(settings, tmp_path, rounds=4, checkpoint_every=2)
    leave(spec, tmp_path / "run", 4)
    file = tmp_path / "run/privacy" / lost
    kept = file.read_bytes()
    for _ in range(2):  # nor the second time, when it has looked at all that there is
        file.unlink()
        with pytest.raises(UserError, match=message):
            resume(tmp_path / "run")
        file.write_bytes(kept)
    file.chmod(0o600)
    # what the last checkpoint does not know of was spent all the same
    if lost == "ledger.jsonl":
        file.write_bytes(kept[: kept.index(b"\n") + 1])
        with pytest.raises(UserError, match=message):
            resume(tmp_path / "run")


def test_a_secret_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"secret cannot be written.*No space left"):
            Secret.of(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    assert Secret.of(tmp_path / "run").words(1, "noise").size == 1
    (tmp_path / "over").mkdir()
    (tmp_path / "over/ledger.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="the run's secret is gone"):
        Secret.of(tmp_path / "over")
    Secret.of(tmp_path / "over", is_over=True)
    (tmp_path / "over/.secret.left").touch()
    Secret.forget(tmp_path / "over")
    assert [file.name for file in (tmp_path / "over").iterdir()] == ["ledger.jsonl"]

    def no_links(*paths: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", no_links)
        first = Secret.of(tmp_path / "elsewhere").words(1, "noise")
    assert Secret.of(tmp_path / "elsewhere").words(1, "noise") == first
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == [".secret"]


@pytest.mark.parametrize("after", [pytest.param(2, marks=SLOW), 4, pytest.param(6, marks=SLOW)])
@pytest.mark.long
def test_a_private_run_that_was_left_ends_with_the_same_bits_for_nothing(
    after: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = private_spec(settings, tmp_path)
    leave(spec, tmp_path / "broken", after)
    # the same secret, as if nothing had happened
    (tmp_path / "whole/privacy").mkdir(parents=True)
    key = (tmp_path / "broken/privacy/.secret").read_bytes()
    whole = new_directory(spec, tmp_path / "whole-run")
    begun = events(spec, whole)
    next(begun)
    begun.close()
    (tmp_path / "whole-run/privacy").mkdir()
    descriptor = os.open(tmp_path / "whole-run/privacy/.secret", os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(descriptor, key)
    os.close(descriptor)
    resume(tmp_path / "whole-run")
    resume(tmp_path / "broken")
    one, other = (
        trees.load(tmp_path / name / "adapter/adapter_model.safetensors")
        for name in ("whole-run", "broken")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert Ledger.at(tmp_path / "broken/privacy").charged == 5


@pytest.mark.long
def test_two_private_runs_of_one_config_share_nothing_that_is_drawn(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = private_spec(settings, tmp_path)
    one, other = (run(spec, tmp_path / name).path for name in ("one", "other"))
    tensors = [trees.load(path / "adapter/adapter_model.safetensors") for path in (one, other)]
    moved = [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])]
    assert moved
    assert all("lora_B" in name for name in moved), "A stays where it was drawn"
    # nothing in the run directory helps to compute the noise: it is in no file of it
    for file in one.rglob("*"):
        assert file.name != ".secret"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"name": "clustered"}}, "clustered shares more, or other, than means"),
        ({"algorithm": {"name": "decdpo"}}, "decdpo lets clients tell neighbours what they have"),
        (
            {
                "algorithm": {"name": "scaffold"},
                "privacy": {"noise_multiplier": 2.0, "delta": 0.01, "clip": {"name": "quantile"}},
            },
            "scaffold has 2 sums in a round",
        ),
        (
            {"privacy": {"noise_multiplier": 2.0, "delta": 0.01, "against": "everybody"}},
            "of clients the promise is towards model-users",
        ),
        (
            {"algorithm": {"name": "feddpo", "aggregate": {"name": "product"}}},
            "products of factors have no bounded norm",
        ),
        ({"algorithm": {"name": "feddpo", "aggregate": {"residual": True}}}, "clip does not bound"),
        ({"federation": {}}, "federation.weighting"),
        ({"federation": {"weighting": "equal", "clients_per_round": 2}}, "cohorts of a fixed size"),
        ({"federation": {"weighting": "equal", "clip": 1.0}}, "privacy.clip bounds changes"),
        ({"federation": {"weighting": "equal", "deadline": 2.0}}, "whoever is drawn takes part"),
        (
            {"federation": {"weighting": "equal", "newcomers": 1}},
            "who joins may not hang on how many there are",
        ),
        ({"partition": {"name": "iid", "clients": 4}}, "whose rows are whose may not hang on"),
        ({"partition": {"name": "natural", "max_clients": 4}}, "whose rows are whose may not"),
        ({"diagnostics": ["disagreement"]}, "sums without noise"),
        ({"baselines": ["feddpo"]}, "feddpo would be published without a promise"),
        (
            {"privacy": {"noise_multiplier": 2.0, "delta": 0.01, "against": "coordinator"}},
            "the coordinator sees what each client sends",
        ),
        ({"privacy": {}}, "give epsilon, from which the noise is computed, or noise_multiplier"),
        ({"privacy": None}, "poisson is for runs that are private in clients"),
    ],
)
def test_what_a_promise_does_not_cover_is_refused(
    changes: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        private_spec(settings, tmp_path, **changes)


def test_no_clients_rows_decide_which_of_anothers_are_trained_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    texts = {"chosen": " a", "rejected": " b"}
    rows = [{"prompt": f"Question {k}?", **texts, "client": "large"} for k in range(30)]
    alone = write_rows(tmp_path / "alone.jsonl", rows)
    # of two prompts that "large" trains on, one is held out for "small", who would have none else
    spec = private_spec(settings, tmp_path, data={"name": "files", "path": str(alone)})
    trained = [row.prompt for row in spec.clients()[0][0].train]
    more = [{"prompt": prompt, **texts, "client": "small"} for prompt in trained[:4]]
    both = write_rows(tmp_path / "both.jsonl", [*rows, *more])
    data = {"name": "files", "path": str(both)}
    with pytest.raises(UserError, match="no held-out rows"):
        private_spec(settings, tmp_path, data=data).clients()
    where = {"prompt": next(row.prompt for row in spec.clients()[0][0].test)}
    held = write_rows(tmp_path / "held.jsonl", [*rows, *more, {**more[0], **where}])
    data = {"name": "files", "path": str(held)}
    clients, left_out = private_spec(settings, tmp_path, data=data).clients()
    assert left_out == 0
    assert [row.prompt for row in clients[0].train] == trained


def test_a_delta_that_would_publish_a_client_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = private_spec(settings, tmp_path, privacy={"epsilon": 8.0, "delta": 0.2})
    with pytest.raises(UserError, match="more than one over the 8 clients"):
        run(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- the audit


AUDIT = {"canaries": 400, "dimensions": 6000, "rounds": 10, "clip": 1.0, "delta": 1e-5}
TRUE = Guarantee(6.6, 1.0, 1e-5)


def bound(folder: Path, mutant: str = "", seed: int = 0) -> float:
    """The lower bound of the whole path of sums, or of one with a mistake in it."""
    private = sums(
        folder,
        6000,
        guarantee=TRUE,
        expected=200.0,
        secret=Secret(seed.to_bytes(32, "big")),
    )
    if mutant == "noise divided by the cohort":
        private.lattice = dataclasses.replace(private.lattice, most=private.lattice.most)
        private._noise = RoundedGaussian(private.lattice.deviation // 14)
    if mutant == "no clip":
        private.lattice = dataclasses.replace(private.lattice, clip=1e9, most=1e12)

    def release(round: int, present: Sequence[tuple[int, Tree]]) -> Tree:
        if mutant == "clip after noise":
            total = torch.stack([tree["change"] for _, tree in present]).sum(0)
            words = private.secret.words(12_000, "noise", round=round)
            noise = torch.from_numpy(RoundedGaussian(4096).draw(words)) / 4096 * 6.6
            return {"change": ((total + noise) / max(1.0, float(total.norm()) / 200)).double()}
        if mutant == "clip of the share":  # x / n is always short enough
            present = [(i, {"change": tree["change"] / 200}) for i, tree in present]
            messages = [private.encode(tree, i, round, 1) for i, tree in present]
            mean = private.release(messages, round, 1)["change"]
            noise = mean - sum(m["change"] for m in messages) * private.lattice.unit / 200
            # undone by whoever thinks that the clip was of x: noise too small by the cohort
            return {"change": sum(t["change"] for _, t in present) * 200 / 200 + noise / 200}
        messages = [private.encode(tree, i, round, 1) for i, tree in present]
        released = private.release(messages, round, 1)["change"]
        if mutant == "noise from the seed":  # which an attacker has, and takes away
            words = private.secret.words(12_000, "noise", round=round, call=1)
            noise = torch.from_numpy(private._noise.draw(words))
            released = released - noise * private.lattice.unit / 200
        return {"change": released}

    longer = 5.0 if mutant in ("no clip", "clip after noise") else 1.0
    return audit_sums(release, seed=seed, length=longer, **AUDIT).epsilon  # type: ignore[arg-type]


def test_the_channel_audit_stays_below_half_of_epsilon(tmp_path: Path) -> None:
    epsilon = TRUE.epsilon(10)
    assert epsilon == pytest.approx(1.9, rel=0.01)
    assert bound(tmp_path, seed=1) < epsilon / 2


@pytest.mark.parametrize(
    "mutant",
    [
        "noise divided by the cohort",
        "no clip",
        pytest.param("clip after noise", marks=SLOW),
        pytest.param("clip of the share", marks=SLOW),
        "noise from the seed",
    ],
)
def test_the_channel_audit_convicts_a_mistake(mutant: str, tmp_path: Path) -> None:
    assert bound(tmp_path, mutant) > TRUE.epsilon(10)


def test_a_bound_needs_guesses_that_are_right() -> None:
    rng = np.random.default_rng(0)
    was_in = rng.random(500) < 0.5
    assert lower_bound(rng.normal(size=500), was_in, 1e-5).epsilon < 0.5
    all_right = lower_bound(was_in.astype(float), was_in, 1e-5)
    assert all_right.right == all_right.guesses
    assert 3.5 < all_right.epsilon < 5.2
    assert json.dumps(dataclasses.asdict(all_right))


NO_AGGREGATE = ("ffa-lora", "fedbuff", "fedopt", "fedsa-lora", "feddpo-stale", "scaffold")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("fedpdpo", "scaffold") else SLOW)
        for name in (
            "feddpo",
            "fedprox",
            "fedopt",
            "ffa-lora",
            "ditto",
            "fedper",
            "feddpa",
            "fedpdpo",
            "fedsa-lora",
            "feddpo-stale",
            "fedbuff",
            "scaffold",
            "firm",
            "scalarized",
        )
    ],
)
def test_every_algorithm_that_may_runs_privately(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    spec = private_spec(
        settings,
        tmp_path,
        algorithm={
            "name": name,
            "local": settings["algorithm"]["local"],
            **({} if name in NO_AGGREGATE else {"aggregate": {"name": "frozen-a"}}),
        },
        privacy={"noise_multiplier": 2.0, "delta": 0.01},
        rounds=2,
    )
    path = run(spec, tmp_path / "run").path
    spent = [row["epsilon"] for row in RunDirectory(path).read_rows("metrics.jsonl")]
    assert 0 < spent[0] < spent[1]
    ledger = Ledger.at(path / "privacy")
    assert ledger.charged == (4 if name == "scaffold" else 2)
    # two sums of one cohort cost what one sum with less noise costs
    assert ledger.rounds == [(2.0, 0.25), (2.0, 0.25)]


def test_several_sums_of_a_round_cost_together_what_was_planned(tmp_path: Path) -> None:
    private = sums(tmp_path, sums=2)
    assert private.noise_multiplier == pytest.approx(math.sqrt(2))
    for call in (1, 2):
        private.release([private.encode(change(seed=call), 0, 0, call)], 0, call)
    assert private.ledger.charged == 2
    assert private.epsilon == pytest.approx(private.guarantee.epsilon(1))
    # the same value again is free, another one is not
    private.release([private.encode(change(seed=1), 0, 0, 1)], 0, 1)
    assert private.ledger.charged == 2
    private.release([private.encode(change(seed=9), 0, 0, 1)], 0, 1)
    assert private.epsilon > private.guarantee.epsilon(1)


def test_who_takes_part_in_few_rounds_has_paid_for_no_more(tmp_path: Path) -> None:
    private = sums(tmp_path, most=2, budget=None)
    for round in range(4):
        private.release([private.encode(change(seed=round), 0, round, 1)], round, 1)
    assert private.ledger.charged == 4
    assert private.epsilon == pytest.approx(private.guarantee.epsilon(2))


def test_rounds_without_a_client_count_where_chance_hides_it(tmp_path: Path) -> None:
    by_chance = Ledger(tmp_path / "a").with_one(4, 1, (1.0, 0.1))
    assert by_chance.rounds_so_far == [(1.0, 0.1)] * 5
    always = Ledger(tmp_path / "b").with_one(4, 1, (1.0, 1.0))
    assert always.rounds_so_far == [(1.0, 1.0)]
    assert Ledger(tmp_path / "c").rounds_so_far == []


# ---- a clip that follows a quantile


def test_a_clip_follows_the_quantile_it_is_told(tmp_path: Path) -> None:
    clip = QuantileClip(quantile=0.5, start=8.0, rate=0.5, count_noise=0.02)
    private = sums(tmp_path, clip=clip, expected=200.0)
    lengths = np.linspace(0.5, 1.5, 200)
    for round in range(25):
        messages = (
            private.encode(change(length=float(length), seed=i), i, round, 1)
            for i, length in enumerate(lengths)
        )
        mean = private.release(messages, round, 1)
        assert set(mean) == {"change"}, "the number beside it is nobody's"
    assert private.norm == pytest.approx(1.0, abs=0.1)
    assert private.figures["clip_norm"] == private.norm
    assert private.figures["clipped"] == pytest.approx(0.5, abs=0.15)
    again = sums(tmp_path, clip=clip, expected=200.0)
    again.resume(private.figures)
    assert again.lattice == private.lattice


def test_a_count_beside_a_change_costs_a_little_noise_on_it(tmp_path: Path) -> None:
    # 20 clients: noise of one client on the count takes some of what the change has
    private = sums(tmp_path, clip=QuantileClip(count_noise=0.05), expected=20.0)
    on_change = private.lattice.deviation * private.lattice.unit
    # (z^-2 - (2 * 1)^-2)^-1/2 of one
    assert on_change == pytest.approx((1 - 0.25) ** -0.5, rel=0.02)
    longest = private.lattice.most * private.lattice.unit
    assert on_change / longest == pytest.approx(1.0), "of the whole, as the accountant has it"
    for length in (0.3, 5.0):
        message = private.encode(change(length=length), 0, 0, 1)
        squares = sum(float(t.double().square().sum()) for t in message.values())
        assert squares**0.5 <= private.lattice.most
    with pytest.raises(UserError, match="is less noise than 1 clips leave"):
        sums(tmp_path, clip=QuantileClip(count_noise=0.01), expected=20.0)


@pytest.mark.long
def test_a_run_whose_clip_follows_goes_on_where_it_was(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    privacy = {"noise_multiplier": 0.5, "delta": 0.01, "clip": {"name": "quantile", "start": 5.0}}
    privacy["clip"] |= {"count_noise": 0.3}  # type: ignore[operator]
    spec = private_spec(settings, tmp_path, privacy=privacy, federation={"weighting": "equal"})
    leave(spec, tmp_path / "run", 4)
    before = RunDirectory(tmp_path / "run").read_rows("metrics.jsonl")
    path = resume(tmp_path / "run").path
    rows = RunDirectory(path).read_rows("metrics.jsonl")
    norms = [row["clip_norm"] for row in rows]
    assert rows[: len(before)] == before
    assert norms[0] != 5.0
    assert len(set(norms)) == 5
    assert Ledger.at(path / "privacy").charged == 5, "nothing was charged twice"


@pytest.mark.parametrize(
    "made",
    [
        lambda: Guarantee.of(1000.0, 1e-5, 1.0, 1),
        lambda: Guarantee.of_discrete(1000.0, 1e-5, 1),
        lambda: Guarantee(1e-4, 1.0, 1e-5, 0.0).epsilon(1),
        lambda: Guarantee(0.05, 1.0, 1e-5, 0.0).epsilon(100),
    ],
)
def test_promises_of_nothing_are_a_sentence(made: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match="promises nothing"):
        made()


def test_noise_that_is_too_little_to_be_accounted_for_is_refused() -> None:
    with pytest.raises(UserError, match=r"less than 0.1 clips"):
        Guarantee(0.05, 0.1, 1e-5, 0.0).epsilon(10)
    # where the exact loss is not computed any more the bound is above it, by little
    exact, bound = (Guarantee(z, 1.0, 1e-5, 0.0).epsilon(1) for z in (1 / 19.9, 1 / 20.1))
    assert 1.0 < bound / exact < 1.1


def test_noise_for_next_to_no_loss_is_found() -> None:
    found = Guarantee.of(0.001, 1e-3, 1.0, 1)
    assert 0 < found.epsilon(1) <= 0.001


def test_a_clip_that_follows_a_quantile_stays_a_number(tmp_path: Path) -> None:
    private = sums(tmp_path, clip=QuantileClip(rate=10.0, count_noise=5.0), expected=20.0)
    for short in (1e6, -1e6):
        private._follow(short)
        assert 0 < private.norm < float("inf")
