"""Who takes part in a round: sampling, weights, deadlines, newcomers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from fedpref.channel.chain import Chain
from fedpref.channel.compression import Bfloat16, Quantize
from fedpref.channel.robust import Combine, Mean
from fedpref.errors import UserError
from fedpref.numerics import seeds
from fedpref.types import Count, NonNegative, Positive, WholeNumber

RARE, LARGE = 1e-9, 1e100  # of weights: beside the largest, and that are added up as they are

_ARRIVALS: dict[Any, Arrivals] = {}


@dataclass(frozen=True)
class Participation:
    """Who takes part in a round, and with what weight.

    A cohort is drawn without replacement. To draw clients by their examples and weight them by
    examples too would count them twice, and is refused. Of the others, only everybody in every
    round is without bias: a small cohort's mean with weights by examples is a ratio of two sums
    (as FedAvg has it), in which small clients count for more than their share, and clients drawn
    by their examples without replacement come less often than in proportion, so that with equal
    weights the largest count for less than their share (Li et al. 2020 draw with replacement).
    """

    clients_per_round: Count | None = None
    """Clients that are drawn for each round; null takes everybody."""
    sampling: Literal["uniform", "examples", "weighted", "poisson"] = "uniform"
    """What determines a client's chance of being drawn; with `poisson`, for private runs, each
    takes part by a draw of its own, so that `clients_per_round` is the expected number."""
    max_participations: Count | None = None
    """Rounds that a client takes part in at most, and is then drawn no more; a run ends when nobody
    is left. Null sets no bound."""
    sampling_weights: Mapping[str, NonNegative] = field(default_factory=dict)
    """Chances by client, for `weighted`."""
    weighting: Literal["examples", "equal"] = "examples"
    """What determines a client's weight in means."""
    clip: Positive | None = None
    """The largest norm of what a client sends for a mean; longer ones are shortened to it. Null
    takes them as they are."""
    combine: Combine = Mean()
    """What becomes of clients' values in a round: their mean, or a rule that a few hostile clients
    cannot carry away."""
    compress: Annotated[Quantize | Bfloat16, Field(discriminator="name")] | None = None
    """How what clients send for a mean is compressed, as in `{name: quantize, bits: 8}` or `{name:
    bfloat16}`: rounded at random, so that the mean is right. Null sends it as it is."""
    gold: str | None = None
    """A file of pairs that the coordinator holds right (`prompt`, `chosen`, `rejected`): each
    round says how far every client's change agrees with what these would teach. Null compares with
    nothing."""
    gold_digest: str = ""
    """A hash of that file; it is written when a run begins, which goes on with the same pairs."""
    deadline: Positive | None = None
    """How long a round waits, as a multiple of the median client's time; later clients are left
    out. Null waits for all."""
    concurrency: Count | None = None
    """Clients that train at a time and wait for nobody (`fedbuff`): a round is the next
    `clients_per_round` that are done, by drawn times. Null lets a round wait for its clients."""
    speed_spread: Annotated[NonNegative, Field(le=20)] = 0.5
    """The standard deviation of the logarithm of simulated clients' times."""
    newcomers: WholeNumber | tuple[str, ...] = 0
    """Clients that join after training: their names, or so many at random."""
    join_steps: Count = 20
    """Local steps in which newcomers train their private parts."""

    def __post_init__(self) -> None:
        if not isinstance(self.newcomers, int) and len({*self.newcomers}) < len(self.newcomers):
            raise UserError("federation.newcomers: a name is there twice. Name each client once.")
        if self.concurrency is None:
            return
        others = {
            "clients_per_round": self.clients_per_round is None,
            "sampling": self.sampling != "uniform",
            "deadline": self.deadline is not None,
            "max_participations": self.max_participations is not None,
        }
        if wrong := [name for name, is_wrong in others.items() if is_wrong]:
            raise UserError(
                f"federation.concurrency: a round is the next clients_per_round to be done, drawn "
                f"uniformly, and nobody is waited for; federation.{wrong[0]} does not fit. Set "
                "clients_per_round, and leave sampling, deadline and max_participations out."
            )

    def check(self) -> None:
        """Raise UserError where clients would be counted twice."""
        if self.sampling == "examples" and self.weighting == "examples":
            raise UserError(
                "federation: sampling and weighting by examples would count a client's examples "
                "twice. Set federation.weighting to equal, or federation.sampling to uniform."
            )

    def weights(self, sizes: Mapping[str, int], seed: int) -> list[float]:
        """Return each client's chance to be drawn, up to a factor.

        Args:
            sizes: Numbers of training examples, by client.
            seed: The experiment's.

        Raises:
            UserError: `sampling_weights` does not fit the clients.
        """
        late = self.joining(list(sizes), seed)
        sizes = {
            name: 0 if client in late else size for client, (name, size) in enumerate(sizes.items())
        }
        if self.sampling != "weighted":
            if self.sampling_weights:
                raise UserError(
                    "federation.sampling_weights: they are for sampling: weighted, but sampling "
                    f"is {self.sampling}."
                )
            return [
                float(size if self.sampling == "examples" else size > 0) for size in sizes.values()
            ]
        if wrong := sorted(self.sampling_weights.keys() ^ sizes.keys()):
            raise UserError(
                f"federation.sampling_weights: {wrong[:5]} {'are' if len(wrong) > 1 else 'is'} "
                "either no client or without a weight; "
                f"the clients are {list(sizes)[:8]}{' ...' if len(sizes) > 8 else ''}."
            )
        chances = [self.sampling_weights[name] if size else 0.0 for name, size in sizes.items()]
        if not any(chances):
            raise UserError(
                "federation.sampling_weights: no client with training data has a weight above zero."
            )
        top = max(chances)
        if few := [name for name, c in zip(sizes, chances, strict=True) if 0 < c < RARE * top]:
            raise UserError(
                f"federation.sampling_weights: {few[:5]} would be drawn less than once in "
                f"{1 / RARE:.0e} rounds. Give them more, or 0."
            )
        return [chance / top for chance in chances] if top > LARGE or top < 1 / LARGE else chances

    @property
    def uplink(self) -> Chain:
        """The stages on the way into a mean."""
        return Chain((self.compress.stage(),)) if self.compress else Chain()

    @property
    def takes_everybody(self) -> bool:
        """Whether all clients take part in every round."""
        is_whole = self.clients_per_round is None and self.max_participations is None
        return is_whole and self.deadline is None and not self.newcomers

    @property
    def num_newcomers(self) -> int:
        """The number of clients that join after training."""
        return self.newcomers if isinstance(self.newcomers, int) else len(self.newcomers)

    def joining(self, names: Sequence[str], seed: int) -> tuple[int, ...]:
        """Return the clients that join after training, by number.

        Raises:
            UserError: A name is no client, or nobody would be left to train.
        """
        if isinstance(self.newcomers, int):
            order = torch.randperm(
                len(names), generator=seeds.generator(seed, "newcomers")
            ).tolist()
            chosen = tuple(sorted(order[: self.newcomers]))
        else:
            if unknown := sorted(set(self.newcomers) - set(names)):
                raise UserError(
                    f"federation.newcomers: {unknown[:5]} are no clients; the clients are "
                    f"{list(names)[:12]}."
                )
            chosen = tuple(i for i, name in enumerate(names) if name in self.newcomers)
        if self.num_newcomers >= len(names):
            raise UserError(
                f"federation.newcomers: {self.num_newcomers} of {len(names)} clients join after "
                "training, nobody is left to train."
            )
        return chosen

    def time(self, seed: int, client: int, round: int) -> float:
        """Return how long a client takes for a round, in median clients' times.

        Half of its spread is drawn once for the run and half for the round, log-normal.
        """
        draws = [
            torch.randn((), generator=seeds.generator(seed, "speed", round=r, client=client)).item()
            for r in (0, round + 1)
        ]
        return math.exp(self.speed_spread * sum(draws) / math.sqrt(2))

    def arrivals(self, weights: Sequence[float], seed: int) -> Arrivals:
        """Return who is done when, where clients wait for nobody.

        Args:
            weights: Of each client; who has none cannot take part.
            seed: Of all draws.
        """
        able = tuple(client for client, weight in enumerate(weights) if weight > 0)
        key = (able, seed, self.concurrency, self.clients_per_round, self.speed_spread)
        if key not in _ARRIVALS:
            _ARRIVALS.clear()  # of one line at a time
            _ARRIVALS[key] = Arrivals(able, seed, self)
        return _ARRIVALS[key]

    def chance(self, able: int) -> float:
        """Return each client's chance to take part in a round, of so many that can."""
        return min(1.0, (self.clients_per_round or able) / able)

    def cohort(
        self, weights: Sequence[float], seed: int, round: int
    ) -> tuple[tuple[int, ...], int]:
        """Draw the clients of a round.

        Clients are not timed, for the result would depend on the machine: a client's time is drawn,
        half of its spread once for the run and half for the round, log-normal around the median. If
        nobody is in time, the round waits for the first.

        Returns:
            The clients in the order of their numbers, and how many more were drawn but miss the
            deadline.
        """
        if self.concurrency is not None:
            return tuple(sorted(self.arrivals(weights, seed).ages_of(round))), 0
        drawn = draw(weights, self.clients_per_round, seeds.generator(seed, "cohort", round=round))
        if self.deadline is None:
            return drawn, 0
        times = {client: self.time(seed, client, round) for client in drawn}
        punctual = tuple(client for client in drawn if times[client] <= self.deadline) or (
            min(times, key=times.__getitem__),
        )
        return punctual, len(drawn) - len(punctual)


