"""What a number of noisy sums has cost, by the privacy loss distribution of dp-accounting."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedpref.errors import UserError

STEP = 1e-3  # of privacy losses; rounded so that epsilon is never too small
NEAR = 1e-3  # of a noise multiplier that is looked for
LEAST, MOST = 0.2, 1e4  # noise multipliers that are tried


@dataclass(frozen=True)
class Guarantee:
    """Sums of clipped values with Gaussian noise, of cohorts that nobody outside knows.

    Neighbouring data sets differ by one unit that is there or not.

    Attributes:
        noise_multiplier: The noise's standard deviation, in clips.
        sampling_probability: Each unit's chance to be in a sum; 1 is everybody.
        delta: The chance of more loss than epsilon.
    """

    noise_multiplier: float
    sampling_probability: float
    delta: float

    def epsilon(self, sums: int, more_delta: float = 0.0) -> float:
        """Return epsilon after so many sums.

        Args:
            sums: How many.
            more_delta: What else of delta is spent, as on inexact noise.

        Raises:
            UserError: Nothing of delta is left.
        """
        if sums == 0:
            return 0.0
        if (left := self.delta - more_delta) <= 0:
            raise UserError(
                f"privacy.delta: {self.delta:g} is less than what inexact noise takes of it, "
                f"{more_delta:.1e}. Take a larger one, or fewer rounds."
            )
        return _epsilon(self.noise_multiplier, self.sampling_probability, sums, left)

    @staticmethod
    def of(epsilon: float, delta: float, sampling_probability: float, sums: int) -> Guarantee:
        """Return the guarantee of the least noise that keeps so many sums within an epsilon.

        Raises:
            UserError: No noise that is tried does.
        """

        def spent(multiplier: float) -> float:
            return _epsilon(multiplier, sampling_probability, sums, delta)

        high = 1.0
        while spent(high) > epsilon:
            high *= 2
            if high > MOST:
                raise UserError(
                    f"privacy.epsilon: no noise keeps {sums} sums within {epsilon:g} at delta "
                    f"{delta:g}. Take fewer rounds or a larger epsilon."
                )
        low = high / 2
        while low > LEAST and spent(low) <= epsilon:
            high, low = low, low / 2
        low = max(low, LEAST)
        if spent(low) <= epsilon:
            high = low
        while high - low > NEAR * low:
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
        return Guarantee(high, sampling_probability, delta)


@lru_cache(maxsize=4096)
def _epsilon(multiplier: float, probability: float, sums: int, delta: float) -> float:
    accounting, pld = _dp_accounting()
    event = accounting.GaussianDpEvent(multiplier)
    if probability < 1:
        event = accounting.PoissonSampledDpEvent(probability, event)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accountant = pld.PLDAccountant(value_discretization_interval=STEP)
        accountant.compose(accounting.SelfComposedDpEvent(event, sums))
        return float(accountant.get_epsilon(delta))


def _dp_accounting() -> tuple[Any, Any]:
    try:
        import dp_accounting  # type: ignore[import-untyped]
        from dp_accounting import pld
    except ImportError as error:
        raise UserError(
            "privacy: its accountant is dp-accounting. Install fedpref[privacy]."
        ) from error
    return dp_accounting, pld


def require() -> None:
    """Raise UserError unless the accountant is installed."""
    _dp_accounting()
