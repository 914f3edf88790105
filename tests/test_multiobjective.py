"""Weights of conflicting objectives: conditions of optimality, limits, and bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpref.errors import UserError
from fedpref.federation.objectives import preferred
from fedpref.numerics.min_norm import MinNorm, onto_simplex, projected_descent, stationarity

CASES = [(number, count) for number in range(40) for count in (2, 3, 5)]


def gradients(seed: int, count: int, dimensions: int = 8) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=rng, dtype=torch.float64) + torch.randn(
        dimensions, generator=rng, dtype=torch.float64
    )


def drawn(seed: int, count: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.dirichlet(np.ones(count)))


def equal(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


@pytest.mark.parametrize("form", ["distance", "share"])
@pytest.mark.parametrize("b", [0.0, 0.03, 1.0])
def test_no_other_weights_are_better(form: str, b: float) -> None:
    for seed, count in CASES:
        g, p = gradients(seed, count), drawn(seed, count)
        q = g @ g.T
        w = MinNorm(b=b, preference=form, normalize=False)(q, p)  # type: ignore[arg-type]
        assert w.min() >= 0
        assert w.sum() == pytest.approx(1)
        slope = q @ w + (b * (w - p) if form == "distance" else b * w / p)
        scale = float(q.diag().max())
        assert (slope[w > 1e-9] - slope.min()).abs().max() < 1e-7 * scale, (
            "all objectives in use have the same, lowest slope"
        )


def test_two_objectives_have_the_closed_form() -> None:
    for seed in range(100):
        g = gradients(seed, 2)
        q = g @ g.T
        for b in (0.0, 0.1, 10.0):
            first = float(
                ((q[1, 1] - q[0, 1] + b) / (q[0, 0] + q[1, 1] - 2 * q[0, 1] + 2 * b)).clamp(0, 1)
            )
            assert MinNorm(b=b, normalize=False)(q, equal(2)).tolist() == pytest.approx(
                [first, 1 - first], abs=1e-9
            )


def test_a_weak_regulariser_gives_mgda_and_a_strong_one_the_preference() -> None:
    for seed in range(20):
        q, p = gradients(seed, 3) @ gradients(seed, 3).T, drawn(seed, 3)
        mgda = MinNorm(b=0.0)(q, p)
        for form in ("distance", "share"):
            assert MinNorm(b=1e-9, preference=form)(q, p).tolist() == pytest.approx(
                mgda.tolist(), abs=1e-5
            )  # type: ignore[arg-type]
            assert MinNorm(b=1e9, preference=form)(q, p).tolist() == pytest.approx(
                p.tolist(), abs=1e-5
            )  # type: ignore[arg-type]
        assert torch.equal(mgda, MinNorm(b=0.0)(q, equal(3)))


def test_common_ascent_holds_but_for_what_the_regulariser_costs() -> None:
    for seed, count in CASES:
        g = gradients(seed, count)
        q = g @ g.T
        for b in (0.0, 0.3):
            w = MinNorm(b=b, normalize=False)(q, equal(count))
            direction = w @ g
            slack = (direction @ direction) + b * ((w @ w) - w)
            assert ((g @ direction) - slack).min() > -1e-7 * float(q.diag().max())


def test_weights_move_no_more_than_the_gradients_do() -> None:
    """|w(Q1) - w(Q2)| <= |(Q1 - Q2) w(Q2)| / b: clients that see noise still choose alike."""
    for seed in range(300):
        g, noise = gradients(seed, 3), 0.3 * gradients(seed + 1000, 3)
        q1, q2 = g @ g.T, (g + noise) @ (g + noise).T
        for b in (0.1, 1.0):
            w1, w2 = (MinNorm(b=b, normalize=False)(q, equal(3)) for q in (q1, q2))
            assert (w1 - w2).norm() <= ((q1 - q2) @ w2).norm() / b + 1e-9


def test_the_regulariser_costs_at_most_its_bound() -> None:
    for seed, count in CASES:
        q = gradients(seed, count) @ gradients(seed, count).T
        for b in (0.01, 1.0):
            w = MinNorm(b=b, normalize=False)(q, equal(count))
            assert 0 <= float(w @ q @ w) - stationarity(q) + 1e-9 <= b * (1 - 1 / count) + 1e-8


def test_gradients_of_any_length_give_the_same_weights() -> None:
    q = gradients(0, 3) @ gradients(0, 3).T
    for form in ("distance", "share", "gradients"):
        settings = MinNorm(b=0.5, preference=form)  # type: ignore[arg-type]
        expected = settings(q, drawn(1, 3))
        for factor in (1e-12, 1e12):
            assert settings(factor * q, drawn(1, 3)).tolist() == pytest.approx(
                expected.tolist(), abs=1e-9
            )
    assert MinNorm(normalize=False)(1e-6 * q, drawn(1, 3)).tolist() != pytest.approx(
        expected.tolist(), abs=1e-3
    )


def test_what_nobody_prefers_has_no_weight() -> None:
    q, p = gradients(2, 3) @ gradients(2, 3).T, torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    for form in ("share", "gradients"):
        assert MinNorm(b=0.1, preference=form)(q, p)[0] == 0  # type: ignore[arg-type]
    alone = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert MinNorm(b=0.1, preference="gradients")(q, alone).tolist() == [0, 1, 0]


def test_where_nothing_pulls_the_preference_decides() -> None:
    p = torch.tensor([0.8, 0.2])
    for form in ("distance", "share", "gradients"):
        assert torch.equal(MinNorm(b=0.0, preference=form)(torch.zeros(2, 2), p), p)  # type: ignore[arg-type]


def test_projected_steps_come_to_the_same_weights() -> None:
    for seed in range(10):
        q = gradients(seed, 3) @ gradients(seed, 3).T
        q = q / q.diag().mean()
        assert projected_descent(q, equal(3), 0.05, 4000).tolist() == pytest.approx(
            MinNorm(b=0.0)(q, equal(3)).tolist(), abs=1e-4
        )


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        point = rng.normal(size=4)
        nearest = onto_simplex(point)
        assert nearest.min() >= 0
        assert nearest.sum() == pytest.approx(1)
        others = rng.dirichlet(np.ones(4), 200)
        assert np.linalg.norm(point - nearest) <= np.linalg.norm(point - others, axis=1).min()


def test_a_point_is_stationary_where_gradients_oppose_one_another() -> None:
    g = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    assert stationarity(g @ g.T) == pytest.approx(0, abs=1e-9)
    assert stationarity(torch.eye(2)) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_no_numbers_leave_weights_as_they_are(bad: float) -> None:
    even = torch.tensor([0.5, 0.5])
    for gram in (torch.tensor([[bad, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, bad], [bad, 1.0]])):
        assert torch.equal(MinNorm()(gram, even), even)
        assert torch.equal(projected_descent(gram, even, 0.1, 3), even)


@pytest.mark.parametrize(
    ("solver", "preference"),
    [
        (MinNorm(preference="share"), [1e-320, 1.0]),
        (MinNorm(preference="share", b=1e308), [0.001, 0.999]),
        (MinNorm(b=1e308), [0.5, 0.5]),
        (MinNorm(preference="gradients", b=1e308), [0.5, 0.5]),
    ],
)
def test_a_regulariser_beyond_numbers_leaves_the_preference(
    solver: MinNorm, preference: list[float]
) -> None:
    wanted = torch.tensor(preference, dtype=torch.float64)
    found = solver(torch.tensor([[1.0, -0.5], [-0.5, 2.0]]), wanted)
    assert torch.allclose(found, wanted, atol=1e-3)


def test_steps_beyond_numbers_leave_the_first_weights() -> None:
    start = torch.tensor([0.3, 0.7], dtype=torch.float64)
    gram = torch.tensor([[1e10, 0.0], [0.0, 1.0]])
    assert projected_descent(gram, start, 1e300, 3).tolist() == start.tolist()


def test_large_and_small_numbers_are_shares_too() -> None:
    for number in (1e308, 1e-320):
        found = preferred([number, number], ("a", "b"), "preference")
        assert found.tolist() == [0.5, 0.5]
    with pytest.raises(UserError, match="not negative and not all zero"):
        preferred([math.inf, 1.0], ("a", "b"), "preference")
