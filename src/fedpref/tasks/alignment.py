"""How near predicted shares of options come to those that people chose."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import jensenshannon
from torch import Tensor


def alignment(p: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Return 1 - the Jensen-Shannon distance with the natural logarithm: from 0.167 to 1.

    Args:
        p: Predicted shares [n].
        y: True shares [n].
    """
    distance = float(jensenshannon(p.double().numpy(), y.double().numpy()))
    return 1 - (0.0 if np.isnan(distance) else distance)


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
    """
    bin = (p * bins).long().clamp(max=bins - 1)
    return float(
        (p - y).double().new_zeros(bins).index_add(0, bin, (p - y).double()).abs().sum()
    ) / len(p)
