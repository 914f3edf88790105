"""The optimisers of federated learning, on quadratics whose answers are known in closed form."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from fedpref import Experiment, UserError, config
from fedpref.algorithms import FedBuff, FedDPO, FedEF, FedOpt, FedProx, Scaffold, StaleFedDPO
from fedpref.algorithms.fedopt import Adaptive, Momentum
from fedpref.engines import Simulation
from fedpref.engines.per_client import stored
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.participation import Arrivals, Participation
from fedpref.federation.verbs import Client, work
from fedpref.numerics import seeds
from fedpref.numerics.trees import Tree
from fedpref.tasks import BatchSize

# Two clients with losses 1/2 curvature |x - centre|^2, whose mean has its minimum at (1 * 4 + 3 *
# 0) / 4 = 1
CLIENTS = ((1.0, 4.0), (3.0, 0.0))
PLAIN = LocalTraining(
    steps=5,
    optim="sgd",
    learning_rate=0.1,
    lr_scheduler_type="constant",
    warmup_ratio=0.0,
    max_grad_norm=1e9,
)


@dataclass(frozen=True)
class Bowl:
    """A client's quadratic."""

    name: str
    curvature: float
    centre: float

    def __len__(self) -> int:
        return 1


class Bowls:
    """The task of finding the lowest point of the clients' mean; gradients are exact."""

    description = "quadratics"
    device = torch.device("cpu")
    devices = 1

    def move_to(self, worker: int) -> None:
        pass

    def init(self, rng: torch.Generator) -> Tree:
        return {"x": torch.full((2,), 2.0)}

    def prepare(self, shard: Bowl, cache: Path) -> Bowl:
        return shard

    def draw(
        self, params: Tree, start: Tree, shard: Bowl, size: BatchSize, rng: torch.Generator
    ) -> Bowl:
        return shard

    def batches(self, shard: Bowl) -> Iterator[tuple[Bowl, float]]:
        yield shard, 0.25
        yield shard, 0.75

    def choices(self, params: Tree, shard: Bowl) -> Float[Tensor, " n"]:
        """Which coordinates lie above the centre."""
        return (params["x"] > shard.centre).float()

    def losses(self, params: Tree, batch: Bowl) -> tuple[Float[Tensor, 1], Mapping[str, float]]:
        return (0.5 * batch.curvature * (params["x"] - batch.centre).square().sum())[None], {}

    def evaluate(self, params: Tree, shard: Bowl) -> Mapping[str, float]:
        return {"num_examples": 1.0}

    def export(self, params: Tree, folder: Path) -> None:
        raise NotImplementedError


def run(
    algorithm: Any, rounds: int, cohorts: Sequence[Sequence[int]] = ((0, 1),)
) -> tuple[float, Any]:
    """Where both coordinates of the shared point end, and the last state."""
    shards = [Bowl(str(i), *numbers) for i, numbers in enumerate(CLIENTS)]
    task: Any = Bowls()
    engine = Simulation(task, shards, seed=0, rounds=rounds)
    state = algorithm.init(engine, task.init(torch.Generator()))
    for round in range(rounds):
        engine.begin(round, cohorts[round % len(cohorts)])
        state, _ = algorithm.step(engine, state)
    first, second = state.adapter["x"].tolist()
    assert first == second
    return first, state


def local_change(
    x: float,
    curvature: float,
    centre: float,
    steps: int = PLAIN.steps,
    rate: float = PLAIN.learning_rate,
) -> float:
    return (1 - (1 - rate * curvature) ** steps) * (centre - x)


def mean_change(x: float) -> float:
    return sum(local_change(x, *numbers) for numbers in CLIENTS) / len(CLIENTS)


@pytest.mark.parametrize("send", ["weights", "changes"])
def test_stale_clients_start_from_the_adapters_that_they_drew(send: Any) -> None:
    method = StaleFedDPO(local=PLAIN, staleness=3, send=send)
    history, rounds = [2.0], 12
    for round in range(rounds):
        changes = []
        for client, numbers in enumerate(CLIENTS):
            rng = seeds.generator(0, "train", round=round, call=1, client=client)
            age = int(torch.randint(min(3, round) + 1, (), generator=rng)) if round else 0
            start = history[-1 - age]
            end = start + local_change(start, *numbers)
            changes.append(end - history[-1] if send == "weights" else end - start)
        history.append(history[-1] + sum(changes) / len(changes))
    task: Any = Bowls()
    engine = Simulation(
        task, [Bowl(str(i), *numbers) for i, numbers in enumerate(CLIENTS)], seed=0, rounds=rounds
    )
    state = method.init(engine, task.init(torch.Generator()))
    found, ages = [], set[float]()
    for round in range(rounds):
        engine.begin(round, (0, 1))
        state, metrics = method.step(engine, state)
        (adapter,) = method.model(state)
        found.append(float(cast(Tree, adapter)["x"][0]))
        ages.add(metrics["age"])
    assert found == pytest.approx(history[1:], abs=1e-5)
    assert max(ages) > 1


