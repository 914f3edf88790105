"""Weights of conflicting objectives: min-norm problems over the Gram matrix of their gradients.

With weights w of a min-norm problem, a step along sum_j w_j g_j makes no objective worse to first
order (MGDA: Désidéri 2012).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fedpref.errors import require
from fedpref.types import NonNegative

LARGE, FAR = 1e150, 1e8  # numbers beyond which squares, or sums beside one, are not computed

Gram = Float[Tensor, "M M"]
Weights = Float[Tensor, " M"]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MinNorm:
    """The weights w >= 0 of sum one that minimise (1/2) |sum_j w_j g_j|^2 + R(w).

    For a preference p over objectives, `distance`: R = (b/2) |w - p|^2, which for b = 0 is MGDA and
    for b to infinity gives p. `share`: R = (b/2) sum_j w_j^2 / p_j, with the same limit; an
    objective of p_j = 0 gets nothing. `gradients`: R = (b/2) |w|^2 over gradients p_j g_j, whose
    weights p_j w_j are brought to a sum of one: without R an objective counts for less the more it
    is preferred, since the shorter gradient weighs more, and for more only from b of about 0.5.
    With equal preferences the first two differ from (b/2) |w|^2 by a constant or a factor M of b.
    FIRM (arXiv 2511.16992) has a regulariser and preferences; these forms of them are ours.
    """

    b: NonNegative = 0.1
    """The strength of the regulariser; 0 is MGDA."""
    preference: Literal["distance", "share", "gradients"] = "distance"
    """How a preference over objectives enters: see the forms of R above."""
    normalize: bool = True
    """Divide the Gram matrix by the mean of its diagonal, so that `b` means the same for gradients
    of any length."""

    def __call__(self, gram: Gram, preference: Weights) -> Weights:
        """Return the weights.

        Args:
            gram: Inner products of the objectives' gradients [M, M].
            preference: Shares of the objectives, of sum one [M].

        Returns:
            Weights of sum one [M]; the preference where all gradients are zero, one is infinite or
            not a number, or the regulariser is beyond what can be computed with.
        """
        q, p = gram.double().cpu().numpy(), preference.double().cpu().numpy()
        length = float(np.diag(q).mean())
        if not (length > 0 and np.isfinite(q).all()):
            return preference
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            w = self._weights(q, p, length if self.normalize else 1.0)
        return preference if w is None else torch.from_numpy(w).to(preference)

    def _weights(self, q: Matrix, p: Matrix, unit: float) -> Matrix | None:
        """Return the weights; None where the regulariser leaves nothing but the preference."""
        if self.preference == "gradients":
            found = _least(p[:, None] * q * p, self.b * unit * np.eye(len(p)))
            w = p * found if found is not None else p
            return w / w.sum() if w.sum() > 0 else None
        if self.preference == "share":
            there = p > 0
            found = _least(q[np.ix_(there, there)], self.b * unit * np.diag(1 / p[there]))
            if found is None:
                return None
            w = np.zeros_like(p)
            w[there] = found
            return w
        apart = np.eye(len(p)) - p[:, None]  # of weights that sum to one: w - p
        return _least(q, self.b * unit * apart.T @ apart)


def require_solver() -> None:
    """Raise UserError where the solver of min-norm problems is not installed."""
    require("the min-norm solver", "firm", "scipy")


def _least(q: Matrix, regulariser: Matrix) -> Matrix | None:
    """Return the weights in the simplex of least w' (q + regulariser) w, by an active-set method.

    With A'A that matrix, the non-negative u of least |A u|^2 + (sum u - 1)^2 is the solution but
    for its sum: among the multiples t w of some weights the best t leaves a / (1 + a), which grows
    with a = |A w|^2. None where the matrix is not finite.
    """
    from scipy.optimize import nnls  # heavy, and needed by multi-objective methods alone

    # not Cholesky: gradients that depend on one another make the matrix singular
    whole = q + regulariser
    if not np.isfinite(whole).all() or np.abs(whole).max() > LARGE:
        return None
    values, vectors = np.linalg.eigh(whole)
    # so that the one in the sum's row weighs the same for gradients of any length
    scale = max(float(values[-1]), np.finfo(float).tiny)
    root = np.sqrt(np.clip(values / scale, 0, None))[:, None] * vectors.T
    u = nnls(np.vstack([root, np.ones(len(q))]), np.append(np.zeros(len(q)), 1.0))[0]
    weights: Matrix = u / u.sum()
    return weights


def projected_descent(gram: Gram, start: Weights, rate: float, iterations: int) -> Weights:
    """Solve the min-norm problem by projected gradient steps, as FedCMOO does (Askin et al. 2025).

    Args:
        gram: Inner products of the objectives' gradients [M, M].
        start: The first weights, of sum one [M].
        rate: The length of the steps.
        iterations: Their number.

    Returns:
        Weights of sum one [M]; the first ones where a gradient is infinite or not a number, or a
        step is beyond what can be computed with.
    """
    q, w = gram.double().cpu().numpy(), start.double().cpu().numpy()
    if not np.isfinite(q).all():
        return start
    for _ in range(iterations):
        with np.errstate(over="ignore", invalid="ignore"):
            moved = w - rate * (q @ w)
        if not np.isfinite(moved).all() or np.abs(moved).max() > FAR:
            return start
        w = onto_simplex(moved)
    return torch.from_numpy(w).to(start)


def onto_simplex(w: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the nearest weights that are not negative and sum to one (Duchi et al. 2008)."""
    ranked = np.sort(w)[::-1]
    over = (np.cumsum(ranked) - 1) / np.arange(1, len(w) + 1)
    # the largest number of weights that can stay above zero
    last = int(np.flatnonzero(ranked > over)[-1])
    projection: NDArray[np.float64] = np.maximum(w - over[last], 0)
    return projection


def stationarity(gram: Gram) -> float:
    """Return the least squared length of a weighted sum of the gradients.

    It is zero where no direction is good for all objectives.
    """
    w = MinNorm(b=0.0)(gram, torch.full((len(gram),), 1 / len(gram), dtype=torch.float64))
    return float(w @ gram.double().cpu() @ w)
