"""Which examples make a batch: in epochs, every one before any again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpref import config
from fedpref.engines import Simulation
from fedpref.experiments.experiment import Experiment
from fedpref.federation.local_training import LocalTraining, place, train_locally
from fedpref.federation.verbs import Client
from fedpref.numerics import seeds
from fedpref.tasks.batches import BatchSize, Epochs, draw_indices, planned

LENGTHS = [3, 50, 7, 7, 21, 90, 4, 33, 12, 12, 60, 5, 8]
SIZES = [BatchSize(4), BatchSize(1), BatchSize(99), BatchSize(8, max_tokens=64)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_has_every_example_once(size: BatchSize) -> None:
    batches = planned(LENGTHS, size, rng())
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    if size.max_tokens is None:
        assert all(len(batch) <= size.examples for batch in batches)
    else:
        assert all(len(b) == 1 or sum(LENGTHS[i] for i in b) <= 64 for b in batches)
    if len(batches) > 1:
        assert batches != planned(LENGTHS, size, rng(1))


@pytest.mark.parametrize("size", SIZES)
def test_a_place_in_an_epoch_goes_on_where_it_was(size: BatchSize) -> None:
    whole = Epochs.begin(rng())
    expected = [whole.next(LENGTHS, size) for _ in range(30)]
    part = Epochs.begin(rng())
    found = []
    for _ in range(10):
        found += [part.next(LENGTHS, size) for _ in range(3)]
        part = Epochs.restore(part.state)  # a round ends, a run is resumed
    assert found == expected
    counts = Counter(i for batch in expected for i in batch)
    assert max(counts.values()) - min(counts[i] for i in range(len(LENGTHS))) <= 1


def test_kinds_of_examples_have_epochs_of_their_own() -> None:
    epochs = Epochs.begin(rng())
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(4):
        for kind, lengths in ((0, LENGTHS[:8]), (1, LENGTHS[:4])):
            drawn[kind] += draw_indices(lengths, BatchSize(2, epochs=epochs), rng(), kind)
    assert sorted(drawn[0]) == list(range(8))
    assert sorted(drawn[1]) == sorted([0, 1, 2, 3] * 2)


def test_two_epochs_have_different_orders() -> None:
    epochs = Epochs.begin(rng())
    first, second = ([epochs.next([1] * 32, BatchSize(8)) for _ in range(4)] for _ in range(2))
    assert first != second


class Counting:
    """A learner of which every drawn example is noted."""

    def __init__(self, learner: Any) -> None:
        self._learner, self.drawn = learner, list[list[int]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def draw(self, params: Any, start: Any, shard: Any, size: Any, rng: Any) -> Any:
        batch = self._learner.draw(params, start, shard, size, rng)
        self.drawn.append([shard.train.index(example) for example in batch.examples])
        return batch


@pytest.fixture
def one(settings: dict[str, Any], tmp_path: Path) -> tuple[Counting, Any]:
    spec = config.parse(Experiment, settings, "test")
    task = spec.task.build()
    return Counting(task), task.prepare(task.encode(spec.clients()[0][0]), tmp_path)


def test_an_update_of_several_batches_covers_distinct_examples(one: tuple[Counting, Any]) -> None:
    task, shard = one
    start = task.init(seeds.generator(0, "init"))
    local = LocalTraining(steps=1, batch_size=4, gradient_accumulation_steps=4)
    client: Any = Client(0, task, shard, seeds.generator(0, "train"), 0, 4)  # type: ignore[arg-type]
    assert len(shard.train) >= 16
    _, moments, _ = train_locally(client, start, local, {})
    seen = [i for batch in task.drawn for i in batch]
    assert len(seen) == len(set(seen)) == 16
    assert moments.keys() == place(moments).keys() != set()
    # the next round goes on with those that are left
    train_locally(client, start, local, moments)
    left = len(shard.train) - 16
    following = [i for batch in task.drawn[4:] for i in batch][:left]
    assert not set(following) & set(seen)
    task.drawn.clear()
    independent = LocalTraining(steps=8, batch_size=4, sampling_strategy="independent")
    assert train_locally(client, start, independent, {})[1] == {}
    assert len({i for batch in task.drawn for i in batch}) < 32


NAMES = ("feddpo", "fedpdpo", "ditto", "clustered", "decdpo", "fedsa-lora")


@pytest.mark.parametrize("name", NAMES)
def test_over_rounds_every_algorithm_sees_each_example_before_any_again(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    local = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    content = {**settings, "algorithm": {"name": name, "local": local}, "rounds": 6}
    spec = config.parse(Experiment, content, "test")
    task = Counting(spec.task.build())
    client = spec.clients()[0][0]
    shard = task.prepare(task.encode(client), tmp_path)
    engine = Simulation(task, [shard], seed=0, rounds=6)  # type: ignore[arg-type]
    algorithm: Any = spec.algorithm
    state = algorithm.init(engine, task.init(seeds.generator(0, "init")))
    rounds: list[list[int]] = []
    for round in range(6):
        task.drawn.clear()
        engine.begin(round, engine.clients)
        state, _ = algorithm.step(engine, state)
        # a batch to choose an adapter by is larger, and drawn by itself
        rounds.append([i for batch in task.drawn if len(batch) <= 2 for i in batch])
    counts = Counter(i for some in rounds for i in some)
    assert len(counts) == len(shard.train)
    assert max(counts.values()) - min(counts.values()) <= 1