def test_fedbuff_weighs_changes_of_what_each_client_started_from_by_age() -> None:
    method = FedBuff(local=PLAIN, staleness=2, server_learning_rate=0.5)
    drawn = [{0: 0, 1: 0}, {0: 1, 1: 0}, {1: 2}, {0: 3, 1: 1}, {0: 2, 1: 0}]
    history = [2.0]
    for ages in drawn:
        changes = []
        for client, age in ages.items():
            start = history[-1 - age] if age <= 2 else 0.0
            change = local_change(start, *CLIENTS[client]) / (1 + age) ** 0.5
            changes.append(change if age <= 2 else 0.0)
        history.append(history[-1] + 0.5 * sum(changes) / len(changes))
    task: Any = Bowls()
    shards = [Bowl(str(i), *numbers) for i, numbers in enumerate(CLIENTS)]
    engine = Simulation(task, shards, seed=0, rounds=len(drawn))
    state = method.init(engine, task.init(torch.Generator()))
    found, told = [], []
    for round, ages in enumerate(drawn):
        engine.begin(round, tuple(ages))
        engine.ages = ages
        state, metrics = method.step(engine, state)
        (adapter,) = method.model(state)
        found.append(float(cast(Tree, adapter)["x"][0]))
        told.append((metrics["age"], metrics["too_old"]))
    assert found == pytest.approx(history[1:], abs=1e-5)
    assert told[3] == (2.0, 0.5)


def test_fedbuff_of_clients_that_wait_is_feddpo() -> None:
    task: Any = Bowls()
    ends = []
    for method in (FedBuff(local=PLAIN), FedDPO(local=PLAIN)):
        shards = [Bowl(str(i), *numbers) for i, numbers in enumerate(CLIENTS)]
        engine = Simulation(task, shards, seed=0, rounds=4)
        state: Any = method.init(engine, task.init(torch.Generator()))
        for round in range(4):
            engine.begin(round, (0, 1))
            state, _ = method.step(engine, state)
        (adapter,) = method.model(state)
        ends.append(float(cast(Tree, adapter)["x"][0]))
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


@pytest.mark.parametrize(("fraction", "rounds"), [(1.0, 4), (0.5, 300)])
def test_what_is_not_sent_is_sent_later_and_nothing_is_lost(fraction: float, rounds: int) -> None:
    task: Any = Bowls()
    shards = [Bowl(str(i), *numbers) for i, numbers in enumerate(CLIENTS)]
    engine = Simulation(task, shards, seed=0, rounds=rounds)
    method = FedEF(local=replace(PLAIN, steps=1), fraction=fraction)
    start = torch.tensor([2.0, -3.0])
    state = method.init(engine, {"x": start})
    wanted = start
    for number in range(rounds):
        engine.begin(number, (0, 1))
        before = state.adapter["x"]
        state, _ = method.step(engine, state)
        changes = [0.1 * curvature * (centre - before) for curvature, centre in CLIENTS]
        wanted = wanted + torch.stack(changes).mean(0)
        unsent = [stored(state.unsent)[i]["x"] for i in (0, 1)]
        assert all((left == 0).sum() >= 2 * fraction for left in unsent)
        got = state.adapter["x"] + torch.stack(unsent).mean(0)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    if rounds > 100:  # the minimum of the mean, though half of each change comes late
        assert state.adapter["x"].tolist() == pytest.approx([1.0, 1.0], abs=0.35)


