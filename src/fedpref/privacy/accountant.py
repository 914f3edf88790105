"""What a number of noisy sums has cost, by the privacy loss distribution of dp-accounting."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedpref.errors import UserError

STEP = 1e-3  # of privacy losses; rounded so that epsilon is never too small
NEAR = 2e-3  # of a noise multiplier that is looked for
LEAST, MOST = 0.2, 1e4  # noise multipliers that are tried
TURNS = 20  # until what inexact noise takes of delta and epsilon fit each other


@dataclass(frozen=True)
class Guarantee:
    """Sums of clipped values with Gaussian noise, of cohorts that nobody outside knows.

    Neighbouring data sets differ by one of the listed units, which has its data or sends nothing;
    how many are listed is known.

    Attributes:
        noise_multiplier: The noise's standard deviation, in clips.
        sampling_probability: Each unit's chance to be in a sum; 1 is everybody.
        delta: The chance of more loss than epsilon.
        inexact: How far one sum's noise is from the exact one, at most (total variation).
    """

    noise_multiplier: float
    sampling_probability: float
    delta: float
    inexact: float = 0.0

    def epsilon(self, sums: int) -> float:
        """Return epsilon after so many sums.

        Noise that is not exact takes (1 + exp(epsilon)) times its distance of delta.

        Raises:
            UserError: Nothing of delta is left.
        """
        if sums == 0:
            return 0.0
        spent, left = 0.0, self.delta
        for _ in range(TURNS):
            left = self.delta - (1 + math.exp(spent)) * sums * self.inexact
            if left <= 0:
                raise UserError(
                    f"privacy.delta: {self.delta:g} is less than what noise that is not exact "
                    f"takes of it in {sums} sums. Take a larger one, fewer rounds or fewer numbers."
                )
            now = _epsilon(self.noise_multiplier, self.sampling_probability, sums, left)
            if now <= spent * (1 + 1e-12):
                return now
            spent = now
        return math.inf

    @staticmethod
    def of(
        epsilon: float, delta: float, sampling_probability: float, sums: int, inexact: float = 0.0
    ) -> Guarantee:
        """Return the guarantee of the least noise that keeps so many sums within an epsilon.

        Raises:
            UserError: No noise that is tried does.
        """

        def with_noise(multiplier: float) -> Guarantee:
            return Guarantee(multiplier, sampling_probability, delta, inexact)

        # what is left of delta if the whole of epsilon is spent
        left = delta - (1 + math.exp(epsilon)) * sums * inexact
        if left <= 0:
            raise UserError(
                f"privacy.delta: noise that is not exact takes more than {delta:g} of it at "
                f"epsilon {epsilon:g}, in {sums} sums. Take a larger one, fewer rounds or fewer "
                "numbers."
            )

        def fits(multiplier: float) -> bool:
            return _epsilon(multiplier, sampling_probability, sums, left) <= epsilon

        high = 1.0
        while not fits(high):
            high *= 2
            if high > MOST:
                raise UserError(
                    f"privacy.epsilon: no noise keeps {sums} sums within {epsilon:g} at delta "
                    f"{delta:g}. Take fewer rounds or a larger epsilon."
                )
        low = high / 2
        while low > LEAST and fits(low):
            high, low = low, low / 2
        low = max(low, LEAST)
        if fits(low):
            return with_noise(low)
        while high - low > NEAR * low:
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return with_noise(high)


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
