"""Clients' private steps: what noise each has, what it has spent, and what is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

from fedpref.federation.private_steps import PrivateSteps
from fedpref.privacy import Guarantee, Ledger, Secret, Unit, epsilon_of

LEDGERS = "clients"  # a folder of ledgers, a file for each client


def ledger_file(client: str) -> str:
    """Return the name of a client's ledger; the client's own may be anything."""
    return f"{blake2b(client.encode(), digest_size=8).hexdigest()}.jsonl"


@dataclass(frozen=True)
class PrivateExamples:
    """What keeps the units of clients' data private.

    Attributes:
        secret: What batches and noise are drawn from.
        folder: Where clients' ledgers lie.
        names: Of clients, by number.
        guarantees: What a private step of each client costs.
        unit: Whose presence is hidden.
        clip: The largest norm of a unit's gradient.
        batch: The size of a batch, as in settings.
        budget: The epsilon that is never passed; None without one.
        steps: Of a client in a round.
        planned: Of a client in all rounds, for which its noise was computed.
    """

    spends: ClassVar[str] = "epsilon_units"
    """What a round's figure of what has been spent is called."""

    secret: Secret
    folder: Path
    names: Mapping[int, str]
    guarantees: Mapping[int, Guarantee]
    unit: Unit
    clip: float
    batch: int
    budget: float | None
    steps: int
    planned: int

    def of(
        self,
        client: int,
        round: int,
        call: int,
        limit: float | None = None,
        others: Callable[[], Sequence[Ledger]] = tuple,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> PrivateSteps:
        """Return the private steps of a client in one call of its work.

        Args:
            client: Whose.
            round: From 0.
            call: The number of the verb within the round.
            limit: Epsilon over this run and others, at most.
            others: Returns what has been spent of the client in these by now.
            alone: A `with` in which nobody else charges any of these.
        """

        def fits(steps: int) -> bool:
            if self.budget is not None and not self._is_within(client, steps, self.budget, ()):
                return False
            return limit is None or self._is_within(client, steps, limit, others())

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
            fits=fits,
            alone=alone,
        )

    @property
    def epsilon(self) -> float:
        """What has been spent of the client that has spent most."""
        return max(map(self.spent, self.guarantees), default=0.0)

    def spent(self, client: int) -> float:
        """Return what has been spent of a client."""
        return self._with(client, Counter())

    @property
    def figures(self) -> dict[str, float]:
        """What a round's row says of what has been spent."""
        return {self.spends: self.epsilon}

    def resume(self, row: Mapping[str, float]) -> None:
        """Go on after the round whose row this is: nothing but ledgers is kept."""

    def affords(self, round: int) -> bool:
        """Return whether a round is within every client's budget, or charged already.

        A charged one whose outcome is another one is refused when it is charged again.
        """
        if self.budget is None:
            return True
        budget = self.budget
        return all(
            any(one["round"] == round for one in self._ledger(i).entries)
            or self._is_within(i, self.steps, budget, ())
            for i in self.guarantees
        )

    def _is_within(self, client: int, steps: int, budget: float, others: Sequence[Ledger]) -> bool:
        """Return whether so many steps more of a client are within a budget.

        Args:
            client: Whose.
            steps: How many.
            budget: Epsilon, at most.
            others: What has been spent of the client elsewhere.
        """
        more = Counter({self.guarantees[client].kind: steps})
        known = self._ledger(client).events
        is_planned = budget == self.budget and not others and known.keys() <= more.keys()
        if is_planned and known.total() + steps <= self.planned:
            return True
        for other in others:
            more += other.events
        # noise that was computed for so many steps is just enough
        return self._with(client, more) <= budget * (1 + 1e-6)

    def _with(self, client: int, more: Counter[tuple[float, float]]) -> float:
        guarantee = self.guarantees[client]
        return epsilon_of(self._ledger(client).events + more, guarantee.delta, guarantee.inexact)

    def _ledger(self, client: int) -> Ledger:
        return Ledger.at(self.folder / LEDGERS, ledger_file(self.names[client]))


class ToldExamples:
    """What sites say that their clients' private steps have spent; they keep it themselves."""

    spends: ClassVar[str] = PrivateExamples.spends

    def __init__(self, budget: float | None) -> None:
        self.budget, self.epsilon = budget, 0.0

    def hear(self, spent: Mapping[int, float]) -> None:
        """Take what sites say of their clients."""
        self.epsilon = max([self.epsilon, *spent.values()])

    @property
    def figures(self) -> dict[str, float]:
        """What a round's row says of what has been spent."""
        return {self.spends: self.epsilon}

    def resume(self, row: Mapping[str, float]) -> None:
        """Go on after the round whose row this is."""
        self.epsilon = max(self.epsilon, row.get(self.spends, 0.0))

    def affords(self, round: int) -> bool:
        """Return true: whoever has spent its budget takes no part, as its site says."""
        return True
