"""Sums that tell little of any one client: clipped, on a lattice, with noise, and written down."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedpref.channel.lattice import Lattice
from fedpref.channel.noise import WORDS, DiscreteGaussian, RoundedGaussian
from fedpref.engines.private_figures import PrivateFigures
from fedpref.errors import UserError
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.privacy import FixedClip, Guarantee, Ledger, QuantileClip, Secret

SHORT = "short enough"  # a number beside a change, for a clip that follows a quantile
# norms that a clip which follows a quantile may come to, and the largest step of their logarithm
SHORTEST, LONGEST, MOVE = 1e-9, 1e9, 10.0
CLIP, CLIPPED = "clip_norm", "clipped"  # figures of a round with such a clip


class PrivateSums:
    """The sums of one line of a run.

    Args:
        secret: What rounding and noise are drawn from.
        ledger: What has been spent.
        guarantee: What a round costs.
        budget: The epsilon that is never passed; None without one.
        clip: The largest norm of a client's change.
        chance: Each client's to be drawn.
        expected: The number that a sum is divided by, whoever came.
        template: A tree as clients send it, of which names and shapes count.
        sums: How many there are in a round.
        most: The rounds that a client takes part in at most; None for all.
        evaluations: What keeps those private, within the same budget.

    Raises:
        UserError: The noise on how many changes are short enough is too small.
    """

    spends: ClassVar[str] = "epsilon"
    """What a round's figure of what has been spent is called."""

    def __init__(
        self,
        secret: Secret,
        ledger: Ledger,
        guarantee: Guarantee,
        budget: float | None,
        clip: FixedClip | QuantileClip,
        expected: float,
        template: Tree,
        *,
        chance: float = 1.0,
        sums: int = 1,
        most: int | None = None,
        evaluations: PrivateFigures | None = None,
    ) -> None:
        self.evaluations = evaluations
        if evaluations is not None:
            evaluations.allows = self._allows
        self.secret, self.ledger, self.guarantee, self.budget = secret, ledger, guarantee, budget
        self.expected, self.template, self._clip, self._most = expected, template, clip, most
        self.chance = chance
        # several sums of one cohort are together as one with less noise
        self.noise_multiplier = guarantee.noise_multiplier * math.sqrt(sums)
        self.norm = clip.norm if isinstance(clip, FixedClip) else clip.start
        self._clipped: float | None = None
        self._share = self._share_of_count()
        self._settle()

    def _share_of_count(self) -> float:
        """Return how large the number beside a change is, in clips.

        Beside noise of so many clips, it then has the noise on the number of short changes that was
        asked for, and noise on the change is a little larger.
        """
        if isinstance(self._clip, FixedClip):
            return 0.0
        count_noise = self._clip.count_noise * self.expected
        left = self.noise_multiplier**-2 - (2 * count_noise) ** -2 if count_noise else 0.0
        if left <= 0:
            raise UserError(
                f"privacy.clip.count_noise: {self._clip.count_noise:g} of {self.expected:.3g} "
                f"clients is less noise than {self.noise_multiplier:.3g} clips leave for it. Take "
                "more, or a fixed clip."
            )
        return float(left**-0.5 / count_noise)

    def _settle(self) -> None:
        """Take the lattice of the clip as it is."""
        # the change and the number beside it, which is a half either way
        whole = self.norm * math.hypot(1, self._share / 2)
        self.dimensions = sum(one.numel() for one in self.template.values()) + bool(self._share)
        try:
            self.lattice = Lattice.of(whole, self.noise_multiplier, self.dimensions)
        except ValueError as error:
            raise UserError(
                f"privacy: {error}. Take fewer numbers (a smaller rank, aggregate: frozen-a), or "
                "less noise."
            ) from error
        self._noise = RoundedGaussian(self.lattice.deviation)

    def encode(self, value: Tree, client: int, round: int, call: int) -> Tree:
        """Return a client's change as integers whose norm is bounded."""
        if {n: t.shape for n, t in value.items()} != {n: t.shape for n, t in self.template.items()}:
            raise ValueError("a sum of other tensors than those whose noise was planned")
        words = self.secret.words(1, "rounding", round=round, call=call, client=client)
        rng = torch.Generator().manual_seed(int(words[0]) >> 1)
        if self._share:
            length = trees.norm(value)
            if length > self.norm:
                value = trees.scale(value, self.norm / length)
            side = 0.5 if length <= self.norm else -0.5
            value = {**value, SHORT: torch.tensor([side * self._share * self.norm])}
        return self.lattice.encode(value, rng)

    @property
    def planned(self) -> Tree:
        """A tree as messages are, of which names and shapes count."""
        beside: dict[str, Tensor] = {SHORT: torch.zeros(1)} if self._share else {}
        return {**self.template, **beside}

    def holds(self, total: Tree) -> bool:
        """Return whether a sum has the tensors that were planned."""
        form = {name: tuple(one.shape) for name, one in self.planned.items()}
        return {name: tuple(one.shape) for name, one in total.items()} == form

    def fits(self, message: Tree) -> bool:
        """Return whether a message is one that `encode` could have made."""
        if not self.holds(message):
            return False
        if any(one.dtype != torch.int32 for one in message.values()):
            return False
        squares = sum(float(one.double().square().sum()) for one in message.values())
        return bool(squares**0.5 <= self.lattice.most)

    def release(self, messages: Iterable[Tree], round: int, call: int) -> Tree:
        """Return the mean with noise; it is charged before it is there.

        Args:
            messages: Of all clients that came, or of nobody.
            round: From 0.
            call: The number of the verb within the round.
        """
        total = {name: torch.zeros_like(one).long() for name, one in self.planned.items()}
        for message in messages:
            for name, tensor in message.items():
                total[name] += tensor
        digest = hashlib.blake2b(key=self.secret.key_of("digest"), digest_size=16)
        digest.update(repr(self.lattice).encode())
        for _, tensor in sorted(total.items()):
            digest.update(tensor.contiguous().numpy().tobytes())
        said, kind = digest.hexdigest(), self.kind
        known = self.ledger.known(round, call, said, kind)
        if known is None and not self._fits(round, call):
            raise UserError(
                f"privacy.epsilon: round {round + 1} is done again and its sum is another one, "
                "which would be charged beyond the budget. The last checkpoint's model stands."
            )
        attempt = self.ledger.charge(round, call, said, kind)
        noise = torch.zeros(self.dimensions, dtype=torch.long)
        if not self.guarantee.is_discrete:  # which is in the sum already
            words = self.secret.words(
                WORDS * self.dimensions, "noise", round=round, call=call, attempt=attempt
            )
            noise = torch.from_numpy(self._noise.draw(words))
        mean = dict(self.lattice.decode(total, noise, self.expected))
        if self._share:
            self._follow(float(mean.pop(SHORT)[0]) / (self._share * self.norm))
        return mean

    def _follow(self, short: float) -> None:
        """Let the clip follow the share of changes that were short enough, less a half."""
        if isinstance(self._clip, QuantileClip):
            share = short + 0.5
            self._clipped = 1 - share
            # noise may say anything of a few clients
            move = min(max(-self._clip.rate * (share - self._clip.quantile), -MOVE), MOVE)
            self.norm = min(max(self.norm * math.exp(move), SHORTEST), LONGEST)
            self._settle()

    def part_of_noise(self, total: Tree, round: int, call: int, noisy: int) -> Tree:
        """Return a sum of a site's with its part of the noise, the same for the same sum.

        Args:
            total: The site's sum.
            round: From 0.
            call: The number of the verb within the round.
            noisy: How many such parts are enough.
        """
        names = sorted(total)
        flat = torch.cat([total[name].flatten().long() for name in names])
        digest = hashlib.blake2b(key=self.secret.key_of("parts"), digest_size=16)
        digest.update(repr((self.lattice, noisy)).encode() + flat.numpy().tobytes())
        purpose = f"part of noise/{digest.hexdigest()}"
        words = self.secret.words(WORDS * len(flat), purpose, round=round, call=call)
        sampler = DiscreteGaussian(math.ceil(self.lattice.deviation / math.sqrt(noisy)))
        parts = (flat + torch.from_numpy(sampler.draw(words))).split(
            [total[name].numel() for name in names]
        )
        return {name: part.view(total[name].shape) for name, part in zip(names, parts, strict=True)}

    @property
    def figures(self) -> dict[str, float]:
        """What a round's row says: what has been spent, and the clip that the next one has."""
        if self._clipped is None:
            return {self.spends: self.epsilon}
        return {self.spends: self.epsilon, CLIP: self.norm, CLIPPED: self._clipped}

    def resume(self, row: Mapping[str, float]) -> None:
        """Go on after the round whose row this is."""
        if self._share and row.get(CLIP, self.norm) != self.norm:  # a fixed one stays
            self.norm = row[CLIP]
            self._settle()

    @property
    def kind(self) -> tuple[float, float]:
        """What a ledger counts one of its sums by."""
        return self._kind(self.noise_multiplier)

    def _kind(self, noise_multiplier: float) -> tuple[float, float]:
        return noise_multiplier, self.guarantee.sampling_probability

    @property
    def epsilon(self) -> float:
        """What has been spent."""
        return self._spent(self.ledger)

    def _spent(self, ledger: Ledger) -> float:
        # whoever takes part in so many rounds at most has paid for the dearest ones
        rounds = Counter(sorted(ledger.rounds)[: self._most])
        beside = self.evaluations.events if self.evaluations else Counter()
        return self.guarantee.spent(rounds + beside)

    def _allows(self, evaluations: Counter[tuple[float, float]]) -> bool:
        """Return whether evaluations that cost so much are within the budget."""
        if self.budget is None:
            return True
        rounds = Counter(sorted(self.ledger.rounds)[: self._most])
        return self.guarantee.spent(rounds + evaluations) <= self.budget * (1 + 1e-6)

    def affords(self, round: int) -> bool:
        """Return whether a round may be begun: it is within the budget, or charged already.

        A charged one whose sum comes out otherwise is refused by `release`.
        """
        return any(one["round"] == round for one in self.ledger.entries) or self._fits(round, 0)

    def _fits(self, round: int, call: int) -> bool:
        """Return whether a sum more is within the budget; at call 0 a whole round's."""
        if self.budget is None:
            return True
        noise = self.noise_multiplier if call else self.guarantee.noise_multiplier
        more = self.ledger.with_one(round, call, self._kind(noise))
        rounds = Counter(sorted(more.rounds)[: self._most])
        # evaluations that are still to come have their part of it
        beside = self.evaluations.reserved if self.evaluations else Counter()
        # a guarantee that was computed for so many rounds is just within it
        return self.guarantee.spent(rounds + beside) <= self.budget * (1 + 1e-6)

    def cohort(self, able: Sequence[int], round: int) -> tuple[int, ...]:
        """Return the clients of a round, each by a word of the secret's."""
        words = self.secret.words(len(able), "cohort", round=round)
        most = self.chance * 2**64
        return tuple(c for c, word in zip(able, words.tolist(), strict=True) if word < most)
