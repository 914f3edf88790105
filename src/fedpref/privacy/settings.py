"""What is promised: to whom, for whom, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedpref.errors import UserError
from fedpref.types import Positive


@dataclass(frozen=True, kw_only=True)
class FixedClip:
    """The same largest norm of a client's change in every round."""

    name: Literal["fixed"] = "fixed"
    norm: Positive = 0.5
    """The largest norm; longer changes are shortened to it."""


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Differential privacy of what clients send.

    Each client's change is clipped, rounded to a lattice and summed as integers; noise is added to
    the sum, which is divided by the expected number of clients. Cohorts are Poisson or everybody,
    weights equal; noise and cohorts come from a secret of the run.
    """

    unit: Literal["client"] = "client"
    """Whose presence is hidden: a client with all that it has."""
    against: Literal["model-users"] = "model-users"
    """From whom: who gets the shared adapter, in every round or at the end. The coordinator is
    trusted, and so is who reads the run directory."""
    epsilon: Positive | None = None
    """The budget, which the run stops at; the noise is computed from it. Give this or
    `noise_multiplier`."""
    noise_multiplier: Positive | None = None
    """The noise's standard deviation in clips; epsilon is computed from it."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """The chance of more loss than epsilon; at most one over the number of clients."""
    clip: FixedClip = FixedClip()
    """How long a client's change may be."""

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise UserError(
                "privacy: give epsilon, from which the noise is computed, or noise_multiplier, "
                "from which epsilon is; one of the two."
            )
