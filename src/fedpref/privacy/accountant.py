"""What a number of noisy sums has cost, by the privacy loss distribution of dp-accounting."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from fedpref.errors import UserError

STEP = 1e-3  # of privacy losses; rounded so that epsilon is never too small
NEAR = 2e-3  # of a noise multiplier that is looked for, or of its epsilon
FAR = 20.0  # roots of summed inverse squares of noise multipliers above which a bound will do
LEAST, MOST = 0.2, 1e4  # noise multipliers that are tried
SCANT = 0.1  # a noise multiplier below which the accountant takes memory without end
MEANINGLESS = 500.0  # epsilon
TURNS = 20  # until what inexact noise takes of delta and epsilon fit each other


Events = Mapping[tuple[float, float], int]
"""Noise multiplier and sampling probability of noisy sums, and how many there were of each."""


def epsilon_of(events: Events, delta: float, inexact: float = 0.0) -> float:
    """Return epsilon after noisy sums of several kinds.

    Noise that is not exact takes (1 + exp(epsilon)) times its distance of delta.

    Args:
        events: What there was.
        delta: The chance of more loss than epsilon.
        inexact: How far one sum's noise is from the exact one, at most (total variation).

    Raises:
        UserError: Nothing of delta is left, or epsilon is so large that it says nothing.
    """
    sums = sum(events.values())
    if sums == 0:
        return 0.0
    kinds = tuple(sorted((*kind, count) for kind, count in events.items() if count))
    return _with_inexact(lambda left: _epsilon(kinds, left), sums, delta, inexact)


def _with_inexact(of: Callable[[float], float], sums: int, delta: float, inexact: float) -> float:
    """Return the epsilon that a function of delta gives, with what inexact noise leaves of it."""
    spent = 0.0
    for _ in range(TURNS):
        left = delta - (1 + math.exp(spent)) * sums * inexact
        if left <= 0:
            raise UserError(
                f"privacy.delta: {delta:g} is less than what noise that is not exact "
                f"takes of it in {sums} sums. Take a larger one, fewer rounds or fewer numbers."
            )
        now = of(left)
        if now > MEANINGLESS:
            raise UserError(
                f"privacy.noise_multiplier: epsilon is {now:.3g} after {sums} sums, which promises "
                "nothing. Take more noise, or no privacy."
            )
        if now <= spent * (1 + 1e-12):
            return now
        spent = now
    return math.inf


def epsilon_of_discrete(noises: Iterable[float], delta: float) -> float:
    """Return epsilon after sums with discrete Gaussian noise that many have added parts of.

    By their Renyi divergences, which are a Gaussian's (Kairouz, Liu and Steinke 2021), in the
    conversion of Canonne, Kamath and Steinke 2020. What several parts add to that is below 1e-38
    for deviations from a hundred units on.

    Args:
        noises: The noise multiplier of each sum.
        delta: The chance of more loss than epsilon.
    """
    half = sum(noise**-2 for noise in noises) / 2
    if not half:
        return 0.0

    def at(order: float) -> float:
        return order * half + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)

    low, high = 1 + 1e-6, 1e6
    for _ in range(200):  # one valley, by thirds in the logarithm of what is above one
        a = 1 + (low - 1) ** (2 / 3) * (high - 1) ** (1 / 3)
        b = 1 + (low - 1) ** (1 / 3) * (high - 1) ** (2 / 3)
        low, high = (low, b) if at(a) < at(b) else (a, high)
    return max(0.0, at(low))


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
        is_discrete: Whether its noise is discrete, of several senders.
    """

    noise_multiplier: float
    sampling_probability: float
    delta: float
    inexact: float = 0.0
    is_discrete: bool = False

    def epsilon(self, sums: int) -> float:
        """Return epsilon after so many sums; see `epsilon_of`."""
        return self.spent(Counter({self.kind: sums}))

    def spent(self, events: Counter[tuple[float, float]]) -> float:
        """Return epsilon after sums of several kinds, with noise as this one's."""
        if self.is_discrete:
            noises = [noise for noise, _ in events.elements()]
            return _with_inexact(
                lambda left: epsilon_of_discrete(noises, left),
                len(noises),
                self.delta,
                self.inexact,
            )
        return epsilon_of(events, self.delta, self.inexact)

    @property
    def kind(self) -> tuple[float, float]:
        """What `epsilon_of` counts one of its sums by."""
        return self.noise_multiplier, self.sampling_probability

    @staticmethod
    def of_discrete(epsilon: float, delta: float, sums: int, inexact: float = 0.0) -> Guarantee:
        """Return the guarantee of the least discrete noise that keeps so many sums within epsilon.

        Nobody is drawn: who collects the sums knows who takes part.
        """
        _refuse_meaningless(epsilon)
        low, high, fits_once = 1e-3, MOST, False
        for _ in range(80):
            middle = math.sqrt(low * high)
            # what is left of delta if the whole of epsilon is spent
            left = delta - (1 + math.exp(epsilon)) * sums * inexact
            if left <= 0:
                return Guarantee(middle, 1.0, delta, inexact, True)  # which says so when asked
            fits = epsilon_of_discrete([middle] * sums, left) <= epsilon
            low, high, fits_once = (low, middle, True) if fits else (middle, high, fits_once)
        if not fits_once:
            raise _no_noise(sums, "", epsilon, delta)
        return Guarantee(high, 1.0, delta, inexact, True)

    @staticmethod
    def of(
        epsilon: float,
        delta: float,
        sampling_probability: float,
        sums: int,
        inexact: float = 0.0,
        beside: Events = MappingProxyType({}),
    ) -> Guarantee:
        """Return the guarantee of the least noise that keeps so many sums within an epsilon.

        Args:
            epsilon: The budget.
            delta: The chance of more loss than that.
            sampling_probability: Each unit's chance to be in a sum.
            sums: How many.
            inexact: How far one sum's noise is from the exact one, at most (total variation).
            beside: Other sums within the same budget, whose noise is given.

        Raises:
            UserError: No noise that is tried does.
        """
        _refuse_meaningless(epsilon)

        def with_noise(multiplier: float) -> Guarantee:
            return Guarantee(multiplier, sampling_probability, delta, inexact)

        # what is left of delta if the whole of epsilon is spent
        left = delta - (1 + math.exp(epsilon)) * (sums + sum(beside.values())) * inexact
        if left <= 0:
            raise UserError(
                f"privacy.delta: noise that is not exact takes more than {delta:g} of it at "
                f"epsilon {epsilon:g}, in {sums} sums. Take a larger one, fewer rounds or fewer "
                "numbers."
            )

        def spent(multiplier: float) -> float:
            others = ((*kind, count) for kind, count in sorted(beside.items()))
            return _epsilon(((multiplier, sampling_probability, sums), *others), left)

        high = 1.0
        while (least := spent(high)) > epsilon:
            high *= 2
            if high > MOST:
                also = f" beside {sum(beside.values())} evaluations" if beside else ""
                raise _no_noise(sums, also, epsilon, delta)
        low = max(high / 2, LEAST)
        while (most := spent(low)) <= epsilon:
            high, least = low, most
            if low == LEAST:
                return with_noise(LEAST)
            low = max(low / 2, LEAST)
        # more noise, less epsilon: nearly a line in logarithms, and each look takes a tenth of a
        # second
        while least < epsilon * (1 - NEAR) and high - low > NEAR * low:
            # noise may be so much that nothing is lost at all
            share = math.log(most / epsilon) / math.log(most / least) if least > 0 else 0.5
            middle = low * (high / low) ** min(max(share, 0.05), 0.95) * (1 + NEAR / 10)
            if (now := spent(middle)) <= epsilon:
                high, least = middle, now
            else:
                low, most = middle, now
        return with_noise(high)


