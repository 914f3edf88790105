"""How adapters become one: exact means of products, frozen factors, ranks that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedpref import Experiment, UserError, config, run
from fedpref.engines import Simulation
from fedpref.federation.aggregation import Factors, FrozenA, Product, factor, pairs
from fedpref.federation.verbs import Client, work
from fedpref.numerics import seeds, trees
from fedpref.numerics.trees import Tree

WEIGHTS = {"one": (11, 7), "two": (6, 9)}
SIZES = (5, 2, 3)


class NoTask:
    """Nothing is learnt here."""

    def move_to(self, worker: int) -> None: ...


class Shard(tuple):  # type: ignore[type-arg]
    """So many examples."""


def adapter(rank: int, seed: int, drift: float = 1.0, start: Tree | None = None) -> Tree:
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        name: shape
        for key, (o, i) in WEIGHTS.items()
        for name, shape in ((f"{key}.lora_A.w", (rank, i)), (f"{key}.lora_B.w", (o, rank)))
    }
    return {
        name: drift * torch.randn(shape, generator=rng) + (start[name] if start else 0.0)
        for name, shape in shapes.items()
    }


@work("test_aggregation.message")
def message(client: Client, received: Tree, method: Any) -> Tree:
    """Each client's own theta, of its own rank."""
    free, _ = method.received(client, received)
    rank = factor({**received, **free}, "B")["one.lora_B.w"].shape[1]
    theta = adapter(rank, 10 + client.id, 0.3, {**received, **free})
    return method.message(client, free, trees.select(theta, free))


def engine() -> Simulation:
    task: Any = NoTask()
    return Simulation(task, [Shard(range(size)) for size in SIZES], seed=0, rounds=3)


def products(tree: Tree) -> dict[str, torch.Tensor]:
    return {a: (tree[b].double() @ tree[a].double()) for a, b in pairs(tree)}


def mean_products(start: Tree, method: Any, fed: Simulation) -> dict[str, torch.Tensor]:
    """Formed in full from what each client has, as no party of a federation could."""
    found: dict[str, torch.Tensor] = {}
    for i, size in enumerate(SIZES):
        client = Client(i, fed._task, fed._shards[i], torch.Generator(), 0, 3)
        free, fixed = method.received(client, start)
        sent = message(client, start, method)
        theta = {
            **fixed,
            **(sent if isinstance(method, Product) else trees.add(free, trees.select(sent, free))),
        }
        for a, product in products(theta).items():
            found[a] = found.get(a, torch.zeros(())) + size / sum(SIZES) * product
    # with ranks of clients' own, messages are changes of what was sent
    has_changes = isinstance(method, Product) and method.ranks
    return trees.add(found, products(start)) if has_changes else found


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Over all weights, as a share of what was expected."""
    return trees.norm(trees.subtract(found, expected)) / trees.norm(expected)


def best(expected: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Truncated singular value decompositions of full matrices."""
    found = {}
    for name, matrix in expected.items():
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        found[name] = u[:, :rank] * s[:rank] @ v[:rank]
    return found


@pytest.mark.parametrize("ranks", [(), (4, 1, 2)], ids=["equal ranks", "ranks 4, 1 and 2"])
def test_products_are_averaged_and_truncated_as_by_a_full_decomposition(
    ranks: tuple[int, ...],
) -> None:
    start, fed = adapter(4, 0), engine()
    many = Product(iterations=60, ranks=ranks)
    merged, _ = many.merge(fed, start, fed.each(message, start, many))
    expected = mean_products(start, many, fed)
    optimum = best(expected, 4)
    assert distance(products(merged), optimum) < 1e-3
    few = Product(ranks=ranks)
    quickly, _ = few.merge(fed, start, fed.each(message, start, few))
    assert distance(products(quickly), expected) < 1.02 * distance(optimum, expected)
    for a, b in pairs(merged):
        # rows of a fresh adapter's size
        torch.testing.assert_close(merged[a] @ merged[a].T, torch.eye(4) / 3, atol=1e-4, rtol=0)
        lengths = merged[b].norm(dim=0)
        # the first columns matter most
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


def test_a_mean_of_equal_products_is_that_product() -> None:
    start, fed = adapter(3, 0), engine()
    merged, metrics = Product(iterations=1).merge(fed, start, fed.each(same, start))
    assert distance(products(merged), products(start)) < 1e-5
    assert metrics["residual"] < 1e-5


