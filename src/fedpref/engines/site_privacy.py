"""What a site keeps its clients private by: noise of their own, ledgers, and limits of the site's.

A site counts for itself what it has sent, whatever a coordinator says, and over all runs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedpref.engines.messages import RefusedError
from fedpref.engines.private_examples import LEDGERS, PrivateExamples, ledger_file
from fedpref.engines.private_sums import PrivateSums
from fedpref.federation.private_steps import PrivateSteps
from fedpref.numerics.trees import Tree
from fedpref.privacy import Ledger

SUMS = "sums"  # a folder of ledgers beside that of steps


@dataclass(frozen=True)
class SitePrivacy:
    """What is promised of a run's clients at a site.

    Attributes:
        folder: The run's, which has secret and ledgers.
        names: Of clients, by number.
        sums: How changes are sent for sums with noise; None without that promise.
        examples: What keeps the units of clients' data private; None without that promise.
        limits: Epsilon of a client over all runs at the site, at most, by `client` and `unit`;
            what is not there has no limit.
        root: The folder of all runs at the site.
    """

    folder: Path
    names: Mapping[int, str]
    sums: PrivateSums | None
    examples: PrivateExamples | None
    limits: Mapping[str, float]
    root: Path

    def steps(self, client: int, round: int, call: int) -> PrivateSteps | None:
        """Return a client's private steps; None where nothing is promised of them.

        Raises:
            RefusedError: They would be beyond what is promised, or what the site allows.
        """
        if self.examples is None:
            return None
        budgets = ((self.examples.budget, "the run's budget"), (self._limit("unit"), "its limit"))
        for budget, whose in budgets:
            others = self._elsewhere(client, LEDGERS) if whose == "its limit" else []
            if budget is not None and not self.examples.has_left(client, round, budget, *others):
                raise RefusedError(f"{whose} of epsilon, {budget:g}, is spent")
        return self.examples.of(client, round, call)

    def spent(self, client: int) -> float:
        """Return what private steps of a client have spent in the run."""
        return self.examples.spent(client) if self.examples else 0.0

    def message(self, client: int, value: Tree, round: int, call: int, norm: float) -> Tree:
        """Return a client's change for a sum with noise; it is charged before it is there.

        Args:
            client: Whose.
            value: The change.
            round: From 0.
            call: The number of the verb within the round.
            norm: The largest norm of a change, as the coordinator says it.

        Raises:
            RefusedError: Nothing is promised of sums, or the site's limit is spent.
        """
        if self.sums is None:
            raise RefusedError("the experiment promises nothing of sums")
        self.sums.resume({"clip_norm": norm})
        message = self.sums.encode(value, client, round, call)
        digest = hashlib.blake2b(key=self.sums.secret.key_of("sent"), digest_size=16)
        for _, tensor in sorted(message.items()):
            digest.update(tensor.contiguous().numpy().tobytes())
        ledger = self._ledger(self.folder, SUMS, client)
        said, kind = digest.hexdigest(), self.sums.kind
        if (limit := self._limit("client")) is not None:
            more = [ledger.with_one(round, call, kind), *self._elsewhere(client, SUMS)]
            rounds = Counter(spent for one in more for spent in one.rounds)
            spent = self.sums.guarantee.spent(rounds)
            if ledger.known(round, call, said) is None and spent > limit * (1 + 1e-6):
                raise RefusedError(f"its limit of epsilon, {limit:g}, is spent")
        ledger.charge(round, call, said, kind)
        return message

    def total(self, messages: Iterable[Tree], round: int, call: int, noisy: int) -> Tree:
        """Return the sum of the site's clients' changes, with its part of the noise if it has one.

        Args:
            messages: Of its clients, or of none.
            round: From 0.
            call: The number of the verb within the round.
            noisy: How many sites' parts of the noise are enough.
        """
        if self.sums is None:
            raise RefusedError("the experiment promises nothing of sums")
        total = {name: torch.zeros_like(one).long() for name, one in self.sums.planned.items()}
        for message in messages:
            for name, tensor in message.items():
                total[name] += tensor
        if self.sums.guarantee.is_discrete:
            return self.sums.part_of_noise(total, round, call, noisy)
        return total

    def _limit(self, level: str) -> float | None:
        return self.limits.get(level)

    def _elsewhere(self, client: int, kind: str) -> list[Ledger]:
        """Return a client's ledgers of other runs."""
        folders = sorted(self.root.rglob(self.folder.name))
        return [self._ledger(folder, kind, client) for folder in folders if folder != self.folder]

    def _ledger(self, folder: Path, kind: str, client: int) -> Ledger:
        return Ledger.at(folder / kind, ledger_file(self.names[client]))
