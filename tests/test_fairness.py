"""How evenly clients fare: what luck does to it, and what is left when it is taken out."""

from __future__ import annotations

import numpy as np
import pytest

from fedpref.numerics.fairness import fairness
from fedpref.reports.paired import errors, gain


def test_clients_who_do_not_differ_are_not_made_to() -> None:
    rng = np.random.default_rng(3)
    measured = 60 + 5 * rng.normal(size=40)
    found = fairness(list(measured), [5.0] * 40)
    assert found is not None
    assert found.std[0] < 0.5 < measured.std(), "all that is seen is luck"
    assert measured.min() < found.worst[0] < found.worst[1] < 62


def test_what_is_measured_well_stands_as_it_is() -> None:
    measured = [40.0, 55.0, 61.0, 70.0]
    found = fairness(measured, [0.01] * 4)
    assert found is not None
    assert found.worst == pytest.approx((40, 40), abs=0.1)
    assert found.worst_decile == found.worst
    assert found.std == pytest.approx((np.std(measured, ddof=1),) * 2, abs=0.1)
    losses = fairness(measured, [0.01] * 4, low_is_good=True)
    assert losses is not None
    assert losses.worst == pytest.approx((70, 70), abs=0.1)
    gains = fairness([-3.0, -2.0, 5.0, 6.0], [0.01] * 4)
    assert gains is not None
    assert gains.harmed == (0.5, 0.5)


def test_nothing_is_said_of_two_clients_or_without_errors() -> None:
    assert fairness([1.0, 2.0], [1.0, 1.0]) is None
    assert fairness([1.0, 2.0, 3.0], [1.0, 0.0, 1.0]) is None
    assert fairness([1.0, 2.0, 3.0], [1.0, float("nan"), 1.0]) is None
    assert fairness([1.0, float("nan"), 3.0], [1.0, 1.0, 1.0]) is None


@pytest.mark.parametrize(("clients", "between"), [(6, 0.0), (12, 5.0), (12, 12.0)])
def test_intervals_hold_what_they_are_about(clients: int, between: float) -> None:
    rng = np.random.default_rng(clients)
    times, held = 200, np.zeros(3)
    for _ in range(times):
        own = 60 + between * rng.normal(size=clients)
        found = fairness(list(own + 5 * rng.normal(size=clients)), [5.0] * clients)
        assert found is not None
        low_enough = np.sort(own)[: -(-clients // 10)].mean()
        for k, (truth, (low, high)) in enumerate(
            zip(
                (own.min(), low_enough, own.std(ddof=1)),
                (found.worst, found.worst_decile, found.std),
                strict=True,
            )
        ):
            held[k] += low <= truth <= high
    assert (held / times > 0.88).all(), held / times  # four standard errors below 0.95


def test_a_prompt_that_many_pairs_share_is_one_piece_of_evidence() -> None:
    apart = {"a": [(f"p{i}", float(i % 2)) for i in range(40)]}
    shared = {"a": [(f"p{i % 8}", float(i % 8 < 4)) for i in range(40)]}
    assert errors(apart)["a"] == pytest.approx(100 * (0.25 / 40) ** 0.5, rel=0.02)
    assert errors(shared)["a"] > 2 * errors(apart)["a"]
    assert errors({"a": [("p", 1.0)] * 40}) == {}, "one prompt says nothing of others"
    certain = errors({"a": [(f"p{i}", 1.0) for i in range(40)]})["a"]
    assert 0 < certain < 3, "all right is not certain"


def test_a_client_who_neither_gains_nor_loses_is_not_certain_either() -> None:
    same = {name: [(f"p{i}", 1.0) for i in range(50)] for name in "abc"}
    found = gain(same, same)
    assert found is not None
    assert found.mean == 0 < found.error < 3
    assert all(0 < error < 3 for error in found.errors.values())
    assert found.harmed is not None
