"""Noise on what an evaluation comes to: the mean of one figure over clients, and its bins."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping

from fedpref.channel.noise import WORDS, RoundedGaussian
from fedpref.numerics.metrics import HEADLINES
from fedpref.numerics.tallies import BINS, SHARES, Figure
from fedpref.privacy import Ledger, Secret

LARGEST = 2**16  # the noise's standard deviation, in units of the lattice; tables are of whole ones
CHANGE = math.sqrt(0.25 + 1)  # that a client makes at most: a half of the sum, one of a bin


class PrivateFigures:
    """Evaluations of a line, of which the mean and the bins of the first share are told.

    All clients are in each. A client that has nothing counts as one half in the mean, and in no
    bin; how many there are is known.

    Args:
        secret: What noise is drawn from.
        ledger: Of evaluations alone.
        noise_multiplier: The noise's standard deviation, in what one client can change.
        clients: How many are evaluated.
        planned: How many evaluations there will be.
    """

    def __init__(
        self, secret: Secret, ledger: Ledger, noise_multiplier: float, clients: int, planned: int
    ) -> None:
        self._secret, self._ledger, self._clients = secret, ledger, clients
        self.kind = noise_multiplier, 1.0
        self._planned = planned
        self.allows: Callable[[Counter[tuple[float, float]]], bool] = lambda _: True
        # as fine as the tables of noise are; rounding moves each of the sums by one unit at most
        whole = LARGEST / noise_multiplier - math.sqrt(1 + BINS)
        self._point = math.floor(math.log2(whole / CHANGE))
        change = CHANGE * 2**self._point + math.sqrt(1 + BINS)
        self._noise = RoundedGaussian(math.ceil(noise_multiplier * change))

    @property
    def events(self) -> Counter[tuple[float, float]]:
        """What evaluations have cost."""
        return self._ledger.events

    @property
    def reserved(self) -> Counter[tuple[float, float]]:
        """What they will have cost when all that are planned have been made."""
        return self.events | Counter({self.kind: self._planned})

    def told(self, figures: Mapping[str, Figure], round: int, place: int) -> dict[str, Figure]:
        """Return what is told of an evaluation; nothing where that would be beyond the budget.

        It is charged before it is there.

        Args:
            figures: What clients' figures come to.
            round: From 0.
            place: Which of the round's evaluations it is.
        """
        name = next((one for one in HEADLINES if one in figures and one in SHARES), None)
        if name is None:
            return {}
        one, unit = figures[name], 2**self._point
        exact = (one.total - one.count / 2, *one.bins)
        sums = [math.floor(number * unit + 0.5) for number in exact]
        key = self._secret.key_of("figures")
        told = repr((sums, self._noise.deviation, self._point)).encode()
        said = hashlib.blake2b(told, key=key, digest_size=16).hexdigest()
        if self._ledger.known(round, place, said, self.kind) is None:
            more = self._ledger.with_one(round, place, self.kind)
            if not self.allows(more.events):
                return {}
        attempt = self._ledger.charge(round, place, said, self.kind)
        words = self._secret.words(
            WORDS * len(sums), "figures", round=round, call=place, attempt=attempt
        )
        noisy = [
            (s + n) / unit for s, n in zip(sums, self._noise.draw(words).tolist(), strict=True)
        ]
        mean, count = min(max(noisy[0] / self._clients + 0.5, 0.0), 1.0), float(self._clients)
        noise = self._noise.deviation / unit / self._clients
        bins = tuple(noisy[1:])
        return {name: Figure(count, count * mean, math.nan, 0.0, 0.0, bins, noise)}