def _no_noise(sums: int, also: str, epsilon: float, delta: float) -> UserError:
    return UserError(
        f"privacy.epsilon: no noise keeps {sums} sums{also} within {epsilon:g} at delta {delta:g}. "
        "Take fewer rounds or a larger epsilon."
    )


def _refuse_meaningless(epsilon: float) -> None:
    if epsilon > MEANINGLESS:
        raise UserError(
            f"privacy.epsilon: {epsilon:.3g} promises nothing. Take {MEANINGLESS:g} at most, or no "
            "privacy."
        )


@lru_cache(maxsize=4096)
def _epsilon(kinds: tuple[tuple[float, float, int], ...], delta: float) -> float:
    accounting, pld = _dp_accounting()
    if any(multiplier < SCANT and probability < 1 for multiplier, probability, _ in kinds):
        raise UserError(
            f"privacy.noise_multiplier: less than {SCANT:g} clips is too little noise to be "
            "accounted for where units are drawn. Take more."
        )
    root = math.sqrt(sum(sums / multiplier**2 for multiplier, _, sums in kinds))
    if root > FAR and all(probability == 1 for _, probability, _ in kinds):
        # its exact loss takes time and memory without end; by zero-concentrated privacy it is a
        # little less than this (Bun and Steinke 2016)
        return root * root / 2 + root * math.sqrt(-2 * math.log(delta))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accountant = pld.PLDAccountant(value_discretization_interval=STEP)
        for multiplier, probability, sums in kinds:
            event = accounting.GaussianDpEvent(multiplier)
            if probability < 1:
                event = accounting.PoissonSampledDpEvent(probability, event)
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
