"""What an attacker could show of a config's promises: canaries in one run, and who finds them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment, encoded
from fedpref.experiments.private import guarantees_of, private_sums, rounds_of_client, sizes_of
from fedpref.federation.local_training import train_locally
from fedpref.federation.private_steps import PrivateSteps, add_clipped
from fedpref.federation.verbs import Client
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree
from fedpref.privacy import Column, Ledger, Privacy, Secret
from fedpref.privacy.audit import Bound, audit_sums, evidence, highest, lower_bound
from fedpref.tasks.examples import Example
from fedpref.tasks.offline import OfflineLearner

CLIENTS, UNITS = 400, 100  # canaries by default
ANSWER = 12  # random tokens of a canary's prompt, and of each of its answers


@dataclass(frozen=True)
class Audit:
    """What was found of one promise.

    Attributes:
        promise: Which.
        canaries: How many there were.
        epsilon: What the accountant says that the run spends.
        bound: What was shown, at 95 % confidence.
        highest: What an attacker who is always right could show with so many canaries.
    """

    promise: Privacy
    canaries: int
    epsilon: float
    bound: Bound
    highest: float

    @property
    def holds(self) -> bool:
        """Whether no more was shown than is promised."""
        return self.bound.epsilon <= self.epsilon


def audit(spec: Experiment, canaries: int | None = None, seed: int = 0) -> Iterator[Audit]:
    """Audit each promise of an experiment by one run with canaries; nothing is kept of it.

    Of clients, canary clients with random changes go through the whole way of a sum, round by
    round. Of what a client has, pairs of random tokens are put among the rows of the client that
    has most, it takes all local steps that it would, and the attacker sees every noisy gradient
    and knows every other pair.

    Args:
        spec: The experiment.
        canaries: How many; by default 400 of clients and 100 of what one has.
        seed: Of canaries and coins.

    Raises:
        UserError: There is no promise; its task has no pairs.
    """
    if not spec.promises:
        raise UserError("privacy: there is no promise to audit. Set privacy.")
    keep_freed_memory()
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        task = spec.build_task()
        _, shards = encoded(spec, task)
        spec.check_clients({shard.name: len(shard) for shard in shards})
        task.move_to(0)
        for number, promise in enumerate(spec.promises):
            room = Path(folder) / str(number)
            if promise.is_of_clients:
                yield _of_clients(spec, task, len(shards), promise, canaries or CLIENTS, seed, room)
            else:
                shard = max(shards, key=len)
                yield _of_units(spec, task, shard, promise, canaries or UNITS, seed, room)


def _of_clients(
    spec: Experiment,
    task: Any,
    clients: int,
    promise: Privacy,
    canaries: int,
    seed: int,
    folder: Path,
) -> Audit:
    private = private_sums(spec, task, clients - spec.federation.num_newcomers, folder)
    if private is None:
        raise ValueError("no promise of clients")
    dimensions = sum(one.numel() for one in private.template.values())
    private.template = {"change": torch.zeros(dimensions)}

    def release(round: int, present: Sequence[tuple[int, Tree]]) -> Tree:
        messages = (private.encode(tree, i, round, 1) for i, tree in present)
        mean = private.release(messages, round, 1)
        return {"change": mean["change"].double() * private.expected}

    rounds = rounds_of_client(spec)
    epsilon = private.guarantee.epsilon(rounds)
    bound = audit_sums(
        release,
        canaries=canaries,
        dimensions=dimensions,
        rounds=rounds,
        clip=promise.norm,
        delta=promise.delta,
        seed=seed,
        chance=private.chance,
        deviation=private.lattice.deviation * private.lattice.unit,
        cohort=private.cohort,
    )
    return Audit(promise, canaries, epsilon, bound, highest(canaries, promise.delta))


def _of_units(
    spec: Experiment,
    task: Any,
    shard: Any,
    promise: Privacy,
    canaries: int,
    seed: int,
    folder: Path,
) -> Audit:
    if not isinstance(task, OfflineLearner):
        raise UserError(
            f"task: canaries are pairs of answers, which the task {spec.task.name} does not have."
        )
    rng = np.random.default_rng(seed)
    planted = _canaries(task, promise, canaries, rng)
    listed = replace(shard, train=(*shard.train, *planted))
    guarantee = guarantees_of(spec, task, sizes_of(spec, task, {0: listed}))[0]
    was_in = rng.random(canaries) < 0.5
    inside = [one for one, is_in in zip(planted, was_in, strict=True) if is_in]
    chosen = replace(shard, train=(*shard.train, *inside))
    local, rounds = spec.algorithm.local, rounds_of_client(spec)
    aggregate = spec.algorithm.aggregate
    start = task.init(seeds.generator(spec.seed, "init"))
    theta, fixed = aggregate.split(start) if aggregate else (start, {})
    watch = _Watch(replace(shard, train=planted), np.flatnonzero(was_in), len(shard), guarantee)
    secret, ledger = Secret.of(folder), Ledger.at(folder)
    moments: Tree = {}
    for round in range(rounds):
        steps = _Watched(
            0,
            round,
            1,
            secret=secret,
            ledger=ledger,
            guarantee=guarantee,
            batch=local.batch_size * local.gradient_accumulation_steps,
            unit=promise.unit,
            clip=promise.norm,
        )
        steps.watch = watch
        draws = torch.Generator().manual_seed(seed + round)
        client = Client(0, task, chosen, draws, round, rounds, private=steps)
        theta, moments, _ = train_locally(client, theta, local, moments, fixed=fixed)
        steps.settle()
    epsilon = guarantee.epsilon(ledger.charged)
    bound = lower_bound(watch.scores, was_in, promise.delta)
    return Audit(promise, canaries, epsilon, bound, highest(canaries, promise.delta))


def _canaries(
    task: OfflineLearner, promise: Privacy, count: int, rng: np.random.Generator
) -> tuple[Example, ...]:
    """Return pairs of random tokens, each a unit of its own."""
    size = len(task.language.model.get_input_embeddings().weight)
    column = promise.unit.column if isinstance(promise.unit, Column) else ""

    def tokens() -> tuple[int, ...]:
        return tuple(rng.integers(size, size=ANSWER).tolist())

    return tuple(
        Example(tokens(), (tokens(), tokens()), columns={column: f"canary {number}"})
        for number in range(count)
    )


class _Watch:
    """What an attacker has gathered of each canary."""

    def __init__(self, canaries: Any, inside: Any, before: int, guarantee: Any) -> None:
        self.canaries, self.guarantee = canaries, guarantee
        # the numbers that canaries in the run have among its rows
        self.place = {int(canary): before + k for k, canary in enumerate(inside)}
        self.scores = np.zeros(len(canaries))


class _Watched(PrivateSteps):
    """Private steps whose noisy sums an attacker sees, who knows every other pair."""

    watch: _Watch
    _batch_of: set[int]
    _noise: Float[Tensor, " n"]

    def gradient(
        self, task: Any, shard: Any, params: Tree, start: Tree, names: Sequence[str]
    ) -> Float[Tensor, "M P"]:
        noisy = super().gradient(task, shard, params, start, names)
        canaries, chance = self.watch.canaries, self.watch.guarantee.sampling_probability
        deviation = self.watch.guarantee.noise_multiplier * self._clip
        draws = partial(seeds.generator, 0)
        units = [[i] for i in range(len(canaries))]
        number = 0
        for apart in task.gradients_apart(params, start, canaries, units, 1, names, draws):
            for k in range(len(apart.units)):
                one = replace(
                    apart,
                    gradients={name: apart.gradients[name][k : k + 1] for name in names},
                    units=[0],
                    objectives=[apart.objectives[k]],
                )
                added = torch.zeros(noisy.shape, dtype=torch.float64)
                add_clipped(added, one, names, self._clip)
                flat = added.flatten()
                squared = float(flat @ flat)
                # the sum, less what all others have added to it
                is_there = self.watch.place.get(number) in self._batch_of
                inner = float(flat @ self._noise) + squared * is_there
                self.watch.scores[number] += evidence(
                    np.array([inner]), np.array([squared]), chance, deviation
                )[0]
                number += 1
        return noisy

    def _drawn(self, units: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        drawn = super()._drawn(units)
        self._batch_of = {i for unit in drawn for i in unit}
        return drawn

    def _with_noise(self, total: Float[Tensor, " n"], most: float) -> Float[Tensor, " n"]:
        noisy = super()._with_noise(total, most)
        self._noise = noisy.double() - total
        return noisy
