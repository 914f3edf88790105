"""Decentralised DPO: its mixing, its consensus error, and what it equals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpref import Experiment, UserError, config, resume, run
from fedpref.algorithms import DecDPO, GradientTracking, StaleDecDPO
from fedpref.algorithms.choco import gossip
from fedpref.channel import Bfloat16, LowRank, Quantize, Sender, TopK
from fedpref.engines import Simulation
from fedpref.federation.aggregation import Factors, Product
from fedpref.federation.common import own_copy
from fedpref.federation.consensus import consensus_error
from fedpref.federation.network import Network
from fedpref.federation.verbs import Client, work
from fedpref.numerics import seeds, trees
from fedpref.numerics.topology import (
    ErdosRenyi,
    GraphFile,
    Matrix,
    OnePeerExponential,
    Shape,
    mixing,
)
from fedpref.numerics.trees import Tree
from test_optimisers import CLIENTS, PLAIN, Bowl, Bowls

NAMES = [f"client-{i}" for i in range(6)]


@work("test_decdpo.draw")
def draw(client: Client, start: Tree) -> Tree:
    return {name: torch.randn(tensor.shape, generator=client.rng) for name, tensor in start.items()}


@work("test_decdpo.far")
def far(client: Client, start: Tree) -> Tree:
    return {name: torch.full_like(tensor, 100.0) for name, tensor in start.items()}


class Shard:
    def __len__(self) -> int:
        return 1


class Task:
    """All that mixing needs of a task."""

    def move_to(self, number: int) -> None: ...


def engine(network: Network = Network(), count: int = 6) -> Any:
    names = NAMES[:count]

    def mixing(round: int, active: Sequence[int]) -> Matrix:
        return network.matrix(names, 0, round, active)

    task: Any = Task()
    shards: list[Any] = [Shard()] * count
    return Simulation(task, shards, seed=0, rounds=4, links=network.links, mixing=mixing)


START = {"a": torch.zeros(40, 30), "b": torch.zeros(500)}


def stacked(fed: Any, values: Any) -> np.ndarray[Any, Any]:
    return np.stack(
        [torch.cat([t.flatten() for t in values[i].values()]).double().numpy() for i in fed.active]
    )


def test_one_process_refuses_what_a_site_would_not_send_under_masks() -> None:
    task: Any = Task()
    shards: list[Any] = [Shard()] * 6
    fed = Simulation(task, shards, seed=0, rounds=1, as_integers=True)
    small = fed.each(draw, START)
    mean, expected = fed.mean(small), stacked(fed, small).mean(0)
    found = torch.cat([tensor.flatten() for tensor in mean.values()]).double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    large = fed.each(far, START)
    with pytest.raises(UserError, match="holds a number beyond 64"):  # a sixth of it does not
        fed.mean(large)


def test_mixing_takes_the_matrix_and_counts_what_goes_over_each_link() -> None:
    fed = engine()
    values = fed.each(draw, START)
    before, sent = stacked(fed, values), fed.traffic.bytes_up
    mixed = stacked(fed, fed.mix(values)[1])
    np.testing.assert_allclose(mixed, mixing(Shape().graph(NAMES, 0)) @ before, atol=1e-6)
    np.testing.assert_allclose(mixed.mean(0), before.mean(0), atol=1e-6)
    assert fed.traffic.bytes_up - sent == 12 * trees.size(START)  # six links, both ways


@pytest.mark.parametrize("topology", [Shape(), OnePeerExponential()])
def test_clients_that_take_no_part_are_not_heard(topology: Any) -> None:
    network = Network(topology)
    if isinstance(topology, OnePeerExponential):
        with pytest.raises(UserError, match="directed graph"):
            network.matrix(NAMES, 0, 0, (0, 1, 3))
        return
    weights = network.matrix(NAMES, 0, 0, (0, 1, 3))
    np.testing.assert_allclose(weights.sum(0), 1)
    np.testing.assert_array_equal(weights[3], np.eye(6)[3])
    assert weights[0, 1] == pytest.approx(1 / 3)
    assert weights[0, 0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "compression", [TopK(fraction=0.2), Quantize(bits=8), Quantize(bits=3), LowRank(rank=1)]
)
def test_what_compression_loses_does_not_move_the_mean(compression: Any) -> None:
    fed = engine(Network(compression=compression))
    values = fed.each(draw, START)
    sent, mixed = fed.mix(values)
    assert fed.traffic.bytes_up < 12 * trees.size(START) * 0.45
    assert np.abs(stacked(fed, sent) - stacked(fed, values)).max() > 0.01
    np.testing.assert_allclose(stacked(fed, mixed).mean(0), stacked(fed, values).mean(0), atol=1e-5)


def test_messages_come_back_in_their_shapes_and_quantised_ones_are_right_on_average() -> None:
    tree = {"a": torch.randn(7, 3), "b": torch.tensor([0.0, 0.0, 5.0, -1.0, 0.5])}
    sender = Sender(0, 0, torch.Generator().manual_seed(0))
    for bits in (2, 3, 5, 8):
        stage = Quantize(bits=bits).stage()
        back = [stage.decode(stage.encode(tree, sender), 1) for _ in range(400)]
        step = tree["b"].abs().max() / (2 ** (bits - 1) - 1)
        assert all((one["b"] - tree["b"]).abs().max() <= step + 1e-6 for one in back)
        assert (
            torch.stack([one["b"] for one in back]).mean(0) - tree["b"]
        ).abs().max() < 0.15 * step
        assert back[0]["a"].shape == (7, 3)
    stage = TopK(fraction=0.4).stage()
    kept = stage.decode(stage.encode(tree, sender), 1)
    torch.testing.assert_close(kept["b"], torch.tensor([0.0, 0.0, 5.0, -1.0, 0.0]))
    assert int((kept["a"] != 0).sum()) == 9
    zero = {"a": torch.zeros(4), "share": torch.tensor(1.0), "nothing": torch.zeros(0, 3)}
    for compression in (Quantize(), Bfloat16(), TopK(), LowRank()):
        stage = compression.stage()
        back = stage.decode(stage.encode(zero, sender), 1)
        assert back.keys() == zero.keys()
        assert all(torch.equal(back[name], zero[name]) for name in zero)


def test_what_lies_between_two_bfloat16_becomes_either_and_the_mean_is_right() -> None:
    sender, stage = Sender(0, 0, torch.Generator().manual_seed(0)), Bfloat16().stage()
    # of two neighbours 1 and 1 + 2^-7; on both sides of zero, large and small
    value = torch.tensor([1 + 2**-7 * part for part in (0.0, 0.25, 0.5, 0.9)])
    tree = {"a": torch.stack([value, -value, value * 2.0**40, value * 2.0**-40])}
    message = stage.encode(tree, sender)
    assert trees.size(message) == trees.size(tree) // 2
    back = torch.stack([stage.decode(stage.encode(tree, sender), 1)["a"] for _ in range(2000)])
    scaled = back / tree["a"][:, :1]
    assert set(scaled.flatten().tolist()) == {1.0, 1 + 2**-7}
    torch.testing.assert_close(scaled.mean(0)[0], value, atol=4e-4, rtol=0)
    torch.testing.assert_close(scaled.mean(0), scaled.mean(0)[:1].expand(4, 4), atol=6e-4, rtol=0)
    assert torch.equal(scaled[:, :, 0], torch.ones(2000, 4)), "what is one is sent as it is"


def test_factors_are_the_nearest_of_their_rank_where_they_are_fewer_numbers() -> None:
    draw = torch.Generator().manual_seed(0)
    sender, stage = Sender(0, 0, draw), LowRank(rank=2).stage()
    thin = torch.randn(12, 2, generator=draw) @ torch.randn(2, 9, generator=draw)
    tree = {
        "thin": thin,
        "full": torch.randn(12, 9, generator=draw),
        "more": torch.randn(6, 3, 4, generator=draw),
        "small": torch.randn(3, 5, generator=draw),  # 15 numbers, its factors 16
        "line": torch.randn(30, generator=draw),
        "one": torch.tensor(0.3),
    }
    message = stage.encode(tree, sender)
    back = stage.decode(message, 1)
    assert back.keys() == tree.keys()
    assert all(back[name].shape == tensor.shape for name, tensor in tree.items())
    torch.testing.assert_close(back["thin"], thin)
    for name in ("small", "line", "one"):
        assert torch.equal(back[name], tree[name])
    for name in ("full", "more"):
        values = torch.linalg.svdvals(tree[name].flatten(1))
        lost = (tree[name] - back[name]).square().sum()
        torch.testing.assert_close(lost, values[2:].square().sum())
    assert message["left/full"].shape == (12, 2)
    assert message["right/full"].shape == (2, 9)
    again = trees.low_rank(tree, 2)
    assert all(torch.equal(again[name], tensor) for name, tensor in back.items())


def test_compression_contracts_where_it_says_so_and_choco_takes_no_other(
    settings: dict[str, Any],
) -> None:
    draw = torch.Generator().manual_seed(0)
    tree = {"a": torch.randn(64, 64, generator=draw)}
    sender = Sender(0, 0, draw)
    lossy = (TopK(fraction=0.01), Quantize(bits=2), Quantize(bits=3), Quantize())
    for compression in (*lossy, Bfloat16(), LowRank(rank=1)):
        stage = compression.stage()
        lost = trees.subtract(tree, stage.decode(stage.encode(tree, sender), 1))
        assert (trees.norm(lost) < trees.norm(tree)) == compression.contracts
        network = {"compression": {"name": compression.name}}
        if isinstance(compression, Quantize):
            network["compression"]["bits"] = compression.bits  # type: ignore[assignment]
        content = {**settings, "algorithm": {"name": "choco"}, "network": network}
        # read it is, as runs of older versions are
        spec = config.parse(Experiment, content, "test")
        sizes = {f"client-{i}": 4 for i in range(3)}
        if compression.contracts:
            spec.check_clients(sizes)
            continue
        with pytest.raises(UserError, match="Take three bits or more"):
            spec.check_clients(sizes)
        other = {**content, "algorithm": {"name": "decdpo"}}
        config.parse(Experiment, other, "test").check_clients(sizes)


def test_links_fail_as_often_as_they_are_said_to_and_the_mean_stays() -> None:
    network = Network(Shape("complete"), link_failure=0.3)
    count, failed = 0, 0
    for round in range(200):
        weights = network.matrix(NAMES, 3, round, range(6))
        np.testing.assert_allclose(weights.sum(0), 1)
        np.testing.assert_allclose(weights, weights.T)
        failed += int((weights[np.triu_indices(6, 1)] == 0).sum())
        count += 15
    assert failed / count == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(
        network.matrix(NAMES, 3, 5, range(6)), network.matrix(NAMES, 3, 5, range(6))
    )


def test_the_consensus_error_is_the_mean_squared_distance_from_the_mean() -> None:
    found, exact = [], []
    for round in range(20):
        fed = engine()
        fed.begin(round, fed.clients)
        values = fed.each(draw, START)
        theta = stacked(fed, values)
        exact.append(((theta - theta.mean(0)) ** 2).sum(1).mean())
        found.append(consensus_error(fed, values))
    assert np.mean(found) == pytest.approx(np.mean(exact), rel=0.1)
    fed = engine()
    same = fed.each(own_copy, {"a": torch.full((1000,), 3.0)})
    assert abs(consensus_error(fed, same)) < 1e-6


def test_a_network_that_does_not_fit_the_clients_is_refused(tmp_path: Path) -> None:
    (tmp_path / "edges.txt").write_text("client-0 client-1\nclient-2 client-3\n")
    for network, sentence in (
        (
            Network(GraphFile(path=str(tmp_path / "edges.txt"))),
            "nothing connects the clients client-4 ",
        ),
        (Network(Shape("hypercube")), "power of two"),
        (Network(Shape("star"), weights="uniform"), "the mean is not preserved"),
        (Network(OnePeerExponential(), link_failure=0.1), "directed graph"),
    ):
        with pytest.raises(UserError, match=sentence):
            network.check(NAMES)
    Network(ErdosRenyi(probability=0.05, redraw=True)).check(NAMES)
    Network(OnePeerExponential()).check(NAMES)
    with pytest.raises(UserError, match="directed graph"):
        Network(OnePeerExponential()).check(NAMES, everybody=False)


def test_a_network_must_connect_those_who_train(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="nothing connects the clients client-1 "):
        Network(Shape("star")).check(NAMES, [1, 2, 3, 4, 5])  # the middle joins later
    Network(Shape("star")).check(NAMES, [0, 1, 2])
    sizes = {f"client-{i}": 10 for i in range(4)}
    content = {
        **settings,
        "network": {"topology": "star"},
        "federation": {"newcomers": ["client-0"]},
    }
    with pytest.raises(UserError, match="nothing connects"):
        config.parse(
            Experiment, {**content, "algorithm": {"name": "decdpo"}}, "test"
        ).check_clients(sizes)
    config.parse(Experiment, content, "test").check_clients(sizes)  # a server asks for no network


def test_there_is_no_mean_adapter_where_products_are_mixed(settings: dict[str, Any]) -> None:
    content = {
        **settings,
        "diagnostics": ["disagreement"],
        "algorithm": {"name": "decdpo", "aggregate": "product"},
    }
    with pytest.raises(UserError, match="there is none"):
        config.parse(Experiment, content, "test")


def test_a_run_refuses_a_graph_that_has_changed(settings: dict[str, Any], tmp_path: Path) -> None:
    edges = tmp_path / "edges.txt"
    edges.write_text("client-0 client-1\nclient-1 client-2\nclient-2 client-3\n")
    content = {
        **settings,
        "algorithm": {"name": "decdpo"},
        "network": {"topology": {"name": "file", "path": str(edges)}},
    }
    path = run(config.parse(Experiment, content, "test"), tmp_path / "run").path
    (path / "done").unlink(missing_ok=True)
    edges.write_text("client-0 client-1\nclient-1 client-2\nclient-1 client-3\n")
    with pytest.raises(UserError, match="not what it was"):
        resume(path)
    edges.write_bytes(b"\xff\xfe client-1")
    with pytest.raises(UserError, match="no text in UTF-8"):
        Network(GraphFile(path=str(edges))).check(NAMES[:4])


def test_a_graphs_file_is_found_again_from_anywhere(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edges.txt").write_text("client-0 client-1\nclient-1 client-2\nclient-2 client-3\n")
    monkeypatch.chdir(tmp_path)
    network = {"topology": {"name": "file", "path": "edges.txt"}}
    path = run(
        config.parse(
            Experiment,
            {**settings, "algorithm": {"name": "decdpo"}, "network": network, "rounds": 1},
            "test",
        ),
        "run",
    ).path
    assert str(tmp_path / "edges.txt") in (path / "config.yaml").read_text()


@work("test_decdpo.factors")
def factors(client: Client, ranks: tuple[int, ...], apart: float) -> Tree:
    """Factors of a product that all clients have in common and so much of their own, in a basis of
    the client's own.
    """
    common, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(client.id)
    rank = ranks[client.id % len(ranks)]
    a = torch.randn(4, 50, generator=common)[:rank] + apart * torch.randn(rank, 50, generator=own)
    b = torch.randn(40, 4, generator=common)[:, :rank] + apart * torch.randn(
        40, rank, generator=own
    )
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=client.rng))[0]
    return {"x.lora_A.w": turn @ a, "x.lora_B.w": b @ turn.T}


def products(fed: Any, values: Any) -> np.ndarray[Any, Any]:
    return np.stack(
        [(values[i]["x.lora_B.w"] @ values[i]["x.lora_A.w"]).double().numpy() for i in fed.active]
    )


def test_mixing_products_leaves_alone_what_clients_agree_on() -> None:
    fed = engine()
    theta = fed.each(factors, (4,), 0.0)
    before = products(fed, theta)
    np.testing.assert_allclose(products(fed, Product().mix(fed, theta)), before, atol=1e-3)
    assert np.abs(products(fed, Factors().mix(fed, theta)) - before).max() > 1
    assert (
        consensus_error(fed, theta, Product()) < 1e-6 < 1 < consensus_error(fed, theta, Factors())
    )


@pytest.mark.parametrize("ranks", [(4,), (4, 2)])
def test_mixed_products_are_near_the_best_of_their_rank(ranks: tuple[int, ...]) -> None:
    fed = engine()
    theta = fed.each(factors, ranks, 0.3)
    mean = np.einsum("ij,jkl->ikl", mixing(Shape().graph(NAMES, 0)), products(fed, theta))
    mixed = Product(ranks=ranks).mix(fed, theta)
    for i, found in enumerate(products(fed, mixed)):
        u, s, v = np.linalg.svd(mean[i])
        rank = ranks[i % len(ranks)]
        assert mixed[i]["x.lora_A.w"].shape == (rank, 50)
        best = np.linalg.norm(mean[i] - u[:, :rank] * s[:rank] @ v[:rank])
        assert np.linalg.norm(mean[i] - found) < 1.25 * best
    size = trees.size(theta[0])
    assert fed.traffic.bytes_up < 12 * 4 * size


def bowls(algorithm: Any, rounds: int, keep: float) -> list[float]:
    """Where two clients with quadratics end that keep so much of their own point and take the rest
    from the other.
    """
    weights = np.array([[keep, 1 - keep], [1 - keep, keep]])
    task: Any = Bowls()
    shards = [Bowl(str(i), *numbers) for i, numbers in enumerate(CLIENTS)]
    fed = Simulation(task, shards, seed=0, rounds=rounds, mixing=lambda round, active: weights)
    state = algorithm.init(fed, task.init(torch.Generator()))
    for round in range(rounds):
        fed.begin(round, (0, 1))
        state, _ = algorithm.step(fed, state)
    return [float(state.theta[i]["x"][0]) for i in (0, 1)]


def test_decdpo_ends_where_its_linear_recursion_does() -> None:
    keep, shrink = 0.8, np.array([(1 - 0.1 * curvature) ** 5 for curvature, _ in CLIENTS])
    weights, centres = (
        np.array([[keep, 1 - keep], [1 - keep, keep]]),
        np.array([centre for _, centre in CLIENTS]),
    )
    fixed = np.linalg.solve(np.eye(2) - weights * shrink, weights @ ((1 - shrink) * centres))
    assert bowls(DecDPO(local=PLAIN), 100, keep) == pytest.approx(fixed.tolist(), abs=1e-4)
    assert abs(fixed.mean() - 1.0) > 0.2  # the drift floor of local steps
    assert abs(fixed[0] - fixed[1]) > 0.3  # and the clients do not agree


@pytest.mark.parametrize("staleness", [0, 1, 10])
def test_stale_neighbours_move_no_mean(staleness: int) -> None:
    """Equal curvatures and one step: the mean's path does not depend on what clients hear."""
    alike = replace(PLAIN, steps=1)
    task: Any = Bowls()
    shards = [Bowl(str(i), 1.0, float(i)) for i in range(6)]
    fed = Simulation(
        task,
        shards,
        seed=0,
        rounds=40,
        mixing=lambda round, active: mixing(Shape().graph(NAMES, 0)),
    )
    algorithm = StaleDecDPO(local=alike, staleness=staleness)
    state = algorithm.init(fed, task.init(torch.Generator()))
    ages = set()
    for round in range(40):
        fed.begin(round, fed.clients)
        state, metrics = algorithm.step(fed, state)
        ages.add(metrics["age"])
        mean = np.mean([float(state.theta[i]["x"][0]) for i in range(6)])
        assert mean == pytest.approx(2.5 - 0.5 * 0.9 ** (round + 1), abs=1e-5)
    apart = max(abs(float(state.theta[i]["x"][0]) - mean) for i in range(6))
    # the centres reach that far, and clients stay between them however late they hear
    assert apart < 2.5
    assert max(ages) <= staleness
    assert (len(ages) > 5) == (staleness > 0)
    if not staleness:
        plain = DecDPO(local=alike)
        fed.begin(0, fed.clients, "init")
        other = plain.init(fed, task.init(torch.Generator()))
        for round in range(40):
            fed.begin(round, fed.clients)
            other, _ = plain.step(fed, other)
        assert all(
            torch.allclose(state.theta[i]["x"], other.theta[i]["x"], atol=1e-5) for i in range(6)
        )


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.long
def test_gradient_tracking_leaves_no_floor_and_no_disagreement(optim: Any) -> None:
    local = (
        PLAIN
        if optim == "sgd"
        else replace(PLAIN, optim="adamw", learning_rate=0.02, lr_scheduler_type="linear")
    )
    local = replace(local, learning_rate=0.05) if optim == "sgd" else local
    found = bowls(GradientTracking(local=local), 400, 0.8)
    assert found == pytest.approx([1.0, 1.0], abs=1e-3 if optim == "sgd" else 0.03)


