"""What a site keeps its clients private by: noise of their own, ledgers, and limits of the site's.

A site counts for itself what it has sent, whatever a coordinator says, and over all runs.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fedpref.engines import site_folder
from fedpref.engines.messages import RefusedError
from fedpref.engines.private_examples import LEDGERS, PrivateExamples, ledger_file
from fedpref.engines.private_sums import CLIP, PrivateSums
from fedpref.federation.private_steps import PrivateSteps
from fedpref.numerics import files
from fedpref.numerics.intervals import incomplete_beta
from fedpref.numerics.trees import Tree
from fedpref.privacy import Ledger

UNLIKELY = 1e-9  # that a client is drawn so often
JOINED = "joined.json"  # in a run's folder: who joined a run whose steps have noise
SUMS = "sums"  # a folder of ledgers beside that of steps
CHARGING = ".charging"  # a lock in the folder of all runs


@dataclass(frozen=True)
class SitePrivacy:
    """What is promised of a run's clients at a site.

    Attributes:
        folder: The run's, which has secret and ledgers.
        names: Of clients, by number.
        sums: How changes are sent for sums with noise; None without that promise.
        rounds_epsilon: What all rounds of such sums may cost.
        examples: What keeps the units of clients' data private; None without that promise.
        limits: Epsilon of a client over all runs at the site, at most, by `client` and `unit`;
            what is not there has no limit.
        root: The folder of all runs at the site.
    """

    folder: Path
    names: Mapping[int, str]
    sums: PrivateSums | None
    rounds_epsilon: float
    examples: PrivateExamples | None
    limits: Mapping[str, float]
    root: Path

    def steps(self, client: int, round: int, call: int) -> PrivateSteps | None:
        """Return a client's private steps, which refuse to be charged beyond budget and limit.

        None where nothing is promised of them.
        """
        if self.examples is None:
            return None
        others = partial(self._elsewhere, client, LEDGERS)
        return self.examples.of(client, round, call, self.limits.get("unit"), others, self._alone)

    def refuse_joined(self, purpose: str, clients: Sequence[int]) -> None:
        """Raise RefusedError where a client that has joined a run would train in it.

        What joins has no noise, and what is trained with noise must not begin there.
        """
        if self.examples is None:
            return
        file, names = self.folder / JOINED, {self.names[i] for i in clients}
        joined = set(json.loads(file.read_text())) if file.exists() else set()
        if purpose == "join":
            files.write(file, json.dumps(sorted(joined | names)))
        elif purpose == "train" and names & joined:
            raise RefusedError("a client that has joined the run does not train in it")

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
        self.sums.resume({CLIP: norm})
        message = self.sums.encode(value, client, round, call)
        digest = hashlib.blake2b(key=self.sums.secret.key_of("sent"), digest_size=16)
        for _, tensor in sorted(message.items()):
            digest.update(tensor.contiguous().numpy().tobytes())
        said, kind = digest.hexdigest(), self.sums.kind
        with self._alone():
            ledger = self._ledger(self.folder, SUMS, client)
            if ledger.known(round, call, said, kind) is None:
                more = ledger.with_one(round, call, kind)
                _refuse_unlikely(more)
                self._refuse_beyond(self.rounds_epsilon, [more], "what the run promises")
                if (limit := self.limits.get("client")) is not None:
                    others = self._elsewhere(client, SUMS)
                    self._refuse_beyond(limit, [more, *others], "its limit")
            ledger.charge(round, call, said, kind)
        return message

    def _alone(self) -> AbstractContextManager[None]:
        """Return a `with` in which no other job at the site charges anything."""
        return site_folder.alone(self.root / CHARGING)

    def _refuse_beyond(self, epsilon: float, ledgers: Sequence[Ledger], whose: str) -> None:
        """Raise RefusedError where ledgers of sums have more than an epsilon."""
        if self.sums is None:
            return
        rounds = Counter(spent for one in ledgers for spent in one.rounds_so_far)
        if self.sums.guarantee.spent(rounds) > epsilon * (1 + 1e-6):
            raise RefusedError(f"{whose}, epsilon {epsilon:g}, is spent")

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

    def _elsewhere(self, client: int, kind: str) -> list[Ledger]:
        """Return a client's ledgers of other runs."""
        folders = sorted(self.root.rglob(self.folder.name))
        return [self._ledger(folder, kind, client) for folder in folders if folder != self.folder]

    def _ledger(self, folder: Path, kind: str, client: int) -> Ledger:
        return Ledger.at(folder / kind, ledger_file(self.names[client]))


def _refuse_unlikely(ledger: Ledger) -> None:
    """Raise RefusedError where a client is drawn oftener than by the chance that is counted.

    The chance hangs on how many clients there are, for which the coordinator's word is taken.
    """
    chance = max(chance for _, chance in ledger.rounds)
    drawn = len({one["round"] for one in ledger.entries})
    after = 1 + max(one["round"] for one in ledger.entries)
    if chance < 1 and incomplete_beta(drawn, after - drawn + 1, chance) < UNLIKELY:
        raise RefusedError(
            f"the client was drawn in {drawn} of {after} rounds, which by chance {chance:.2g} does "
            "not happen; there are fewer clients than is said"
        )
