"""Local steps that tell little of any one unit of a client's data.

A step is of a Poisson batch: each unit's gradient is clipped, noise is added to the sum, and what
the optimiser makes of that tells no more. Source: Abadi et al. 2016, "Deep Learning with
Differential Privacy".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.channel.lattice import Lattice
from fedpref.channel.noise import WORDS, RoundedGaussian
from fedpref.errors import UserError
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from fedpref.privacy import Guarantee, Ledger, Secret, Unit
from fedpref.tasks.task import Apart, Task


class PrivateSteps:
    """The private steps of one client in one call of its work.

    Args:
        client: The client's number.
        round: From 0.
        call: The number of the verb within the round.
        secret: What batches and noise are drawn from, the client's own.
        ledger: The client's own; it is written when the work is done, before anything leaves.
        guarantee: What one step costs.
        batch: The size of a batch, as in settings.
        unit: Whose gradients are clipped.
        clip: The largest norm of a unit's gradient.
        fits: Whether so many steps more are within what may be spent.
        alone: A `with` in which nobody else charges what `fits` looks at.
    """

    def __init__(
        self,
        client: int,
        round: int,
        call: int,
        *,
        secret: Secret,
        ledger: Ledger,
        guarantee: Guarantee,
        batch: int,
        unit: Unit,
        clip: float,
        fits: Callable[[int], bool] = lambda steps: True,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._client, self._round, self._call = client, round, call
        self._secret, self._ledger, self._guarantee = secret, ledger, guarantee
        self._batch, self._unit, self._clip, self._fits = batch, unit, clip, fits
        self._alone = alone
        self._steps = 0
        self._digest = hashlib.blake2b(key=secret.key_of("steps"), digest_size=16)
        self._units: list[list[int]] | None = None

    def gradient(
        self,
        task: Task,
        shard: Any,
        params: Tree,
        start: Tree,
        names: Sequence[str],
    ) -> Float[Tensor, "M P"]:
        """Return the noisy gradient of each objective, all parameters in the order of `names`.

        Each is the sum over a Poisson batch, divided by the expected number of its examples.

        Args:
            task: The learning problem.
            shard: The client's data.
            params: The parameters as they are.
            start: Those that the round began with.
            names: Which of them are trained.
        """
        _, expected = task.private_batch(shard, self._batch)
        total = torch.zeros(len(expected), sum(params[name].numel() for name in names))
        total = total.double()
        if self._units is None:
            self._units = _members(task.units(shard, self._unit))
        self._digest.update(trees.digest({name: params[name] for name in names}))
        if chosen := self._drawn(self._units):  # of an empty batch there is noise alone
            for apart in task.gradients_apart(
                params, start, shard, chosen, self._batch, names, self._draws
            ):
                add_clipped(total, apart, names, self._clip)
        # what one unit can change, in itself and in what stands in its place
        most = self._clip * task.pieces_of_unit
        noisy = self._with_noise(total.flatten(), most).view_as(total)
        return noisy / torch.tensor(list(expected))[:, None]

    def _drawn(self, units: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Return the units of the next batch, each by a word of the secret's."""
        # of other parameters it is another batch
        words = self._words(len(units), f"batch/{self._steps}/{self._digest.hexdigest()}")
        most = self._guarantee.sampling_probability * 2**64
        return [unit for unit, word in zip(units, words.tolist(), strict=True) if word < most]

    def _draws(self, address: str) -> torch.Generator:
        """Return random numbers of a unit in this step, such as its answers: the secret's too."""
        words = self._words(1, f"draws/{self._steps}/{self._digest.hexdigest()}/{address}")
        return torch.Generator().manual_seed(int(words[0]) >> 1)

    def _with_noise(self, total: Float[Tensor, " n"], most: float) -> Float[Tensor, " n"]:
        """Return a sum with noise, which another sum at the same place would not have.

        Args:
            total: The sum.
            most: By how much one unit can change it.
        """
        lattice, noise = _sampler(most, self._guarantee.noise_multiplier, len(total))
        # a gradient that is not finite has been left out already
        rounded = lattice.round(total)
        digest = hashlib.blake2b(key=self._secret.key_of("sums"), digest_size=16)
        # of other noise it is another sum, which the same words would give away
        digest.update(repr((lattice, self._guarantee.kind, most)).encode())
        digest.update(rounded.numpy().tobytes())
        said = digest.hexdigest()
        self._digest.update(said.encode())
        words = self._words(WORDS * len(total), f"step/{self._steps}/{said}")
        self._steps += 1
        drawn = torch.from_numpy(noise.draw(words))
        return ((rounded + drawn).double() * lattice.unit).float()

    def _words(self, count: int, purpose: str) -> Any:
        return self._secret.words(
            count, purpose, round=self._round, call=self._call, client=self._client
        )

    def settle(self) -> None:
        """Write down what was spent; before this nothing may leave the client.

        Raises:
            UserError: It cannot be written, or is more than may be spent.
        """
        if not self._steps:
            return
        said = self._digest.hexdigest()
        with self._alone():
            # while these steps were done, others may have been charged
            self._ledger.read_again()
            kind = self._guarantee.kind
            is_known = self._ledger.known(self._round, self._call, said, kind) is not None
            if not is_known and not self._fits(self._steps):
                raise UserError(
                    "privacy.epsilon: private steps are done again with another outcome, or "
                    "oftener than was planned, and would be charged beyond the budget."
                )
            self._ledger.charge(self._round, self._call, said, kind, self._steps)


def _members(unit_of: Sequence[int]) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for example, unit in enumerate(unit_of):
        members.setdefault(unit, []).append(example)
    return [members[unit] for unit in sorted(members)]


def add_clipped(
    total: Float[Tensor, "M P"], apart: Apart, names: Sequence[str], clip: float
) -> None:
    """Add units' gradients to a sum of each objective, each unit's pieces shortened together.

    A gradient that is not finite counts as none: whoever stopped for it would tell of it.
    """
    units = torch.tensor(list(apart.units))
    squares = torch.zeros(len(units), dtype=torch.float64)
    flat = {name: apart.gradients[name].flatten(1).double().cpu() for name in names}
    for tensor in flat.values():
        squares += tensor.square().sum(1)
    of_unit = torch.zeros(int(units.max()) + 1, dtype=torch.float64).index_add(0, units, squares)
    lengths = of_unit[units].sqrt()
    factors = torch.where(lengths > clip, clip / lengths, torch.ones_like(lengths))
    is_finite = torch.isfinite(lengths)
    begun = 0
    for name in names:
        wide = torch.where(is_finite[:, None], flat[name], torch.zeros(()).double())
        end = begun + wide.shape[1]
        total[:, begun:end].index_add_(
            0, torch.tensor(list(apart.objectives)), wide * factors.nan_to_num(0.0)[:, None]
        )
        begun = end


@lru_cache(maxsize=8)
def _sampler(
    clip: float, noise_multiplier: float, dimensions: int
) -> tuple[Lattice, RoundedGaussian]:
    try:
        lattice = Lattice.of_sums(clip, noise_multiplier, dimensions)
    except ValueError as error:
        raise UserError(
            f"privacy: {error}. Take fewer numbers (a smaller rank, aggregate: frozen-a), or a "
            "larger epsilon."
        ) from error
    return lattice, RoundedGaussian(lattice.deviation)