@pytest.mark.parametrize(
    ("compression", "step_size"), [(None, 1.0), (TopK(fraction=0.5), 0.3), (Quantize(bits=3), 0.5)]
)
def test_choco_agrees_in_spite_of_compression_and_without_it_is_plain_gossip(
    compression: Any, step_size: float
) -> None:
    fed = engine(Network(compression=compression))
    theta, public, pull = (
        fed.each(draw, START),
        fed.each(own_copy, START),
        fed.each(own_copy, START),
    )
    before = stacked(fed, theta)
    _, plain = engine().mix(theta)
    for round in range(60):
        fed.begin(round, fed.clients)
        theta, public, pull = gossip(fed, theta, public, pull, step_size)
        if round == 0 and compression is None:
            np.testing.assert_allclose(stacked(fed, theta), stacked(fed, plain), atol=1e-5)
    after = stacked(fed, theta)
    np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-4)
    assert np.linalg.norm(after - after.mean(0)) < 0.1 * np.linalg.norm(before - before.mean(0))


def test_choco_needs_the_same_neighbours_in_every_round(settings: dict[str, Any]) -> None:
    changing: list[dict[str, Any]] = [
        {"network": {"link_failure": 0.1}},
        {"network": {"topology": "one-peer-exponential"}},
    ]
    for more in [*changing, {"federation": {"clients_per_round": 2}}]:
        with pytest.raises(UserError, match="same neighbours in every round"):
            config.parse(Experiment, {**settings, "algorithm": {"name": "choco"}, **more}, "test")


