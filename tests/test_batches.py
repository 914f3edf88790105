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
from fedpref.tasks.batches import BatchSize, Epochs, Examples, draw_indices, planned

LENGTHS = (3, 50, 7, 7, 21, 90, 4, 33, 12, 12, 60, 5, 8)
KNOWN = Examples(LENGTHS, (0, 1, 2, 0, 3, 4, 2, 0, 1, 5, 5, 6, 2))
SIZES = [
    BatchSize(4),
    BatchSize(1),
    BatchSize(99),
    BatchSize(8, max_tokens=64),
    BatchSize(4, is_by_prompt=True),
    BatchSize(8, max_tokens=64, is_by_prompt=True),
]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_has_every_example_once(size: BatchSize) -> None:
    batches = planned(KNOWN, size, rng())
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    if size.max_tokens is None:
        lengths = {len(batch) for batch in batches}
        assert max(lengths) <= size.examples
        assert max(lengths) - min(lengths) <= 1
    else:
        assert all(len(b) == 1 or sum(LENGTHS[i] for i in b) <= 64 for b in batches)
    if len(batches) > 1:
        assert batches != planned(KNOWN, size, rng(1))


@pytest.mark.parametrize("size", SIZES)
def test_a_place_in_an_epoch_goes_on_where_it_was(size: BatchSize) -> None:
    whole = Epochs.begin(rng())
    expected = [whole.next(KNOWN, size)[0] for _ in range(30)]
    part = Epochs.begin(rng())
    found = []
    for _ in range(10):
        found += [part.next(KNOWN, size)[0] for _ in range(3)]
        part = Epochs.restore(part.state)  # a round ends, a run is resumed
    assert found == expected
    counts = Counter(i for batch in expected for i in batch)
    assert max(counts.values()) - min(counts[i] for i in range(len(LENGTHS))) <= 1


def test_kinds_of_examples_have_epochs_of_their_own() -> None:
    epochs = Epochs.begin(rng())
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(4):
        for kind, lengths in ((0, LENGTHS[:8]), (1, LENGTHS[:4])):
            size = BatchSize(2, epochs=epochs)
            drawn[kind] += draw_indices(Examples(lengths), size, rng(), kind)[0]
    assert sorted(drawn[0]) == list(range(8))
    assert sorted(drawn[1]) == sorted([0, 1, 2, 3] * 2)


def test_two_epochs_have_different_orders() -> None:
    epochs = Epochs.begin(rng())
    known = Examples((1,) * 32)
    first, second = ([epochs.next(known, BatchSize(8)) for _ in range(4)] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [9, 17, 41])
def test_every_example_has_the_same_weight_whatever_its_length(size: BatchSize, count: int) -> None:
    draw = torch.Generator().manual_seed(3)
    lengths = tuple(torch.randint(3, 40, (count,), generator=draw).tolist())
    prompts = tuple(torch.randint(0, count // 3, (count,), generator=draw).tolist())
    weights = torch.zeros(count)
    epochs, rounds = Epochs.begin(rng()), 0
    while not epochs.places or epochs.places[0][0] < 12:
        indices, weight = epochs.next(Examples(lengths, prompts), size)
        weights[indices] += weight / len(indices)
        rounds += 1
    weights[indices] -= weight / len(indices)  # the first of the next epoch
    assert torch.allclose(weights, weights.mean().expand(count), rtol=1e-5)
    assert float(weights.sum()) == pytest.approx(rounds - 1, rel=1e-5)  # as batches weigh


def test_a_small_clients_batches_do_not_stay_the_same() -> None:
    epochs = Epochs.begin(rng())
    lengths = tuple(range(20, 52))
    batches = {frozenset(epochs.next(Examples(lengths), BatchSize(8))[0]) for _ in range(4 * 8)}
    assert len(batches) > 16


def test_examples_of_one_prompt_come_together() -> None:
    prompts = tuple(i % 10 for i in range(40))
    batches = planned(Examples((5,) * 40, prompts), BatchSize(4, is_by_prompt=True), rng())
    assert all(len({prompts[i] for i in batch}) == 1 for batch in batches)


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
    assert len(seen) == len(set(seen)) > 12
    assert moments.keys() == place(moments).keys() != set()
    # the next round goes on with those that are left
    train_locally(client, start, local, moments)
    left = len(shard.train) - len(seen)
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
