"""Graphs between clients, and the matrices by which neighbours' values are mixed.

A mixing matrix W holds in row i what client i takes of everybody's values. It is non-negative and
doubly stochastic: rows sum to one, so that equal values stay equal, and columns sum to one, so that
mixing preserves the mean. How fast values become equal is decided by rho, the largest singular
value of W - 11'/N (for a symmetric W its second largest absolute eigenvalue).
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpref.errors import UserError
from fedpref.types import Portion, WholeNumber

Matrix = NDArray[np.float64]
Graph = Any  # networkx's Graph or DiGraph over 0, 1, ..., N - 1; it has no types of its own


def networkx() -> Any:
    """Return networkx, which takes half a second to load, when the first graph is made."""
    import networkx

    return networkx


Names = Sequence[str]
Weights = Literal["metropolis", "max-degree", "uniform"]
TOLERANCE = 1e-9


def _of_edges(count: int, edges: Iterable[tuple[int, int]]) -> Graph:
    """Return an undirected graph without loops and double edges."""
    graph = networkx().Graph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from((one, other) for one, other in edges if one != other)
    return graph


def _hops(count: int) -> list[int]:
    """Return the powers of two below the number of clients."""
    return [2**k for k in range((count - 1).bit_length())]


def _exponential(count: int) -> Graph:
    return _of_edges(count, ((i, (i + hop) % count) for i in range(count) for hop in _hops(count)))


def _hypercube(count: int) -> Graph:
    if count & (count - 1):
        raise UserError(
            "topology hypercube: the number of clients must be a power of two, there are "
            f"{count}. Take exponential."
        )
    return _of_edges(count, ((i, i ^ hop) for i in range(count) for hop in _hops(count)))


def _sides(count: int) -> tuple[int, int]:
    """Return rows and columns of a grid, as near to a square as the number of clients allows."""
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    if rows == 1 and count > 3:
        raise UserError(
            f"topology: {count} clients fill no rows and columns, {count} is prime. Take ring, "
            "or another number."
        )
    return rows, count // rows


def _grid(count: int) -> Graph:
    return networkx().convert_node_labels_to_integers(
        networkx().grid_2d_graph(*_sides(count)), ordering="sorted"
    )


def _torus(count: int) -> Graph:
    rows, columns = _sides(count)
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    right = [(columns * r + c, columns * r + (c + 1) % columns) for r, c in cells]
    down = [(columns * r + c, columns * ((r + 1) % rows) + c) for r, c in cells]
    return _of_edges(count, right + down)


SHAPES: Mapping[str, Callable[[int], Graph]] = {
    "ring": lambda count: _of_edges(count, ((i, (i + 1) % count) for i in range(count))),
    "path": lambda count: networkx().path_graph(count),
    "star": lambda count: networkx().star_graph(count - 1),  # the first client in the middle
    "complete": lambda count: networkx().complete_graph(count),
    "grid": _grid,
    "torus": _torus,  # a grid whose opposite sides are joined
    "hypercube": _hypercube,  # clients whose numbers differ in one binary digit
    # client i with i + 1, i + 2, i + 4, ... around the circle, in both directions
    "exponential": _exponential,
}


@dataclass(frozen=True)
class Shape:
    """A graph that its name and the number of clients decide."""

    name: Literal[
        "ring", "path", "star", "complete", "grid", "torus", "hypercube", "exponential"
    ] = "ring"

    def graph(self, names: Names, round: int) -> Graph:
        return SHAPES[self.name](len(names))


@dataclass(frozen=True)
class OnePeerExponential:
    """In round t each client receives from the one client that is 2^t behind it (Assran et al.
    2019).

    t is taken modulo the number of such hops. Where the number of clients is a power of two, one
    turn through the hops is an exact average (Ying et al. 2021).
    """

    name: Literal["one-peer-exponential"] = "one-peer-exponential"

    def graph(self, names: Names, round: int) -> Graph:
        count, hops = len(names), _hops(len(names))
        links = networkx().DiGraph()
        links.add_nodes_from(range(count))
        links.add_edges_from(
            (i, (i + hops[round % len(hops)]) % count) for i in range(count) if hops
        )
        return links


@dataclass(frozen=True)
class ErdosRenyi:
    """Each pair of clients with the same probability, drawn once, or anew in each round."""

    name: Literal["erdos-renyi"] = "erdos-renyi"
    probability: Portion = 0.3
    """The chance of each pair of clients to be linked."""
    seed: WholeNumber = 0
    """The seed of the draw."""
    redraw: bool = False
    """Draw the graph anew in each round."""

    def graph(self, names: Names, round: int) -> Graph:
        return networkx().gnp_random_graph(
            len(names),
            self.probability,
            np.random.default_rng([self.seed, round if self.redraw else 0]),
        )


@dataclass(frozen=True)
class SmallWorld:
    """A circle on which edges are led elsewhere with some probability (Watts and Strogatz 1998)."""

    name: Literal["small-world"] = "small-world"
    neighbors: Annotated[int, Field(ge=2)] = 4
    """Neighbours of each client on the circle."""
    probability: Portion = 0.2
    """The chance of an edge to be led elsewhere."""
    seed: WholeNumber = 0
    """The seed of the draw."""

    def graph(self, names: Names, round: int) -> Graph:
        if self.neighbors >= len(names):
            raise UserError(
                f"topology small-world: {self.neighbors} neighbours among {len(names)} clients. "
                "Take fewer."
            )
        if self.neighbors % 2:
            raise UserError(
                f"topology small-world: {self.neighbors} neighbours; on a circle they are an "
                "even number."
            )
        return networkx().watts_strogatz_graph(
            len(names), self.neighbors, self.probability, np.random.default_rng(self.seed)
        )


def _without_comment(line: str) -> str:
    said = line.replace("\t", " ").strip()
    return "" if said.startswith("#") else said.split(" #", 1)[0].strip()


@dataclass(frozen=True)
class GraphFile:
    """A GraphML file, or a list of edges: two clients' names a line, with a comma or space."""

    name: Literal["file"] = "file"
    path: str = ""
    """The file."""
    digest: str | None = None
    """A hash of the file's content, which a run keeps."""

    def with_digest(self) -> GraphFile:
        """Return the same topology, bound to what the file holds now if it was not bound before."""
        return self if self.digest else replace(self, digest=self._content()[1])

    def graph(self, names: Names, round: int) -> Graph:
        number_of = {name: number for number, name in enumerate(names)}
        edges = [(one, other) for one, other in self._edges() if one != other]
        if unknown := sorted({name for edge in edges for name in edge} - number_of.keys()):
            raise UserError(
                f"{self.path}: {unknown[:5]} are no clients; the clients are {list(names)[:12]}."
            )
        return _of_edges(len(names), [(number_of[one], number_of[other]) for one, other in edges])

    def _edges(self) -> list[tuple[str, str]]:
        content, digest = self._content()
        if self.digest not in (None, digest):
            raise UserError(f"{self.path}: the file is not what it was when the run began.")
        if self.path.lower().endswith(".graphml"):
            try:
                graph = networkx().read_graphml(io.BytesIO(content))
            except Exception as error:  # of the XML reader, or of networkx
                raise UserError(f"{self.path}: this is no GraphML: {error}.") from error
            return [(str(one), str(other)) for one, other in graph.edges()]
        try:
            # a comment begins a line, or stands behind a space: names may have the sign in them
            lines = list(map(_without_comment, content.decode().splitlines()))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: this is no text in UTF-8: {error}.") from error
        edges = []
        for number, line in enumerate(lines, 1):
            parts = [part.strip() for part in (line.split(",") if "," in line else line.split())]
            if len(parts) == 2:
                edges.append((parts[0], parts[1]))
            elif parts:
                raise UserError(
                    f"{self.path}, line {number}: expected two clients' names, there are "
                    f"{len(parts)} words."
                )
        return edges

    def _content(self) -> tuple[bytes, str]:
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise UserError(f"topology.path: there is no file {self.path!r}.")
        content = file.read_bytes()
        return content, hashlib.blake2b(content, digest_size=8).hexdigest()


