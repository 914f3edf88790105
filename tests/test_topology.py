"""Graphs and mixing matrices: known spectra, laws, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from fedpref import UserError
from fedpref.federation.network import Network
from fedpref.numerics.topology import (
    SHAPES,
    ErdosRenyi,
    GraphFile,
    OnePeerExponential,
    Shape,
    SmallWorld,
    check,
    effective_diameter,
    links,
    mixing,
    refuse_disconnected,
    rho,
    without,
)

STATIC: list[Any] = [Shape(name) for name in SHAPES]  # type: ignore[arg-type]
ALL = [*STATIC, OnePeerExponential(), ErdosRenyi(probability=0.5), SmallWorld()]
SIXTEEN = [f"client-{i}" for i in range(16)]


def names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def matrix(topology: Any, count: int, round: int = 0, weights: Any = "metropolis") -> Any:
    return mixing(topology.graph(names(count), round), weights)


@pytest.mark.parametrize(
    ("count", "path", "ring", "star"),
    [
        (3, 0.6667, 0.0, 0.6667),
        (5, 0.8727, 0.5393, 0.8),
        (8, 0.9493, 0.8047, 0.875),
        (10, 0.9674, 0.8727, 0.9),
        (16, 0.9872, 0.9493, 0.9375),
    ],
)
def test_second_eigenvalues_of_metropolis_weights_are_the_known_ones(
    count: int, path: float, ring: float, star: float
) -> None:
    assert rho(matrix(Shape("path"), count)) == pytest.approx(path, abs=1e-4)
    assert rho(matrix(Shape("ring"), count)) == pytest.approx(ring, abs=1e-4)
    assert rho(matrix(Shape("star"), count)) == pytest.approx(star, abs=1e-4)
    assert rho(matrix(Shape("complete"), count)) == pytest.approx(0, abs=1e-12)


def test_second_eigenvalues_have_their_closed_forms() -> None:
    count = 12
    assert rho(matrix(Shape("ring"), count)) == pytest.approx(
        (1 + 2 * math.cos(2 * math.pi / count)) / 3
    )
    assert rho(matrix(Shape("hypercube"), 16)) == pytest.approx(1 - 2 / 5)
    assert rho(matrix(Shape("torus"), 36)) == pytest.approx((3 + 2 * math.cos(2 * math.pi / 6)) / 5)


@pytest.mark.parametrize("topology", ALL, ids=lambda topology: topology.name)
def test_mixing_is_doubly_stochastic_preserves_the_mean_and_contracts_by_rho(topology: Any) -> None:
    values = np.random.default_rng(0).normal(size=(16, 3))
    for round in range(5):
        weights = matrix(topology, 16, round)
        assert (weights >= 0).all()
        mixed = weights @ values
        np.testing.assert_allclose(mixed.mean(0), values.mean(0), atol=1e-12)
        before, after = (np.linalg.norm(v - v.mean(0)) for v in (values, mixed))
        assert after <= rho(weights) * before + 1e-12
        values = mixed


@pytest.mark.parametrize("topology", STATIC, ids=lambda topology: topology.name)
@pytest.mark.parametrize("weights", ["metropolis", "max-degree"])
def test_second_singular_value_is_the_second_eigenvalue_of_a_symmetric_matrix(
    topology: Any, weights: Any
) -> None:
    found = matrix(topology, 16, weights=weights)
    assert rho(found) == pytest.approx(sorted(abs(np.linalg.eigvalsh(found)))[-2], abs=1e-12)


def test_one_turn_of_the_one_peer_exponential_graph_is_an_exact_average() -> None:
    product = np.eye(16)
    for round in range(4):
        weights = matrix(OnePeerExponential(), 16, round)
        assert sorted(set(weights.round(12).ravel())) == [0.0, 0.5]
        product = weights @ product
    np.testing.assert_allclose(product, np.full((16, 16), 1 / 16), atol=1e-12)
    np.testing.assert_array_equal(
        matrix(OnePeerExponential(), 16, 1), matrix(OnePeerExponential(), 16, 5)
    )


def test_uniform_weights_on_the_complete_graph_average_and_are_refused_where_degrees_differ() -> (
    None
):
    np.testing.assert_allclose(
        matrix(Shape("complete"), 7, weights="uniform"), np.full((7, 7), 1 / 7)
    )
    with pytest.raises(
        UserError,
        match="the clients client-0, client-1, client-14, client-15 give weights that do not sum "
        "to one",
    ):
        mixing(Shape("path").graph(SIXTEEN, 0), "uniform", SIXTEEN)


def test_a_graph_that_is_drawn_anew_has_no_uniform_weights() -> None:
    network = Network(topology=ErdosRenyi(probability=0.5, redraw=True), weights="uniform")
    with pytest.raises(UserError, match=r"network\.weights.*Take metropolis"):
        network.check(list("abcd"))


def test_shapes_of_graphs() -> None:
    # of four by four
    assert nx.is_isomorphic(
        Shape("torus").graph(names(16), 0), Shape("hypercube").graph(names(16), 0)
    )
    assert {degree for _, degree in Shape("grid").graph(names(12), 0).degree()} == {2, 3, 4}
    # 1, 2, 4 both ways, and 8
    assert {degree for _, degree in Shape("exponential").graph(names(16), 0).degree()} == {7}
    assert Shape("torus").graph(names(2), 0).number_of_edges() == 1
    assert mixing(OnePeerExponential().graph(names(1), 0)).tolist() == [[1.0]]
    for wrong, count, sentence in (
        (Shape("hypercube"), 12, "power of two"),
        (Shape("grid"), 13, "13 is prime"),
        (SmallWorld(), 4, "Take fewer"),
        (SmallWorld(neighbors=3), 8, "an even number"),
    ):
        with pytest.raises(UserError, match=sentence):
            wrong.graph(names(count), 0)


def test_random_graphs_are_the_same_for_a_seed_and_are_drawn_anew_where_asked() -> None:
    edges = [
        set(ErdosRenyi(seed=seed, redraw=redraw).graph(names(16), r).edges())
        for seed, redraw, r in (
            (1, False, 0),
            (1, False, 3),
            (1, True, 0),
            (1, True, 3),
            (2, False, 0),
        )
    ]
    assert edges[0] == edges[1] == edges[2]
    assert edges[0] != edges[3]
    assert edges[0] != edges[4]


@pytest.mark.parametrize(
    ("network", "is_fixed"),
    [
        (Network(topology=Shape("ring")), True),
        (Network(topology=ErdosRenyi()), True),
        (Network(topology=ErdosRenyi(redraw=True)), False),
        (Network(topology=OnePeerExponential()), False),
        (Network(topology=Shape("ring"), link_failure=0.1), False),
    ],
)
def test_a_network_is_fixed_if_its_matrix_is_the_same_in_every_round(
    network: Network, is_fixed: bool
) -> None:
    assert network.is_fixed == is_fixed
    names = tuple(str(i) for i in range(8))
    matrices = [network.matrix(names, 0, round, range(8)) for round in range(6)]
    assert all(np.array_equal(matrices[0], matrix) for matrix in matrices) == is_fixed


def test_effective_diameter_is_the_ninetieth_percentile_of_path_lengths() -> None:
    assert effective_diameter(nx.complete_graph(5)) == 1
    assert effective_diameter(nx.path_graph(2)) == 1
    lengths = [abs(i - j) for i in range(10) for j in range(10) if i != j]
    assert effective_diameter(nx.path_graph(10)) == pytest.approx(np.percentile(lengths, 90))
    assert effective_diameter(nx.empty_graph(3)) == 0


def test_links_that_fail_leave_the_mean_as_it_is() -> None:
    weights = matrix(Shape("ring"), 6)
    assert list(links(weights)) == [(0, 1), (0, 5), (1, 2), (2, 3), (3, 4), (4, 5)]
    repaired = without(weights, [(0, 1), (2, 3)])
    check(repaired, names(6))
    assert repaired[0, 1] == repaired[1, 0] == 0
    assert repaired[0, 0] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="directed graph"):
        without(matrix(OnePeerExponential(), 8), [(0, 1)])


def test_faults_of_a_matrix_name_the_clients() -> None:
    good = matrix(Shape("ring"), 4)
    for change, sentence in (
        ({(0, 1): -0.1, (0, 0): 0.766667}, "the clients a have a negative weight"),
        ({(1, 1): 0.5}, "the clients b take weights that do not sum to one"),
        ({(0, 1): 0.5, (0, 0): 1 / 6}, "the clients a, b give weights that do not sum"),
    ):
        wrong = good.copy()
        for place, value in change.items():
            wrong[place] = value
        with pytest.raises(UserError, match=sentence):
            check(wrong, "abcd")
    turned = np.roll(np.eye(4), 1, axis=1)
    check(turned, "abcd", symmetric=False)
    with pytest.raises(UserError, match="give and take different weights"):
        check(turned, "abcd")


def test_those_who_are_cut_off_are_named() -> None:
    graph = nx.Graph([(0, 1), (2, 3), (3, 4)])
    with pytest.raises(UserError, match="connects the clients a, b with the others"):
        refuse_disconnected([graph], "abcde")
    refuse_disconnected([graph, nx.Graph([(1, 2)])], "abcde")


def test_graphs_come_from_files(tmp_path: Path) -> None:
    people = ["clinic", "law office", "school"]
    (tmp_path / "edges.csv").write_text(
        "# who talks to whom\nclinic, law office\nlaw office,school\nschool,law office\n\n"
    )
    assert set(GraphFile(path=str(tmp_path / "edges.csv")).graph(people, 0).edges()) == {
        (0, 1),
        (1, 2),
    }
    (tmp_path / "edges.txt").write_text("clinic school\n")
    assert set(GraphFile(path=str(tmp_path / "edges.txt")).graph(people, 0).edges()) == {(0, 2)}
    (tmp_path / "signs.txt").write_text("user#1, user#2 # who else\n")
    signs = GraphFile(path=str(tmp_path / "signs.txt"))
    assert set(signs.graph(["user#1", "user#2"], 0).edges()) == {(0, 1)}
    nx.write_graphml(nx.Graph([("clinic", "school")]), tmp_path / "g.graphml")
    assert set(GraphFile(path=str(tmp_path / "g.graphml")).graph(people, 0).edges()) == {(0, 2)}
    (tmp_path / "broken.graphml").write_text("<graphml")
    (tmp_path / "long.txt").write_text("clinic school\na b c\n")
    (tmp_path / "other.txt").write_text("clinic pub\n")
    for name, sentence in (
        ("none.txt", "no file"),
        ("broken.graphml", "no GraphML"),
        ("long.txt", "line 2"),
        ("other.txt", "'pub'. are no clients"),
    ):
        with pytest.raises(UserError, match=sentence):
            GraphFile(path=str(tmp_path / name)).graph(people, 0)


def test_rho_with_weights_bounds_the_weighted_distance_from_the_mean() -> None:
    draw = np.random.default_rng(0)
    matrix = mixing(ErdosRenyi(probability=0.5).graph([str(i) for i in range(6)], 0))
    weights = draw.uniform(0.1, 1.0, 6)
    assert rho(matrix, [1.0] * 6) == pytest.approx(rho(matrix))

    def spread(values: Any) -> float:
        mean = np.average(values, weights=weights, axis=0)
        return float(np.average((values - mean) ** 2, weights=weights, axis=0).sum())

    ratios = []
    for _ in range(2000):
        values = draw.normal(size=(6, 1))
        ratios.append(spread(matrix @ values) / spread(values))
    bound = rho(matrix, weights.tolist()) ** 2
    assert max(ratios) <= bound + 1e-12
    assert max(ratios) > 0.9 * bound, "it is tight"
