"""What is promised: to whom, for whom, and how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedpref.errors import UserError
from fedpref.privacy.neighbours import fewest, shares_needed
from fedpref.types import NonNegative, OpenFraction, Portion, Positive


@dataclass(frozen=True, kw_only=True)
class FixedClip:
    """The same largest norm in every round."""

    name: Literal["fixed"] = "fixed"
    norm: Positive = 0.5
    """The largest norm, of a client's change or of a unit's gradient; longer ones are shortened to
    it."""


@dataclass(frozen=True, kw_only=True)
class QuantileClip:
    """A largest norm of clients' changes that follows a quantile of them, found with noise.

    Each client adds one number to its change: whether it was short enough. Source: Andrew et al.
    2021, "Differentially Private Learning with Adaptive Clipping".
    """

    name: Literal["quantile"] = "quantile"
    quantile: OpenFraction = 0.5
    """The share of changes that is to be left as it is."""
    start: Positive = 1.0
    """The largest norm in the first round."""
    rate: Positive = 0.2
    """How fast it follows: the step of its logarithm for a share that is off by one."""
    count_noise: NonNegative = 0.05
    """The noise's standard deviation on the number of clients that were short enough, as a share
    of the expected number."""


FEW = 100  # sites, of which each shares its masks with all others

Clip = Annotated[FixedClip | QuantileClip, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True)
class Column:
    """Rows that agree in a column are one unit."""

    column: str
    """The column's name, such as one of annotators."""


Unit = Literal["client", "example", "prompt", "question"] | Column
"""Whose presence is hidden."""