def adapters(settings: dict[str, Any], path: Path, **content: Any) -> list[Tree]:
    spec = config.parse(
        Experiment, {**settings, "federation": {"weighting": "equal"}, **content}, "test"
    )
    folder = run(spec, path).path
    if (folder / "clients").exists():
        return [
            trees.load(place / "adapter_model.safetensors")
            for place in sorted((folder / "clients").iterdir())
        ]
    return [trees.load(folder / "adapter" / "adapter_model.safetensors")]


@pytest.mark.parametrize("aggregate", ["factors", "frozen-a"])
@pytest.mark.long
def test_on_the_complete_graph_with_uniform_weights_it_is_feddpo(
    aggregate: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    common = {
        "local": {"steps": 2, "batch_size": 4, "learning_rate": 0.01, "optim": "sgd"},
        "aggregate": aggregate,
    }
    (expected,) = adapters(settings, tmp_path / "fed", algorithm={"name": "feddpo", **common})
    network = {"topology": "complete", "weights": "uniform"}
    found = adapters(
        settings, tmp_path / "dec", algorithm={"name": "decdpo", **common}, network=network
    )
    start = config.parse(Experiment, settings, "test").task.build().init(seeds.generator(0, "init"))
    assert trees.norm(trees.subtract(expected, start)) > 1e-3
    for adapter in found:
        for name in expected:
            torch.testing.assert_close(adapter[name], expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.long
def test_one_step_each_and_an_exact_mean_is_a_step_on_all_pairs(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    local = {
        "steps": 1,
        "batch_size": 64,
        "learning_rate": 0.01,
        "optim": "sgd",
        "max_grad_norm": 1e9,
    }
    weighted = {"federation": {"weighting": "examples"}}
    (found,) = adapters(
        settings, tmp_path / "fed", algorithm={"name": "feddpo", "local": local}, **weighted
    )
    (pooled,) = adapters(
        settings, tmp_path / "pooled", algorithm={"name": "pooled", "local": local}, **weighted
    )
    start = config.parse(Experiment, settings, "test").task.build().init(seeds.generator(0, "init"))
    moved = trees.norm(trees.subtract(pooled, start))
    assert moved > 1e-3
    assert trees.norm(trees.subtract(found, pooled)) < 1e-3 * moved


@pytest.mark.long
def test_with_own_parts_on_the_complete_graph_it_is_fedpdpo(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    common = {
        "local": {"steps": 2, "batch_size": 4, "learning_rate": 0.01, "optim": "sgd"},
        "parts": {"bottleneck": 4},
    }
    network = {"topology": "complete", "weights": "uniform"}
    found = []
    for name, more in (("fedpdpo", {}), ("decpdpo", {"network": network})):
        adapters(settings, tmp_path / name, algorithm={"name": name, **common}, **more)
        rows = [
            json.loads(line)
            for line in (tmp_path / name / "evaluation.jsonl").read_text().splitlines()
        ]
        found.append({client: row["loss"] for client, row in rows[-1]["clients"].items()})
    assert len(set(found[0].values())) == 4
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.long
def test_without_own_parts_personalised_gossip_is_gossip(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    nothing = {"head": None, "bottleneck": 0, "reward": False, "adapter": False}
    common = {"local": {"steps": 2, "batch_size": 4, "learning_rate": 0.01}}
    plain = adapters(settings, tmp_path / "dec", algorithm={"name": "decdpo", **common})
    found = adapters(
        settings, tmp_path / "decp", algorithm={"name": "decpdpo", "parts": nothing, **common}
    )
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(plain, found, strict=True) for name in a
    )


@pytest.mark.parametrize("order", ["adapt-then-combine", "combine-then-adapt"])
def test_neighbours_come_closer_by_mixing(
    order: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    local = {"steps": 2, "batch_size": 4, "learning_rate": 0.01}
    spec = config.parse(
        Experiment,
        {**settings, "algorithm": {"name": "decdpo", "order": order, "local": local}},
        "test",
    )
    path = run(spec, tmp_path / "run").path
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:  # in the first, who combines first combines what is equal
        assert row["consensus_error_before_mixing"] > 1e-6
        if order == "adapt-then-combine":
            assert row["consensus_error"] < row["consensus_error_before_mixing"]
    assert len(list((path / "clients").iterdir())) == 4