class Arrivals:
    """Who is done when, where clients wait for nobody; steps are made as they are asked for.

    Args:
        able: Who can take part.
        seed: Of all draws.
        how: How many at a time, and how many make a step.
    """

    def __init__(self, able: Sequence[int], seed: int, how: Participation) -> None:
        self._able, self._seed, self._how = able, seed, how
        self._working: list[tuple[float, int, int, int]] = []  # done at, dispatch, client, version
        self._busy: set[int] = set()  # at work, or in the buffer
        self._dispatched = 0
        self._steps: list[tuple[dict[int, int], float]] = []
        for _ in range(min(how.concurrency or 1, len(able))):
            self._dispatch(0.0, 0)

    def ages_of(self, step: int) -> Mapping[int, int]:
        """Return who makes a step, and how many steps old what each started from is."""
        return self._made(step)[0]

    def time_of(self, step: int) -> float:
        """Return when a step is made, in median clients' times."""
        return self._made(step)[1]

    def _made(self, step: int) -> tuple[dict[int, int], float]:
        while len(self._steps) <= step:
            version, buffer, now = len(self._steps), dict[int, int](), 0.0
            while len(buffer) < (self._how.clients_per_round or 1) and self._working:
                now, _, client, began = heapq.heappop(self._working)
                buffer[client] = version - began
                # whoever is in the buffer stays busy, so that nobody is in it twice
                is_full = len(buffer) == self._how.clients_per_round
                self._dispatch(now, version + is_full)
            self._steps.append((buffer, now))
            self._busy -= buffer.keys()
            # of few clients some could not be replaced at once
            while len(self._working) < min(self._how.concurrency or 1, len(self._able)):
                if not self._dispatch(now, version + 1):
                    break
        return self._steps[step]

    def _dispatch(self, now: float, version: int) -> bool:
        """Let a client that is not busy begin; return whether there was one."""
        if len(self._busy) >= len(self._able):
            return False
        draws = seeds.generator(self._seed, "cohort", round=self._dispatched)
        client = None
        while client is None or client in self._busy:
            client = self._able[int(torch.randint(len(self._able), (), generator=draws))]
        done = now + self._how.time(self._seed, client, self._dispatched)
        heapq.heappush(self._working, (done, self._dispatched, client, version))
        self._busy.add(client)
        self._dispatched += 1
        return True


def draw(weights: Sequence[float], size: int | None, rng: torch.Generator) -> tuple[int, ...]:
    """Draw clients with a weight above zero, without replacement.

    Args:
        weights: Of each client.
        size: How many; all of them if None or too many.
        rng: Random numbers.

    Returns:
        Their numbers, in order.
    """
    able = [client for client, weight in enumerate(weights) if weight > 0]
    if size is None or size >= len(able):
        return tuple(able)
    chosen = torch.multinomial(
        torch.tensor([weights[client] for client in able]).double(), size, generator=rng
    ).tolist()
    # in client order: sums over a cohort have the same bits, however it was drawn
    return tuple(sorted(able[i] for i in chosen))