AnyTopology = Annotated[
    Shape | OnePeerExponential | ErdosRenyi | SmallWorld | GraphFile, Field(discriminator="name")
]


# ---- mixing matrices


def mixing(graph: Graph, weights: Weights = "metropolis", names: Names = ()) -> Matrix:
    """Return the mixing matrix of a graph [N, N].

    Args:
        graph: On a directed graph degrees are numbers of senders.
        weights: `metropolis`: 1/(1 + the larger degree of the two); `max-degree`: 1/(1 + the
            graph's largest degree); `uniform`: 1/(1 + own degree), which needs equal degrees. What
            is left of a row is the client's own.
        names: The clients', for messages.

    Raises:
        UserError: These weights do not preserve the mean on this graph.
    """
    count = len(graph)
    directed = graph.is_directed()
    degree = dict(graph.in_degree() if directed else graph.degree())
    largest = max(degree.values())
    matrix = np.zeros((count, count))
    for one, other in graph.edges():
        for taker, giver in ((other, one),) if directed else ((other, one), (one, other)):
            near = {
                "metropolis": max(degree[one], degree[other]),
                "max-degree": largest,
                "uniform": degree[taker],
            }[weights]
            matrix[taker, giver] = 1 / (1 + near)
    np.fill_diagonal(matrix, 1 - matrix.sum(1))
    check(matrix, names or [str(i) for i in range(count)], symmetric=not directed)
    return matrix