@work("test_aggregation.same")
def same(client: Client, theta: Tree) -> Tree:
    return theta


@pytest.mark.parametrize("method", [Factors(), Product()])
def test_the_residual_is_the_distance_from_the_mean_product(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpref.federation.aggregation.PROBES", 4000)
    start, fed = adapter(4, 0), engine()
    merged, metrics = method.merge(fed, start, fed.each(message, start, method))
    assert metrics["residual"] == pytest.approx(
        distance(products(merged), mean_products(start, method, fed)), rel=0.05
    )
    assert metrics["residual"] > 0.01


def test_with_frozen_factors_the_mean_is_exact() -> None:
    start, fed = adapter(4, 0), engine()
    method = FrozenA()
    merged, _ = method.merge(fed, start, fed.each(message, start, method))
    assert distance(products(merged), mean_products(start, method, fed)) < 1e-6
    assert all(torch.equal(merged[name], start[name]) for name in factor(start, "A"))


def test_an_embeddings_drawn_factor_is_the_frozen_one() -> None:
    tree = {"e.lora_embedding_A": torch.zeros(2, 5), "e.lora_embedding_B": torch.ones(3, 2)}
    client: Any = None
    free, fixed = FrozenA().received(client, tree)
    assert (set(free), set(fixed)) == ({"e.lora_embedding_A"}, {"e.lora_embedding_B"})
    fed = engine()
    merged, _ = Product().merge(
        fed, tree, fed.each(same, {**tree, "e.lora_embedding_A": torch.ones(2, 5)})
    )
    assert (
        distance(products(merged), {"e.lora_embedding_A": torch.full((3, 5), 2.0).double()}) < 1e-6
    )


def test_an_iteration_costs_as_many_bytes_as_an_adapter() -> None:
    start, fed = adapter(4, 0), engine()
    method = Product(iterations=1, residual=False)
    held = fed.each(message, start, method)
    before = fed.traffic
    method.merge(fed, start, held)
    assert fed.traffic.bytes_up - before.bytes_up == 3 * trees.size(start)


@pytest.mark.parametrize("algorithm", ["feddpo", "fedprox", "fedpdpo", "fedper", "feddpa"])
@pytest.mark.long
def test_every_algorithm_that_averages_an_adapter_takes_products_and_ranks(
    algorithm: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    aggregate = {"name": "product", "ranks": [4, 2]}
    content = {
        **settings,
        "algorithm": {
            "name": algorithm,
            "local": settings["algorithm"]["local"],
            "aggregate": aggregate,
        },
    }
    result = run(config.parse(Experiment, content, "test"), tmp_path / "run")
    rows = (result.path / "metrics.jsonl").read_text().splitlines()
    assert all('"residual": ' in row for row in rows)
    content["algorithm"]["aggregate"] = "frozen-a"
    start = config.parse(Experiment, content, "test").task.build().init(seeds.generator(0, "init"))
    frozen = run(config.parse(Experiment, content, "test"), tmp_path / "frozen").path
    shared = trees.load(frozen / "checkpoints/round-000003/adapter.safetensors")
    assert all(torch.equal(shared[name], start[name]) for name in factor(start, "A"))
    assert trees.norm(trees.subtract(shared, start)) > 1e-3


@pytest.mark.parametrize(
    ("aggregate", "local", "sentence"),
    [
        ({"name": "product", "ranks": [9]}, {}, "ranks: 9 is above"),
        ("product", {"keep_optimizer": True}, "turns the adapter's factors"),
    ],
)
def test_what_products_cannot_do_is_refused(
    aggregate: Any, local: dict[str, Any], sentence: str, settings: dict[str, Any]
) -> None:
    content = {**settings, "algorithm": {"name": "feddpo", "aggregate": aggregate, "local": local}}
    with pytest.raises(UserError, match=sentence):
        config.parse(Experiment, content, "test")


def test_nobody_unlearns_what_nobody_trained_where_ranks_differ() -> None:
    start, fed = adapter(4, 0), engine()
    method = Product(iterations=30, ranks=(2, 4, 1))
    merged = start
    for _ in range(5):
        merged, metrics = method.merge(fed, merged, fed.each(untrained, merged, method))
        assert metrics["residual"] < 1e-4
    assert distance(products(merged), products(start)) < 1e-4


@work("test_aggregation.untrained")
def untrained(client: Client, shared: Tree, method: Product) -> Tree:
    received, _ = method.received(client, shared)
    return method.message(client, received, received)