def test_who_is_done_first_comes_first_and_nobody_twice_in_a_step() -> None:
    how = Participation(clients_per_round=3, concurrency=7, speed_spread=1.0)
    weights = [1.0] * 12 + [0.0]
    made = how.arrivals(weights, 5)
    steps = [dict(made.ages_of(step)) for step in range(40)]
    times = [made.time_of(step) for step in range(40)]
    assert all(len(step) == 3 and 12 not in step for step in steps)
    assert times == sorted(times)
    assert set(steps[0].values()) == {0}
    assert all(0 <= age <= k for k, step in enumerate(steps) for age in step.values())
    # seven at work for three a step: what comes is some 7 / 3 steps old, on average
    ages = [age for step in steps[10:] for age in step.values()]
    assert 1 < sum(ages) / len(ages) < 7 / 3 + 0.5
    # a step does not wait for the slowest, as three that wait for one another do
    waiting = sum(max(how.time(5, i, k) for i in step) for k, step in enumerate(steps))
    assert times[-1] < 0.8 * waiting
    again = Participation(clients_per_round=3, concurrency=7, speed_spread=1.0)
    fresh = Arrivals(range(12), 5, again)
    assert [dict(fresh.ages_of(step)) for step in (39, 0)] == [steps[39], steps[0]]
    assert how.cohort(weights, 5, 3) == (tuple(sorted(steps[3])), 0)


def test_more_at_work_than_there_are_clients_is_all_of_them() -> None:
    how = Participation(clients_per_round=2, concurrency=50)
    made = how.arrivals([1.0] * 3, 0)
    assert all(len(made.ages_of(step)) == 2 for step in range(20))


