"""Sums that tell little of any one client: clipped, on a lattice, with noise, and written down."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fedpref.channel.lattice import Lattice
from fedpref.channel.noise import WORDS, RoundedGaussian
from fedpref.errors import UserError
from fedpref.numerics.trees import Tree
from fedpref.privacy import Guarantee, Ledger, Secret


@dataclass
class PrivateSums:
    """The sums of one line of a run, one in each round.

    Attributes:
        secret: What rounding and noise are drawn from.
        ledger: What has been spent.
        guarantee: What one sum costs.
        budget: The epsilon that is never passed; None without one.
        clip: The largest norm of a client's change.
        expected: The number that a sum is divided by, whoever came.
        template: A tree as clients send it, of which names and shapes count.
    """

    secret: Secret
    ledger: Ledger
    guarantee: Guarantee
    budget: float | None
    clip: float
    expected: float
    template: Tree
    lattice: Lattice = field(init=False)

    def __post_init__(self) -> None:
        self.dimensions = sum(tensor.numel() for tensor in self.template.values())
        self.lattice = Lattice.of(self.clip, self.guarantee.noise_multiplier, self.dimensions)
        self._noise = RoundedGaussian(self.lattice.deviation)

    def encode(self, value: Tree, client: int, round: int, call: int) -> Tree:
        """Return a client's change as integers whose norm is bounded."""
        if {n: t.shape for n, t in value.items()} != {n: t.shape for n, t in self.template.items()}:
            raise ValueError("a sum of other tensors than those whose noise was planned")
        words = self.secret.words(1, "rounding", round=round, call=call, client=client)
        rng = torch.Generator().manual_seed(int(words[0]) >> 1)
        return self.lattice.encode(value, rng)

    def release(self, messages: Iterable[Tree], round: int, call: int) -> Tree:
        """Return the mean with noise; it is charged before it is there.

        Args:
            messages: Of all clients that came, or of nobody.
            round: From 0.
            call: The number of the verb within the round.
        """
        total = {name: torch.zeros_like(one).long() for name, one in self.template.items()}
        for message in messages:
            for name, tensor in message.items():
                total[name] += tensor
        digest = hashlib.blake2b(key=self.secret.key_of("digest"), digest_size=16)
        for _, tensor in sorted(total.items()):
            digest.update(tensor.contiguous().numpy().tobytes())
        said = digest.hexdigest()
        if self.ledger.known(round, call, said) is None and not self._fits(self.ledger.charged + 1):
            raise UserError(
                f"privacy.epsilon: round {round + 1} is done again and its sum is another one, "
                "which would be charged beyond the budget. The last checkpoint's model stands."
            )
        attempt = self.ledger.charge(round, call, said)
        words = self.secret.words(
            WORDS * self.dimensions, "noise", round=round, call=call, attempt=attempt
        )
        noise = torch.from_numpy(self._noise.draw(words))
        return self.lattice.decode(total, noise, self.expected)

    @property
    def epsilon(self) -> float:
        """What has been spent."""
        return self.guarantee.epsilon(self.ledger.charged)

    def affords(self, round: int) -> bool:
        """Return whether a round may be begun: it is within the budget, or charged already.

        A charged one whose sum comes out otherwise is refused by `release`.
        """
        is_charged = any(one["round"] == round for one in self.ledger.entries)
        return is_charged or self._fits(self.ledger.charged + 1)

    def _fits(self, sums: int) -> bool:
        # a guarantee that was computed for so many sums is just within it
        return self.budget is None or self.guarantee.epsilon(sums) <= self.budget * (1 + 1e-9)

    def cohort(self, able: Sequence[int], round: int) -> tuple[int, ...]:
        """Return the clients of a round, each by a word of the secret's."""
        words = self.secret.words(len(able), "cohort", round=round)
        most = self.guarantee.sampling_probability * 2**64
        return tuple(c for c, word in zip(able, words.tolist(), strict=True) if word < most)
