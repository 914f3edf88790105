"""How near predicted shares of options come to those that people chose."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, xlogy


def alignment(p: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Return 1 - the Jensen-Shannon distance with the natural logarithm: from 0.167 to 1.

    Args:
        p: Predicted shares [n].
        y: True shares [n].
    """
    predicted, true = (shares.double() / shares.double().sum() for shares in (p, y))
    middle = (predicted + true) / 2
    # x log(x / middle), which is zero where x is
    divergences = [float((xlogy(x, x) - xlogy(x, middle)).sum()) for x in (predicted, true)]
    # rounding may bring it below zero
    return 1 - math.sqrt(max(0.0, sum(divergences) / 2))


def wasserstein_alignment(p: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Return 1 - the Wasserstein distance over options in their order, as a share of the largest.

    Args:
        p: Predicted shares [n].
        y: True shares [n].
    """
    return 1 - float((p - y).double().cumsum(0)[:-1].abs().sum()) / (len(p) - 1)


def calibration_error(p: Float[Tensor, " n"], y: Float[Tensor, " n"], bins: int = 10) -> float:
    """Return how far predictions are from what came true (Naeini et al. 2015).

    It is a mean over bins of predictions of about the same size.

    Args:
        p: Predicted shares [n].
        y: True shares [n].
        bins: How many.

    Returns:
        The error; nan where a prediction is no number.
    """
    if not bool(torch.isfinite(p).all()):
        return math.nan
    bin = (p * bins).long().clamp(max=bins - 1)
    return float(
        (p - y).double().new_zeros(bins).index_add(0, bin, (p - y).double()).abs().sum()
    ) / len(p)
