"""Each method's step against its equation, on quadratics whose local training has a closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpref.algorithms import (
    FSMGDA,
    Clustered,
    DecDPO,
    Ditto,
    FedCMOO,
    FedDPA,
    FedPer,
    FedSA,
    Scaffold,
    fedcmoo,
)
from fedpref.engines import Simulation
from fedpref.engines.per_client import stored
from fedpref.federation import aggregation
from fedpref.federation.local_training import place, train_locally
from fedpref.federation.objectives import jacobian
from fedpref.federation.verbs import Client
from fedpref.models.own_parts import HEAD, OWN_ADAPTER, Parts
from fedpref.numerics import trees
from fedpref.numerics.trees import Tree
from test_optimisers import CLIENTS, PLAIN, Bowl, Bowls, local_change

STEPS, RATE = PLAIN.steps, PLAIN.learning_rate
START = 2.0


class Sums(Bowls):
    """The quadratic of the sum of all parameters: a shared part and a client's own have the same
    gradient.
    """

    names: tuple[str, ...] = ("x",)
    own: tuple[str, ...] = ()

    def __init__(self, *names: str, own: Sequence[str] = ()) -> None:
        self.names, self.own = names, tuple(own)

    def init(self, rng: torch.Generator) -> Tree:
        return {name: torch.full((2,), START / len(self.names)) for name in self.names}

    def parts(self, settings: Parts, rng: torch.Generator) -> Tree:
        self.asked = settings
        return {name: torch.zeros(2) for name in self.own}

    def losses(self, params: Tree, batch: Bowl) -> tuple[Tensor, Mapping[str, float]]:
        whole = torch.stack([params[name] for name in (*self.names, *self.own)]).sum(0)
        return (0.5 * batch.curvature * (whole - batch.centre).square().sum())[None], {}


def driven(
    algorithm: Any,
    task: Any,
    rounds: int,
    clients: Sequence[tuple[float, float]] = CLIENTS,
    cohorts: Sequence[Sequence[int]] | None = None,
) -> Any:
    """The state after so many rounds."""
    shards = [Bowl(str(i), *numbers) for i, numbers in enumerate(clients)]
    engine = Simulation(task, shards, seed=0, rounds=rounds)
    state = algorithm.init(engine, task.init(torch.Generator()))
    for round in range(rounds):
        engine.begin(round, cohorts[round] if cohorts else engine.clients)
        state, _ = algorithm.step(engine, state)
    return state


def of(values: Any, client: int, name: str) -> float:
    first, second = stored(values)[client][name].tolist()
    assert first == second
    return float(first)


def shared_change(whole: float, curvature: float, centre: float) -> float:
    """What each of two parts that add up to `whole` changes by, trained together."""
    return local_change(whole, 2 * curvature, centre) / 2


def test_dittos_own_adapter_follows_its_loss_and_the_pull_of_the_shared_one() -> None:
    strength, rounds = 0.7, 3
    state = driven(Ditto(local=PLAIN, strength=strength), Bowls(), rounds)
    shared, own = START, [START, START]
    for _ in range(rounds):
        for i, (curvature, centre) in enumerate(CLIENTS):
            # c/2 (x - m)^2 + s/2 (x - w)^2 is a quadratic of curvature c + s
            both = curvature + strength
            middle = (curvature * centre + strength * shared) / both
            own[i] += local_change(own[i], both, middle)
        shared += sum(local_change(shared, *numbers) for numbers in CLIENTS) / 2
    assert state.adapter["x"][0].item() == pytest.approx(shared, rel=1e-5)
    assert [of(state.own, i, "x") for i in (0, 1)] == pytest.approx(own, rel=1e-5)


def test_ditto_counts_what_both_adapters_are_trained_on() -> None:
    class Counting(Bowls):
        def losses(self, params: Tree, batch: Bowl) -> tuple[Tensor, Mapping[str, float]]:
            return super().losses(params, batch)[0], {"num_pairs": 1.0}

    shards = [Bowl(str(i), *numbers) for i, numbers in enumerate(CLIENTS)]
    engine = Simulation(Counting(), shards, seed=0, rounds=1)
    engine.begin(0, engine.clients)
    method = Ditto(local=PLAIN, personal=replace(PLAIN, steps=2))
    _, told = method.step(engine, method.init(engine, {"x": torch.zeros(2)}))
    assert told["num_pairs"] == len(CLIENTS) * (PLAIN.steps + 2)


def test_dittos_own_adapter_may_be_trained_otherwise() -> None:
    personal = replace(PLAIN, steps=2)
    state = driven(Ditto(local=PLAIN, strength=0.0, personal=personal), Bowls(), 1)
    own = [START + local_change(START, *numbers, steps=2) for numbers in CLIENTS]
    assert [of(state.own, i, "x") for i in (0, 1)] == pytest.approx(own, rel=1e-5)


def test_feddpas_adapters_are_added_and_trained_together() -> None:
    name, rounds = OWN_ADAPTER + "x", 3
    task = Sums("x", own=[name])
    state = driven(FedDPA(local=PLAIN), task, rounds)
    assert task.asked == Parts(head=None, bottleneck=0, reward=False), "an adapter and no more"
    shared, own = START, [0.0, 0.0]
    for _ in range(rounds):
        changes = [shared_change(shared + own[i], *numbers) for i, numbers in enumerate(CLIENTS)]
        own = [before + change for before, change in zip(own, changes, strict=True)]
        shared += sum(changes) / 2
    assert state.adapter["x"][0].item() == pytest.approx(shared, rel=1e-5)
    assert [of(state.own, i, name) for i in (0, 1)] == pytest.approx(own, rel=1e-5)


def test_fedsa_averages_a_and_keeps_b() -> None:
    a, b, rounds = "w.lora_A.weight", "w.lora_B.weight", 3
    state = driven(FedSA(local=PLAIN), Sums(a, b), rounds)
    shared, own = START / 2, [START / 2, START / 2]
    for _ in range(rounds):
        changes = [shared_change(shared + own[i], *numbers) for i, numbers in enumerate(CLIENTS)]
        own = [before + change for before, change in zip(own, changes, strict=True)]
        shared += sum(changes) / 2
    assert state.adapter.keys() == {a}
    assert stored(state.own)[0].keys() == {b}
    assert state.adapter[a][0].item() == pytest.approx(shared, rel=1e-5)
    assert [of(state.own, i, b) for i in (0, 1)] == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("phases", ["joint", "alternate"])
def test_fedper_trains_head_and_adapter_together_and_fedrep_the_head_first(phases: Any) -> None:
    method = FedPer(local=PLAIN, phases=phases, personal_steps=2, head_rate=1.0)
    rounds = 2
    state = driven(method, Sums("x", own=[HEAD]), rounds)
    shared, own = START, [0.0, 0.0]
    for _ in range(rounds):
        changes = []
        for i, (curvature, centre) in enumerate(CLIENTS):
            if phases == "joint":
                change = shared_change(shared + own[i], curvature, centre)
                own[i] += change
            else:
                own[i] += local_change(shared + own[i], curvature, centre, steps=2)
                change = local_change(shared + own[i], curvature, centre, steps=STEPS - 2)
            changes.append(change)
        shared += sum(changes) / 2
    assert state.adapter["x"][0].item() == pytest.approx(shared, rel=1e-5)
    assert [of(state.own, i, HEAD) for i in (0, 1)] == pytest.approx(own, rel=1e-5)


def test_clusters_are_of_clients_with_the_least_loss_and_average_over_these() -> None:
    clients = ((1.0, 4.0), (3.0, 0.0), (1.0, 5.0))
    state = driven(Clustered(local=PLAIN, clusters=2), Bowls(), 3, clients)
    # in the first round clients take turns: 0 and 2 train the first adapter, 1 the second, and
    # from then on each of them has the least loss with the one that it trained
    first, second = START, START
    for _ in range(3):
        first += sum(local_change(first, *clients[i]) for i in (0, 2)) / 2
        second += local_change(second, *clients[1])
    assert state.adapters["0/x"][0].item() == pytest.approx(first, rel=1e-5)
    assert state.adapters["1/x"][0].item() == pytest.approx(second, rel=1e-5)
    chosen = [of(state.chosen, i, "x") for i in range(3)]
    assert chosen == pytest.approx([first, second, first], rel=1e-5)


def test_clients_of_the_first_cohort_take_all_adapters_in_turn() -> None:
    clients = ((1.0, 4.0), (3.0, 0.0), (1.0, 5.0))
    state = driven(Clustered(local=PLAIN, clusters=2), Bowls(), 1, clients, [(0, 2)])
    moved = [state.adapters[f"{k}/x"][0].item() for k in (0, 1)]
    expected = [START + local_change(START, *clients[i]) for i in (0, 2)]
    assert moved == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("num_iterations", "draws"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_a_batch_is_used_for_so_many_updates(num_iterations: int, draws: int) -> None:
    class Counting(Bowls):
        count = 0

        def draw(self, *arguments: Any) -> Bowl:
            self.count += 1
            batch: Bowl = super().draw(*arguments)
            return batch

    task = Counting()
    local = replace(PLAIN, steps=4, num_iterations=num_iterations)
    client = Client(0, task, Bowl("0", *CLIENTS[0]), torch.Generator(), 0, 1)
    train_locally(client, task.init(torch.Generator()), local, {})
    assert task.count == draws


def test_moments_that_were_handed_over_stay_as_they_are() -> None:
    local = replace(PLAIN, optim="adamw", keep_optimizer=True)
    client = Client(0, Bowls(), Bowl("0", *CLIENTS[0]), torch.Generator(), 0, 1)
    theta, moments, _ = train_locally(client, Bowls().init(torch.Generator()), local, {})
    before = {name: tensor.clone() for name, tensor in moments.items()}
    after = train_locally(client, theta, local, moments)[1]
    assert moments.keys() == before.keys() == after.keys()
    for name, tensor in moments.items():
        assert torch.equal(tensor, before[name])
        # this task draws nothing from its data, so that its place there stays
        assert torch.equal(tensor, after[name]) == (name in place(moments))


def test_decdpo_mixes_after_training_or_before() -> None:
    def step(x: float, client: int) -> float:
        return x + local_change(x, *CLIENTS[client])

    after = driven(DecDPO(local=PLAIN, order="adapt-then-combine"), Bowls(), 2)
    x = START
    for _ in range(2):  # everybody hears everybody, so that all have the mean
        x = sum(step(x, i) for i in (0, 1)) / 2
    assert [of(after.theta, i, "x") for i in (0, 1)] == pytest.approx([x, x], rel=1e-5)

    before = driven(DecDPO(local=PLAIN, order="combine-then-adapt"), Bowls(), 2)
    middle = sum(step(START, i) for i in (0, 1)) / 2
    expected = [step(middle, i) for i in (0, 1)]
    assert [of(before.theta, i, "x") for i in (0, 1)] == pytest.approx(expected, rel=1e-5)


class Pair(Bowls):
    """Two objectives in the plane: each draws along its own axis, as far as the client says."""

    objectives = ("first", "second")

    def parts(self, settings: Parts, rng: torch.Generator) -> Tree:
        return {}

    def losses(self, params: Tree, batch: Bowl) -> tuple[Tensor, Mapping[str, float]]:
        return self.of(params["x"], batch.curvature, batch.centre), {}

    @staticmethod
    def of(x: Tensor, curvature: float, centre: float) -> Tensor:
        goals = torch.tensor([[5.0 + centre, START], [START, 6.0 + centre]])
        return 0.5 * curvature * (x - goals).square().sum(1)


def test_fsmgda_takes_the_min_norm_combination_of_mean_changes() -> None:
    method = FSMGDA(local=PLAIN, server_learning_rate=0.5)
    state = driven(method, Pair(), 1)
    x = torch.full((2,), START)
    changes = []
    for m in (0, 1):
        ends = []
        for curvature, centre in CLIENTS:
            goal = torch.tensor([[5.0 + centre, START], [START, 6.0 + centre]])[m]
            ends.append((1 - (1 - RATE * curvature) ** STEPS) * (goal - x))
        changes.append(torch.stack(ends).mean(0))
    apart = changes[1] - changes[0]
    share = float((apart @ changes[1]) / (apart @ apart))  # of the first, at the least length
    assert 0.001 < share < 0.999
    expected = x + 0.5 * (share * changes[0] + (1 - share) * changes[1])
    assert state.adapter["x"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_fedcmoos_sketches_of_all_objectives_are_as_many_numbers_as_the_adapter() -> None:
    client = Client(0, Pair(), Bowl("0", *CLIENTS[0]), torch.Generator(), 0, 1)
    adapter = Pair().init(torch.Generator())
    numbers = fedcmoo.sketch(client, adapter, {}, FedCMOO(local=PLAIN))["sketch"]
    assert numbers.shape == (2, 1)
    # one group: each objective's gradient, summed up with the same signs
    theta = {"x": adapter["x"].clone().requires_grad_()}
    rows = jacobian(client.task.losses(theta, client.shard)[0], theta)
    signs = aggregation.signs(2, 0)
    assert numbers[:, 0].tolist() == pytest.approx((rows * signs).sum(1).tolist())


class Parallel(Pair):
    """Two objectives of which one draws the same way as the other, and further."""

    @staticmethod
    def of(x: Tensor, curvature: float, centre: float) -> Tensor:
        goals = torch.tensor([[3.0, 3.0], [12.0, 12.0]])
        return 0.5 * (x - goals).square().sum(1)


def test_fsmgda_keeps_every_weight_above_a_thousandth() -> None:
    state = driven(FSMGDA(local=PLAIN), Parallel(), 1)
    near, far = (local_change(START, 1.0, goal) for goal in (3.0, 12.0))
    # the least length is that of the nearer one alone; weights of 0.999 and 0.001 sum to one
    expected = START + 0.999 * near + 0.001 * far
    assert state.adapter["x"][0].item() == pytest.approx(expected, rel=1e-5)


def test_scaffolds_mean_control_variate_moves_by_the_cohorts_share() -> None:
    state = driven(Scaffold(local=PLAIN), Bowls(), 2, cohorts=[(0,), (1,)])
    x, control, own = START, 0.0, [0.0, 0.0]
    for client in (0, 1):
        curvature, centre = CLIENTS[client]
        seen, y = 0.0, x
        for _ in range(STEPS):
            gradient = curvature * (y - centre)
            seen += gradient / STEPS
            y -= RATE * (gradient - own[client] + control)
        x, control = y, control + (seen - own[client]) * 1 / 2
        own[client] = seen
    assert state.adapter["x"][0].item() == pytest.approx(x, rel=1e-5)
    assert state.control["x"][0].item() == pytest.approx(control, rel=1e-5)
    assert [of(state.own, i, "x") for i in (0, 1)] == pytest.approx(own, rel=1e-5)


class Sized(Bowl):
    """A quadratic that so many examples stand for."""

    size: int = 1

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize("newcomers", [pytest.param((), marks=pytest.mark.slow), (3,)])
@pytest.mark.long
def test_scaffold_converges_to_the_weighted_optimum_of_clients_of_any_size(
    newcomers: tuple[int, ...],
) -> None:
    numbers = [(400, 0.5, 3.0), (100, 1.5, -1.0), (20, 1.0, 4.0), (50, 2.0, 9.0)]
    shards = []
    for size, curvature, centre in numbers:
        shard = Sized(str(size), curvature, centre)
        object.__setattr__(shard, "size", size)
        shards.append(shard)
    training = [i for i in range(4) if i not in newcomers]
    task: Any = Bowls()
    engine = Simulation(task, shards, seed=0, rounds=900, newcomers=newcomers)
    method = Scaffold(local=PLAIN)
    state = method.init(engine, task.init(torch.Generator()))
    draw = torch.Generator().manual_seed(1)
    for round in range(900):
        chosen = torch.randperm(len(training), generator=draw)[:2].tolist()
        engine.begin(round, sorted(training[i] for i in chosen))
        state, _ = method.step(engine, state)
    weights = {i: numbers[i][0] / sum(numbers[j][0] for j in training) for i in training}
    pulls = {i: weights[i] * numbers[i][1] for i in training}
    optimum = sum(pulls[i] * numbers[i][2] for i in training) / sum(pulls.values())
    assert state.adapter["x"][0].item() == pytest.approx(optimum, abs=1e-4)
    mean = sum(weights[i] * of(state.own, i, "x") for i in training)
    assert state.control["x"][0].item() == pytest.approx(mean, abs=1e-4)


def test_the_servers_weights_do_not_depend_on_how_many_clients_a_mean_is_of() -> None:
    """The published constant is for a sum of gradients; of short ones it would hide the answer."""
    rows = torch.tensor([[6e-4, 0.0], [0.0, 1.6e-3]])
    method = FedCMOO(weights_learning_rate=0.1)
    of_sum = method.weigh((20 * rows) @ (20 * rows).T, None, 1)
    assert method.weigh(rows @ rows.T, None, 20).tolist() == pytest.approx(of_sum.tolist())
    assert abs(float(method.weigh(rows @ rows.T, None, 1)[0] - of_sum[0])) > 0.05


def test_nested_trees_come_apart_again() -> None:
    both = {0: {"a": torch.ones(1)}, 10: {"a": torch.zeros(1), "b/c": torch.ones(2)}}
    nested = trees.nest(both)
    assert nested.keys() == {"0/a", "10/a", "10/b/c"}
    assert all(trees.part(nested, key).keys() == tree.keys() for key, tree in both.items())
    assert trees.part(nested, 1) == {}, "10/... is not under 1"
