"""A network on a terminal: its metrics, and who hears whom."""

from __future__ import annotations

import math

from rich.table import Table
from rich.text import Text

from fedpref.federation.network import Network
from fedpref.numerics.topology import Matrix, Names, effective_diameter, networkx, rho

SHADES = "·░▒▓█"  # from nothing to everything


def graph_metrics(network: Network, names: Names) -> dict[str, float]:
    """Return what decides how fast clients agree.

    For a graph that changes with the rounds it is that of its first turn of N rounds.
    """
    graphs = [network.topology.graph(names, round) for round in range(len(names))]
    matrices = [network.matrix(names, 0, round, range(len(names))) for round in range(len(names))]
    product = matrices[0]
    for matrix in matrices[1:]:
        product = matrix @ product
    degrees = [degree for _, degree in graphs[0].degree()]
    static = all((matrix == matrices[0]).all() for matrix in matrices)
    second = rho(matrices[0]) if static else rho(product) ** (1 / len(names))
    return {
        "clients": len(names),
        "links": graphs[0].number_of_edges(),
        "fewest neighbours": min(degrees),
        "most neighbours": max(degrees),
        "effective diameter": effective_diameter(
            networkx().compose_all([graph.to_undirected() for graph in graphs])
        ),
        "rho": second,
        "spectral gap 1 - rho^2": 1 - second**2,
        "rounds to halve a disagreement": 0.0
        if second < 1e-9
        else math.inf
        if second >= 1
        else math.log(0.5) / math.log(second),
    }


def metric_table(metrics: dict[str, float]) -> Table:
    """Return the metrics for a terminal."""
    shown = Table.grid(padding=(0, 2))
    for name, value in metrics.items():
        shown.add_row(name, f"{value:.4g}")
    return shown


def drawn(matrix: Matrix, names: Names) -> Text:
    """Return the mixing matrix as a picture: a row for each client, dark where it takes much."""
    width = max(map(len, names))
    text = Text()
    for name, row in zip(names, matrix, strict=True):
        cells = "".join(
            2 * SHADES[min(len(SHADES) - 1, math.ceil(weight * (len(SHADES) - 1)))]
            for weight in row
        )
        text.append(f"{name:>{width}}  {cells}\n")
    return text
