"""Bradley-Terry regressions on differences of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fedpref.numerics.bradley_terry import FOLDS, Differences, best, fit, folds, margins


@pytest.mark.parametrize(("rows", "features"), [(80, 7), (20, 300), (60, 1200), (300, 1100)])
def test_a_fit_is_scikit_learns(rows: int, features: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, features)) / features**0.5
    # of pairs the preferred one comes first: theirs are turned at random, and mean the same
    turned = rng.choice([-1.0, 1.0], size=rows)
    penalties = (0.1, 1.0, 30.0)
    ours = fit(torch.tensor(x), penalties)
    for k, penalty in enumerate(penalties):
        theirs = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=5000)
        theirs.fit(x * turned[:, None], turned)
        assert np.allclose(ours[:, k], theirs.coef_[0], atol=2e-3 * np.abs(theirs.coef_).max())


def test_a_fit_starts_from_the_margins_that_are_there() -> None:
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    own = fit(x, [0.5], x @ shared)[:, 0].requires_grad_()
    loss = torch.nn.functional.softplus(-(x @ (shared + own))).sum() + 0.25 * (own**2).sum()
    (gradient,) = torch.autograd.grad(loss, own)
    assert float(gradient.abs().max()) < 1e-3
    assert not fit(x[:0], [1.0, 2.0]).any()


def test_pairs_of_one_prompt_are_in_one_fold() -> None:
    prompts = [f"p{k % 7}" for k in range(40)]
    found = folds(prompts).tolist()
    assert set(found) == set(range(FOLDS))
    assert len({(p, f) for p, f in zip(prompts, found, strict=True)}) == 7


def test_of_equal_penalties_the_largest_is_taken() -> None:
    assert best(torch.tensor([2.0, 1.0, 1.0, 3.0])) == 2


def _clients(own: float, count: int = 6, pairs: int = 60) -> dict[str, Differences]:
    rng = torch.Generator().manual_seed(3)
    shared = 3 * torch.randn(8, generator=rng)
    clients = {}
    for k in range(count):
        taste = shared + own * torch.randn(8, generator=rng)
        x = torch.randn(2 * pairs, 8, generator=rng)
        turned = torch.sign(x @ taste)[:, None] * x
        prompts = [f"{k}-{j}" for j in range(pairs)]
        clients[str(k)] = Differences(turned[:pairs], prompts, turned[pairs:])
    return clients


def _right(by: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(margin > 0).double() for margin in by.values()]).mean())


def test_clients_of_one_taste_are_served_by_one_regression_and_others_by_their_own() -> None:
    one = {kind: _right(by) for kind, by in margins(_clients(0.0)).items()}
    assert one["pooled"] > 0.97
    assert one["personal"] >= one["pooled"] - 0.01
    assert one["pooled"] > one["alone"]
    many = {kind: _right(by) for kind, by in margins(_clients(8.0)).items()}
    assert many["pooled"] < 0.75
    assert min(many["alone"], many["personal"]) > many["pooled"] + 0.1


def test_the_unit_of_features_does_not_matter() -> None:
    clients = _clients(1.0, count=2, pairs=20)
    larger = {
        name: Differences(1000 * one.train, one.prompts, 1000 * one.test)
        for name, one in clients.items()
    }
    ours, theirs = margins(clients), margins(larger)
    for kind, by in ours.items():
        for name, margin in by.items():
            assert torch.allclose(margin, theirs[kind][name], rtol=1e-3, atol=1e-5)


def test_pairs_that_differ_in_nothing_say_nothing() -> None:
    assert fit(torch.zeros(3, 100).double(), [0.1, 1.0]).tolist() == [[0.0, 0.0]] * 100


def test_a_client_with_a_single_pair_has_a_regression() -> None:
    clients = _clients(1.0, count=2, pairs=10)
    one = clients["0"]
    clients["0"] = Differences(one.train[:1], one.prompts[:1], one.test)
    assert all(len(by["0"]) == 10 for by in margins(clients).values())
