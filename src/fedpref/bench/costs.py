"""What a study costs: about how much before it begins, and what its runs took."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from fedpref.engines.workers import can_fork, one_thread
from fedpref.experiments.experiment import Experiment
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client
from fedpref.numerics import seeds, trees

FORWARD = 1 / 3  # of a pair's time in training, when it is only scored


@dataclass(frozen=True)
class Cost:
    """What runs are expected to take.

    Attributes:
        seconds: On this machine.
        bytes: Up and down, of all clients.
    """

    seconds: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.bytes + other.bytes)

    @property
    def said(self) -> str:
        """In words."""
        return f"about {duration(self.seconds)}, and {self.bytes / 1e6:,.0f} MB between clients"


def expected(spec: Experiment, runs: int) -> Cost:
    """Return what runs of plain federated averaging would cost, from a step that is made here.

    It is a guess: other algorithms do more in a step, answers may be longer than those of the
    client with most of them, and what pairs share is counted for each.

    Args:
        spec: The experiment; its data are read.
        runs: How many there are; the reference's scores are computed once for all.

    Raises:
        UserError: The data or the model cannot be read.
    """
    task, local = spec.build_task(), spec.algorithm.local
    clients = spec.clients()[0]
    most = max(clients, key=lambda client: len(client.train))
    some = replace(most, train=most.train[: 2 * local.batch_size], test=most.test[:1])
    task.move_to(0)
    with one_thread(), TemporaryDirectory() as cache:
        shard = task.prepare(task.encode(some), Path(cache))
        adapter, seconds = task.init(seeds.generator(0, "init")), math.inf
        one = LocalTraining(steps=1, batch_size=local.batch_size)
        for turn in range(3):  # the first finds what is not there yet
            draws = seeds.generator(0, f"cost {turn}")
            begun = time.perf_counter()
            train_locally(Client(0, task, shard, draws, turn, 3), adapter, one, {})
            seconds = min(seconds, time.perf_counter() - begun)
    pair = seconds / min(local.batch_size, len(some.train))
    cohort = min(spec.federation.clients_per_round or len(clients), len(clients))
    drawn = local.steps * local.batch_size * local.gradient_accumulation_steps
    held_out = sum(len(client.test) for client in clients)
    looks = 1 + (spec.rounds // spec.evaluate_every if spec.evaluate_every else 0)
    rows = sum(len(client.train) for client in clients) + held_out
    work = runs * (spec.rounds * cohort * drawn + FORWARD * looks * held_out) + FORWARD * rows
    processes = (spec.workers or task.devices) if can_fork() else 1
    sent = 2 * trees.size(adapter) * cohort * spec.rounds * runs
    return Cost(pair * work / min(processes, cohort), float(sent))


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"


@contextmanager
def processor_seconds() -> Iterator[list[float]]:
    """Yield a list that holds, after the `with`, the processor time that it took.

    It is that of this process, and of those that it has ended within.
    """
    found: list[float] = []
    before = os.times()
    try:
        yield found
    finally:
        after = os.times()
        found.append(sum(after[:4]) - sum(before[:4]))