@pytest.mark.parametrize(
    ("federation", "algorithm", "message"),
    [
        ({"concurrency": 4}, "fedbuff", "clients_per_round does not fit"),
        ({"concurrency": 4, "clients_per_round": 2}, "feddpo", "does not know what is old"),
        (
            {"concurrency": 4, "clients_per_round": 2, "deadline": 2.0},
            "fedbuff",
            "federation.deadline does not fit",
        ),
    ],
)
def test_what_does_not_go_with_waiting_for_nobody_is_refused(
    federation: dict[str, Any], algorithm: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config.parse(
            Experiment, {"federation": federation, "algorithm": {"name": algorithm}}, "test"
        )


def test_feddpo_has_the_drift_floor_of_federated_averaging() -> None:
    pulls = [1 - (1 - 0.1 * curvature) ** 5 for curvature, _ in CLIENTS]
    floor = sum(pull * centre for pull, (_, centre) in zip(pulls, CLIENTS, strict=True)) / sum(
        pulls
    )
    assert run(FedDPO(local=PLAIN), 60)[0] == pytest.approx(floor, abs=1e-4)
    assert abs(floor - 1.0) > 0.2


@pytest.mark.parametrize("cohorts", [((0, 1),), ((0,), (1,))], ids=["everybody", "one at a time"])
@pytest.mark.long
def test_scaffold_removes_the_drift_floor(cohorts: Sequence[Sequence[int]]) -> None:
    found, state = run(Scaffold(local=PLAIN), 300, cohorts)
    assert found == pytest.approx(1.0, abs=1e-3)
    # the mean gradient, at the minimum
    assert state.control["x"].tolist() == pytest.approx([0.0, 0.0], abs=1e-2)


def test_scaffolds_control_variates_are_the_papers_option_two_under_plain_sgd() -> None:
    _, state = run(Scaffold(local=PLAIN), 1)
    # after the first round, which is uncorrected
    own = [state.own[i]["x"][0].item() for i in range(2)]
    assert own == pytest.approx(
        [-local_change(2.0, *numbers) / (PLAIN.steps * PLAIN.learning_rate) for numbers in CLIENTS],
        rel=1e-5,
    )
    assert state.control["x"][0].item() == pytest.approx(sum(own) / 2, rel=1e-5)


@pytest.mark.long
def test_scaffold_is_right_for_adamw() -> None:
    """AdamW fed with uncorrected gradients ends where its signs balance; corrected, at the minimum
    of the mean.
    """
    adam = replace(PLAIN, optim="adamw", learning_rate=0.02, lr_scheduler_type="linear")
    assert abs(run(FedDPO(local=adam), 200)[0] - 1.0) > 0.1
    assert run(Scaffold(local=adam), 200)[0] == pytest.approx(1.0, abs=0.02)


def test_fedprox_is_feddpo_without_its_term_and_stands_still_under_a_strong_one() -> None:
    assert run(FedProx(mu=0.0, local=PLAIN), 4)[0] == run(FedDPO(local=PLAIN), 4)[0]
    stiff = replace(PLAIN, learning_rate=1e-3)
    assert (
        abs(run(FedProx(mu=900.0, local=stiff), 1)[0] - 2.0)
        < abs(run(FedDPO(local=stiff), 1)[0] - 2.0) / 2
    )


def test_fedproxs_step_is_that_of_its_objective() -> None:
    mu, x = 0.7, 2.0
    changes = []
    for curvature, centre in CLIENTS:
        theta = x
        for _ in range(PLAIN.steps):
            theta -= PLAIN.learning_rate * (curvature * (theta - centre) + mu * (theta - x))
        changes.append(theta - x)
    assert run(FedProx(mu=mu, local=PLAIN), 1)[0] == pytest.approx(x + sum(changes) / 2, rel=1e-6)


def test_server_momentum_without_momentum_is_feddpo_and_with_it_the_heavy_ball() -> None:
    assert (
        run(FedOpt(server=Momentum(beta=0.0), local=PLAIN), 3)[0] == run(FedDPO(local=PLAIN), 3)[0]
    )
    x, velocity = 2.0, 0.0
    for _ in range(3):
        velocity = 0.5 * velocity + mean_change(x)
        x += 0.8 * velocity
    assert run(FedOpt(server=Momentum(beta=0.5, learning_rate=0.8), local=PLAIN), 3)[
        0
    ] == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad"])
def test_adaptive_servers_follow_algorithm_two(name: Any) -> None:
    server = Adaptive(name=name, learning_rate=0.3, beta1=0.4, beta2=0.6, tau=0.05)
    x, m, v = 2.0, 0.0, 0.05**2
    for _ in range(4):
        change = mean_change(x)
        m = 0.4 * m + 0.6 * change
        if name == "adagrad":
            v += change**2
        elif name == "yogi":
            v -= 0.4 * change**2 * (1 if v > change**2 else -1)
        else:
            v = 0.6 * v + 0.4 * change**2
        x += 0.3 * m / (v**0.5 + 0.05)
    assert run(FedOpt(server=server, local=PLAIN), 4)[0] == pytest.approx(x, rel=1e-4)


@dataclass
class Placed(Bowls):
    """Remembers its place."""

    number: int = -1

    def move_to(self, worker: int) -> None:
        self.number = worker


@work("test_optimisers.where")
def where(client: Client) -> Mapping[str, float]:
    time.sleep(0.05)  # so that no worker does it all
    return {"number": float(cast(Placed, client.task).number)}


def test_every_worker_takes_a_place_of_its_own_and_leaves_the_first_process_alone() -> None:
    task = Placed()
    shards = [Bowl(str(i), 1.0, 0.0) for i in range(6)]
    engine = Simulation(cast(Any, task), shards, seed=0, rounds=1, workers=2)
    found = [row["number"] for row in engine.disclose(engine.each(where)).values()]
    engine.close()
    assert set(found) == {0.0, 1.0}
    assert task.number == -1
    Simulation(cast(Any, task), shards, seed=0, rounds=1)
    assert task.number == 0


def test_local_training_keeps_nothing_behind() -> None:
    """Seeding with torch.manual_seed keeps a traceback of each call for devices that are not in
    use.
    """
    kept = len(torch.cuda._queued_calls)
    run(FedDPO(local=PLAIN), 5)
    assert len(torch.cuda._queued_calls) == kept


@pytest.mark.parametrize(
    "moments",
    [
        {"exp_avg/x": torch.zeros(1)},
        {"exp_avg/x": torch.zeros(2, dtype=torch.float64)},
        {"step/x": torch.zeros(2)},
        {"exp_avg/y": torch.zeros(2)},
        {"lr/x": torch.zeros(2)},
        {"x": torch.zeros(2)},
    ],
)
def test_moments_that_do_not_fit_are_refused_before_a_kernel_reads_them(moments: Tree) -> None:
    task: Any = Bowls()
    client = Client(0, task, Bowl("0", *CLIENTS[0]), torch.Generator(), 0, 1)
    start = task.init(torch.Generator())
    local = LocalTraining(steps=1, keep_optimizer=True)
    with pytest.raises(ValueError, match="is no moment of what is trained"):
        train_locally(client, start, local, moments)
    _, kept, _ = train_locally(client, start, local, {})
    assert train_locally(client, start, local, kept)[0]["x"].shape == (2,)