def unit_in_words(unit: Unit) -> str:
    """Return what one unit is, as in "of one pair that is there or not"."""
    if isinstance(unit, Column):
        return f"group of a client's rows with one {unit.column}"
    return {
        "client": "client",
        "example": "training example of a client",
        "prompt": "prompt of a client with all of its pairs",
        "question": "question of a group",
    }[unit]


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Differential privacy of what clients send.

    Of clients: each client's change is clipped, rounded to a lattice and summed as integers; noise
    is added to the sum, which is divided by the expected number of clients. Cohorts are Poisson or
    everybody, weights equal; noise and cohorts come from a secret of the run.

    Of what a client has (examples, prompts, questions, groups of rows): every local step is of a
    Poisson batch, in which each unit's gradient is clipped, and noise is added to the sum.
    """

    unit: Unit = "client"
    """Whose presence is hidden: a client with all that it has; or, within each client, one example,
    one prompt with all of its examples, a question of a predictor's, or rows that agree in a
    column (`column: NAME`)."""
    against: Literal["model-users", "coordinator", "everybody"] | None = None
    """From whom. Of clients `model-users`, who get the shared adapter, in every round or at the
    end: the coordinator is trusted, and so is who reads the run directory; or the `coordinator`
    too, which then sees sums under masks alone (`secrecy`), to which sites have added noise. Of
    what a client has `everybody` but the client, for noise is added before anything leaves it. Null
    is `model-users`, or `everybody`."""
    epsilon: Positive | None = None
    """The budget, which the run stops at; the noise is computed from it. Give this or
    `noise_multiplier`."""
    noise_multiplier: Positive | None = None
    """The noise's standard deviation in clips; epsilon is computed from it."""
    delta: OpenFraction = 1e-5
    """The chance of more loss than epsilon; at most one over the number of units."""
    clip: Clip = FixedClip()
    """How long a client's change, or a unit's gradient, may be."""
    metrics: Literal["kept", "none", "private"] | None = None
    """What is told of clients' figures. `kept` writes them down as they are, outside the promise;
    `none` asks nobody for any; `private`, of clients, tells each evaluation's mean and bins over
    all clients, with noise, within epsilon, and nothing of the training. Null is `kept`, or `none`
    against the coordinator."""
    metrics_noise: Annotated[float, Field(ge=1, le=500)] = 20.0
    """Of private figures: the noise's standard deviation of one evaluation, in units of what one
    client can change."""

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise UserError(
                "privacy: give epsilon, from which the noise is computed, or noise_multiplier, "
                "from which epsilon is; one of the two."
            )
        fits = ("model-users", "coordinator") if self.is_of_clients else ("everybody",)
        if self.against not in (None, *fits):
            raise UserError(
                "privacy.against: of clients the promise is towards model-users, or with secrecy "
                "the coordinator too; of what a client has it is towards everybody. Set it to "
                f"{' or '.join(fits)}, or leave it out."
            )
        if not self.is_of_clients and not isinstance(self.clip, FixedClip):
            raise UserError(
                "privacy.clip: a quantile is of clients' changes; of what a client has it would "
                "cost a query of its own in every step. Take fixed."
            )

        if self.metrics == "private" and not self.is_of_clients:
            raise UserError(
                "privacy.metrics: of what a client has, a figure of its own would need noise of "
                "its own, beside which nothing is seen. Take none, or kept."
            )
        if self.against == "coordinator" and self.metrics not in (None, "none"):
            raise UserError(
                "privacy.metrics: against the coordinator sites would have to add the noise to "
                "figures, and they count that of changes alone. Take none."
            )

    @property
    def tells(self) -> Literal["kept", "none", "private"]:
        """What is told of figures."""
        return self.metrics or ("none" if self.against == "coordinator" else "kept")

    @property
    def is_of_clients(self) -> bool:
        """Whether a unit is a whole client."""
        return self.unit == "client"

    @property
    def norm(self) -> float:
        """The largest norm, in the first round where it follows a quantile."""
        return self.clip.norm if isinstance(self.clip, FixedClip) else self.clip.start


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Sums of which the coordinator learns nothing but the whole.

    A site first adds up its own clients; then every site adds masks that cancel in the sum of all.
    """

    name: Literal["masks"] = "masks"
    threshold: Annotated[float, Field(gt=0.5, le=1)] = 0.67
    """The share of a sum's sites that must be left to its end; above two thirds, a coordinator that
    tells sites different things about who is left gets nothing either."""
    min_sites: Annotated[int, Field(ge=2)] = 3
    """How many sites' values must be in a sum, at least."""
    max_share: Portion = 0.67
    """The largest share of a sum that one site may have: of more the sum would say its value."""
    neighbours: Annotated[int, Field(ge=2)] | Literal["all"] | None = None
    """With how many others, whom it draws, a site shares its masks; null is all of up to 100, and
    above as few as let nobody's masks be known by those who collude (by chance once in 2^40 sums)
    and are enough whoever falls out (once in 2^30)."""
    corrupt: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of sites that may tell one another, and the coordinator, what they know. Where the
    promise is against the coordinator, so many of those who must be left may leave out their part
    of the noise: all others' parts are then enough."""

    def lopsided(self, totals: Sequence[float]) -> str:
        """Return why a sum would be hardly more than one site's value; empty if it is not.

        Args:
            totals: Of each site, what it has of the sum.
        """
        if sum(total > 0 for total in totals) < self.min_sites:
            return "fewer sites than secrecy.min_sites have anything in the sum"
        if max(totals) > self.max_share * sum(totals) * (1 + 1e-9):
            return f"one site would have more of the sum than secrecy.max_share, {self.max_share:g}"
        return ""

    def needed(self, sites: int) -> int:
        """Return how many of so many sites must be left."""
        return max(math.ceil(self.threshold * sites - 1e-9), sites // 2 + 1, self.min_sites)

    def noisy(self, needed: int, sites: int) -> int:
        """Return how many of those who must be left have added noise that nobody else knows.

        Args:
            needed: How many must be left of a sum.
            sites: How many the run has, of which the share `corrupt` may all be among them.
        """
        return max(1, needed - math.ceil(self.corrupt * max(sites, needed) - 1e-9))

    def drawn(self, sites: int) -> tuple[int, int] | None:
        """Return with how many others each of so many sites shares, and how many shares it takes.

        None where it shares with all others.

        Raises:
            UserError: `neighbours` is too few.
        """
        if self.neighbours == "all" or (self.neighbours is None and sites <= FEW):
            return None
        lost, bad = sites - self.needed(sites), math.ceil(self.corrupt * sites - 1e-9)
        least = fewest(sites, lost, bad)
        if least is None or self.neighbours is None:
            return least
        if self.neighbours >= sites - 1:
            return None
        if (needed := shares_needed(self.neighbours, sites, lost, bad)) is None:
            raise UserError(
                f"secrecy.neighbours: {self.neighbours} are too few for {sites} sites, of which "
                f"{lost} may fall out and {bad} collude; {least[0]} are enough."
            )
        return self.neighbours, needed