def check(matrix: Matrix, names: Names, *, symmetric: bool = True) -> None:
    """Check a mixing matrix.

    Args:
        matrix: [N, N].
        names: The clients', for messages.
        symmetric: Whether it must be symmetric.

    Raises:
        UserError: It is negative, not doubly stochastic, or not symmetric where it should be.
    """
    clients: Any
    for clients, what in (
        (np.argwhere(matrix < -TOLERANCE)[:, 0], "have a negative weight"),
        (np.flatnonzero(abs(matrix.sum(1) - 1) > TOLERANCE), "take weights that do not sum to one"),
        (
            np.flatnonzero(abs(matrix.sum(0) - 1) > TOLERANCE),
            "give weights that do not sum to one, so that the mean is not preserved",
        ),
        (
            np.argwhere(abs(matrix - matrix.T) > TOLERANCE)[:, 0] if symmetric else [],
            "give and take different weights",
        ),
    ):
        if len(clients):
            raise UserError(
                f"mixing: the clients {_some(names, clients)} {what}. Metropolis weights fit every "
                "undirected graph."
            )


def refuse_disconnected(graphs: Sequence[Graph], names: Names, apart: Collection[int] = ()) -> None:
    """Raise UserError, with the names of those cut off, if graphs together leave clients apart.

    Args:
        graphs: Of the rounds of one turn.
        names: The clients'.
        apart: Clients that need not be connected.
    """
    together = networkx().Graph()
    together.add_nodes_from(range(len(names)))
    for graph in graphs:
        together.add_edges_from(graph.edges())
    together.remove_nodes_from(apart)
    smallest = min(
        networkx().connected_components(together), key=lambda part: (len(part), min(part))
    )
    if len(smallest) < len(together):
        raise UserError(
            f"topology: nothing connects the clients {_some(names, sorted(smallest))} with the "
            "others. Add edges."
        )


def rho(matrix: Matrix, weights: Sequence[float] = ()) -> float:
    """Return the largest singular value of W - 11'/N.

    It is how much of the distance from the mean is left after one mixing, at most. With `weights`,
    the mean and the root of the mean square of the distances from it are weighted by them.
    """
    if not weights:
        return float(np.linalg.norm(matrix - 1 / len(matrix), 2))
    shares = np.asarray(weights) / np.sum(weights)
    apart, roots = np.eye(len(matrix)) - shares, np.sqrt(shares)
    return float(np.linalg.norm(roots[:, None] * (apart @ matrix @ apart) / roots, 2))


def effective_diameter(graph: Graph) -> float:
    """Return the 90th percentile of the lengths of shortest paths between two clients."""
    lengths = [
        length
        for source, of in networkx().all_pairs_shortest_path_length(graph)
        for target, length in of.items()
        if source != target
    ]
    return float(np.percentile(lengths, 90)) if lengths else 0.0


def without(matrix: Matrix, broken: Sequence[tuple[int, int]]) -> Matrix:
    """Return the matrix when links fail: both ends keep what they would have taken.

    So the mean is preserved.
    """
    if not np.allclose(matrix, matrix.T, atol=TOLERANCE):
        raise UserError(
            "topology: links of a directed graph cannot fail one by one, the mean would not be "
            "preserved. Take another graph."
        )
    repaired = matrix.copy()
    for one, other in broken:
        repaired[one, one] += repaired[one, other]
        repaired[other, other] += repaired[other, one]
        repaired[one, other] = repaired[other, one] = 0
    return repaired


def links(matrix: Matrix) -> Iterator[tuple[int, int]]:
    """Yield pairs of clients of which one takes from the other, the lower number first."""
    for one, other in np.argwhere(np.triu((matrix > TOLERANCE) | (matrix.T > TOLERANCE), 1)):
        yield int(one), int(other)


def _some(names: Names, which: Sequence[Any]) -> str:
    unique = list(dict.fromkeys(names[int(i)] for i in which))
    return ", ".join(unique[:5]) + (", ..." if len(unique) > 5 else "")
