"""Bradley-Terry regressions: which of two answers is preferred, from the difference of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

PENALTIES = tuple(10.0**power for power in (-2, -1, 0, 1, 2, 3))
FOLDS = 5
FEW = 1000  # features, of which principal axes are soon found
SPARSE = 0.1  # share of features that are not zero, below which the others are not multiplied
Matrix = Float[Tensor, "n D"]


@dataclass(frozen=True)
class Differences:
    """One client's pairs.

    Attributes:
        train: Features of the preferred answer less those of the other [n, D].
        prompts: What tells each training pair's prompt, by which folds are made.
        test: The same of held-out pairs.
    """

    train: Matrix
    prompts: Sequence[str]
    test: Matrix


@torch.no_grad()
def fit(
    x: Matrix, penalties: Sequence[float], offset: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "D L"]:
    """Return the weights of logistic regressions through the origin, one for each penalty.

    Each minimises sum log(1 + exp(-(offset + x w))) + penalty / 2 |w|^2, by L-BFGS.

    Args:
        x: Rows are differences of features; the first answer is the preferred one.
        penalties: Their squares' weights.
        offset: Margins that are there already.
    """
    if not len(x):
        return torch.zeros(x.shape[1], len(penalties), dtype=x.dtype)
    # principal axes where rows are few: of many they take longer than they save
    basis = _axes(x) if 4 * len(x) < x.shape[1] or x.shape[1] <= FEW else None
    if basis is not None and not basis.shape[1]:  # no pair differs in anything
        return torch.zeros(x.shape[1], len(penalties), dtype=x.dtype)
    z = x if basis is None else x @ basis
    weight = torch.tensor(penalties, dtype=x.dtype)
    # in these units the loss is about as curved along each feature, whatever the penalty
    unit = (z.square().sum(0)[:, None] / 4 + weight).rsqrt()
    # most words are in no pair
    is_sparse = int(z.count_nonzero()) < SPARSE * z.numel()
    rows, columns = (m.to_sparse() if is_sparse else m for m in (z, z.T.contiguous()))
    v = torch.zeros_like(unit)
    v.grad = torch.zeros_like(unit)
    optimiser = torch.optim.LBFGS(
        [v], max_iter=100, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )
    start = 0.0 if offset is None else offset[:, None]

    def loss() -> Tensor:
        w = unit * v
        margin = start + rows @ w
        v.grad = unit * (weight * w - columns @ torch.sigmoid(-margin))
        return (_lost(margin).sum(0) + weight / 2 * w.square().sum(0)).sum()

    optimiser.step(loss)
    w = unit * v
    return w if basis is None else basis @ w


def _axes(x: Matrix) -> Float[Tensor, "D r"]:
    """Return the directions in which rows differ, at right angles."""
    if len(x) >= x.shape[1]:
        axes: Tensor = torch.linalg.eigh(x.T @ x)[1]
        return axes
    values, vectors = torch.linalg.eigh(x @ x.T)
    seen = values > values[-1] * 1e-12
    spanned: Tensor = x.T @ vectors[:, seen] / values[seen].sqrt()
    return spanned


def folds(prompts: Sequence[str]) -> Tensor:
    """Return each pair's fold [n]; pairs of one prompt are in one."""
    number = {prompt: k % FOLDS for k, prompt in enumerate(sorted(set(prompts)))}
    return torch.tensor([number[prompt] for prompt in prompts])


def best(lost: Float[Tensor, " L"]) -> int:
    """Return the penalty with the least held-out loss; of equal ones the largest."""
    return len(lost) - 1 - int(lost.flip(0).argmin())


def margins(
    clients: Mapping[str, Differences], penalties: Sequence[float] = PENALTIES
) -> dict[str, dict[str, Float[Tensor, " m"]]]:
    """Return margins of held-out pairs, by kind and client; a pair is ranked rightly above zero.

    Kinds are `alone`, a regression for each client on its own pairs; `pooled`, one for all; and
    `personal`, the pooled one with a client's own slopes on top. Penalties are chosen by the
    log-loss of five folds of the training prompts: each client's own for `alone`, one for all
    clients' slopes.
    """
    rows = [one.train.double() for one in clients.values()]
    # features of any unit: the length of a usual row is one
    scale = torch.cat(rows).square().sum(1).mean().sqrt().clamp(min=1e-12)
    clients = {
        name: Differences(x / scale, one.prompts, one.test.double() / scale)
        for (name, one), x in zip(clients.items(), rows, strict=True)
    }
    whole = torch.cat([one.train for one in clients.values()])
    fold = folds([prompt for one in clients.values() for prompt in one.prompts])
    parts = torch.tensor([len(one.train) for one in clients.values()])
    owner = torch.repeat_interleave(torch.arange(len(parts)), parts)

    alone = {name: _alone(one, penalties) for name, one in clients.items()}
    without = [fit(whole[fold != k], penalties) for k in range(FOLDS)]
    lost = sum(
        (_lost(whole[fold == k] @ w).sum(0) for k, w in enumerate(without)),
        torch.zeros(len(penalties), dtype=whole.dtype),
    )
    chosen = best(lost)
    shared = fit(whole, penalties)[:, chosen]
    # slopes of each client on what the pooled regression leaves, which has not seen the fold either
    slopes = torch.zeros(len(penalties), dtype=whole.dtype)
    for k, w in enumerate(without):
        for c in range(len(parts)):
            seen, left = (owner == c) & (fold != k), (owner == c) & (fold == k)
            own = fit(whole[seen], penalties, whole[seen] @ w[:, chosen])
            slopes += _lost(whole[left] @ (w[:, chosen, None] + own)).sum(0)
    # no slopes at all are a penalty without bound
    none = lost[chosen]
    penalty = penalties[best(slopes)] if slopes.min() < none else None
    personal = {}
    for name, one in clients.items():
        own = (
            torch.zeros_like(shared)
            if penalty is None
            else fit(one.train, [penalty], one.train @ shared)[:, 0]
        )
        personal[name] = one.test @ (shared + own)
    return {
        "alone": alone,
        "pooled": {name: one.test @ shared for name, one in clients.items()},
        "personal": personal,
    }


def _alone(one: Differences, penalties: Sequence[float]) -> Float[Tensor, " m"]:
    fold = folds(one.prompts)
    lost = torch.zeros(len(penalties), dtype=one.train.dtype)
    for k in range(FOLDS):
        lost += _lost(one.train[fold == k] @ fit(one.train[fold != k], penalties)).sum(0)
    return one.test @ fit(one.train, [penalties[best(lost)]])[:, 0]


def _lost(margin: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-margin)
