"""Clients' private steps: what noise each has, what it has spent, and what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedpref.federation.private_steps import PrivateSteps
from fedpref.privacy import Guarantee, Ledger, Secret, Unit, epsilon_of

LEDGERS = "clients"  # a folder of ledgers, named after clients' numbers


@dataclass(frozen=True)
class PrivateExamples:
    """What keeps the units of clients' data private.

    Attributes:
        secret: What batches and noise are drawn from.
        folder: Where clients' ledgers lie.
        guarantees: What a private step of each client costs.
        unit: Whose presence is hidden.
        clip: The largest norm of a unit's gradient.
        batch: The size of a batch, as in settings.
        budget: The epsilon that is never passed; None without one.
        steps: Of a client in a round.
    """

    spends: ClassVar[str] = "epsilon_units"
    """What a round's figure of what has been spent is called."""

    secret: Secret
    folder: Path
    guarantees: Mapping[int, Guarantee]
    unit: Unit
    clip: float
    batch: int
    budget: float | None
    steps: int

    def of(self, client: int, round: int, call: int) -> PrivateSteps:
        """Return the private steps of a client in one call of its work."""
        return PrivateSteps(
            client,
            round,
            call,
            secret=self.secret,
            ledger=self._ledger(client),
            guarantee=self.guarantees[client],
            batch=self.batch,
            unit=self.unit,
            clip=self.clip,
        )

    @property
    def epsilon(self) -> float:
        """What has been spent of the client that has spent most."""
        return max((self._spent(i, Counter()) for i in self.guarantees), default=0.0)

    @property
    def figures(self) -> dict[str, float]:
        """What a round's row says of what has been spent."""
        return {self.spends: self.epsilon}

    def resume(self, row: Mapping[str, float]) -> None:
        """Go on after the round whose row this is: nothing but ledgers is kept."""

    def affords(self, round: int) -> bool:
        """Return whether a round is within every client's budget, or charged already."""
        if self.budget is None:
            return True
        for i, guarantee in self.guarantees.items():
            if any(one["round"] == round for one in self._ledger(i).entries):
                continue
            more = Counter({guarantee.kind: self.steps})
            # noise that was computed for so many steps is just enough
            if self._spent(i, more) > self.budget * (1 + 1e-9):
                return False
        return True

    def _spent(self, client: int, more: Counter[tuple[float, float]]) -> float:
        guarantee = self.guarantees[client]
        return epsilon_of(self._ledger(client).events + more, guarantee.delta, guarantee.inexact)

    def _ledger(self, client: int) -> Ledger:
        return Ledger.at(self.folder / LEDGERS, f"{client:06}.jsonl")
