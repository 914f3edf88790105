"""Intervals of means over clients and seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from fedpref.numerics.agreement import krippendorff_alpha
from fedpref.numerics.intervals import incomplete_beta, interval, share, student, why_none


@pytest.mark.parametrize("a", [0.5, 1.0, 2.7, 13.0, 120.0])
@pytest.mark.parametrize("b", [0.5, 1.0, 3.5, 40.0])
def test_the_incomplete_beta_function_is_scipys(a: float, b: float) -> None:
    for x in (0.0, 1e-9, 0.01, 0.3, 0.5, 0.77, 0.99, 1 - 1e-12, 1.0):
        assert incomplete_beta(a, b, x) == pytest.approx(
            float(special.betainc(a, b, x)), rel=1e-9, abs=1e-13
        )


@pytest.mark.parametrize("a", [3e3, 4e4, 5e5])
def test_the_incomplete_beta_function_is_scipys_of_many_clients_too(a: float) -> None:
    for b in (1.0, 7.5, a / 3, 2 * a):
        middle, width = a / (a + b), math.sqrt(a * b / (a + b + 1)) / (a + b)
        for x in (middle - 2 * width, middle, middle + 0.5 * width):
            expected = float(special.betainc(a, b, x))
            assert incomplete_beta(a, b, x) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("free", [1.0, 1.7, 2.0, 5.5, 30.0, 400.0])
@pytest.mark.parametrize("coverage", [0.5, 0.95, 0.999])
def test_the_quantile_is_students(free: float, coverage: float) -> None:
    assert student(free, coverage) == pytest.approx(stats.t.ppf((1 + coverage) / 2, free), rel=1e-8)


def test_one_seed_or_clients_of_each_seed_are_students_interval() -> None:
    values = np.random.default_rng(0).normal(size=(5, 9))
    theirs = stats.t.interval(0.95, 8, values[0].mean(), stats.sem(values[0]))
    assert interval(values[:1]) == pytest.approx(theirs)
    means = values.mean(1)
    theirs = stats.t.interval(0.95, 4, means.mean(), stats.sem(means))
    assert interval(values, crossed=False) == pytest.approx(theirs)
    assert interval(values[:, :1]) == pytest.approx(
        stats.t.interval(0.95, 4, values[:, 0].mean(), stats.sem(values[:, 0]))
    )


def test_where_seeds_alone_vary_they_are_the_draws() -> None:
    seeds = np.array([1.0, 2.0, 4.0])
    values = np.repeat(seeds[:, None], 12, 1)
    theirs = stats.t.interval(0.95, 2, seeds.mean(), stats.sem(seeds))
    assert interval(values) == pytest.approx(theirs)
    clients = np.repeat(np.arange(6.0)[None], 3, 0)
    theirs = stats.t.interval(0.95, 5, 2.5, stats.sem(clients[0]))
    assert interval(clients) == pytest.approx(theirs)


def test_where_neither_is_seen_to_vary_all_are_draws() -> None:
    values = np.random.default_rng(4).normal(size=(4, 20))
    values -= values.mean(1, keepdims=True)  # seeds, and clients, vary less than by chance
    values -= values.mean(0, keepdims=True)
    low, high = interval(values)
    squares = (values**2).sum()
    half = stats.t.ppf(0.975, 79) * math.sqrt(squares / 79 / 80)
    assert (low, high) == pytest.approx((-half, half))


def test_the_interval_of_both_is_satterthwaites() -> None:
    rng = np.random.default_rng(7)
    values = 3 * rng.normal(size=(5, 1)) + 2 * rng.normal(size=(1, 8)) + rng.normal(size=(5, 8))
    mean, rows, columns = values.mean(), values.mean(1), values.mean(0)
    a = 8 * rows.var(ddof=1)
    b = 5 * columns.var(ddof=1)
    e = ((values - rows[:, None] - columns + mean) ** 2).sum() / 28
    free = (a + b - e) ** 2 / (a**2 / 4 + b**2 / 7 + e**2 / 28)
    free = min(free, 4 if a > b else 7)  # those of whichever varies most
    half = stats.t.ppf(0.975, free) * math.sqrt((a + b - e) / 40)
    assert interval(values) == pytest.approx((mean - half, mean + half))


def test_there_is_none_where_there_are_too_few_or_nothing_varies() -> None:
    rng = np.random.default_rng(0)
    for shape, crossed in (((1, 2), True), ((1, 1), True), ((2, 12), True), ((2, 12), False)):
        assert all(map(math.isnan, interval(rng.normal(size=shape), crossed=crossed)))
    assert all(map(math.isnan, interval(np.ones((1, 5)))))
    assert all(map(math.isnan, interval(np.ones((3, 5)))))
    assert "two seeds" in why_none(2, 12)
    assert "2 clients" in why_none(1, 2)
    assert not why_none(1, 3)
    assert not why_none(3, 1)


@pytest.mark.parametrize("spread", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (3, 1, 3)])
def test_it_holds_the_mean_as_often_as_it_says(spread: tuple[float, float, float]) -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        values = spread[0] * rng.normal(size=(3, 1)) + spread[1] * rng.normal(size=(1, 6))
        low, high = interval(values + spread[2] * rng.normal(size=(3, 6)))
        held += low <= 0 <= high
    assert 356 <= held <= 396  # 89 to 99 %: 95 give or take the luck of 400


def test_alpha_is_krippendorffs_own_example() -> None:
    """Computing Krippendorff's alpha-reliability (2011), nominal data of four observers."""
    rows = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    found = krippendorff_alpha(
        [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    )
    assert found == pytest.approx(0.743, abs=5e-4)
    assert math.isnan(krippendorff_alpha([[1], [2, 2], [2, 2]]))
    assert krippendorff_alpha([[1, 1], [2, 2]]) == 1


def test_an_exact_interval_of_a_share_is_scipys() -> None:
    for successes, count in [(0, 4), (4, 4), (1, 7), (31, 40), (500, 1000)]:
        wanted = stats.binomtest(successes, count).proportion_ci(method="exact")
        assert share(successes, count) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert share(0, 0) == (0.0, 1.0)
