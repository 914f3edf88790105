"""Charts of runs, in Plotly's form: plain data, drawn by the page that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np

from fedpref.reports.read import Line, Run
from fedpref.reports.tables import TITLES
from fedpref.summary import ACCURACY
from fedpref.topology import rho

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6FD1", "#7F7F7F")  # told apart by the colour-blind too
FEW = 24  # clients whose names fit under bars
LEARNING = {"loss": "training loss", ACCURACY: "training pair accuracy", "error": "training error", "reward": "training reward"}
PARTS = {"each": "on clients", "mean": "averaging", "mix": "mixing with neighbours", "report": "reports"}


@dataclass(frozen=True)
class Chart:
    """A figure with its title and how to read it."""

    title: str
    caption: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        """For Plotly."""
        return {"data": list(self.data), "layout": dict(self.layout)}


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def axes(x: str, y: str, **other: Any) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, **other}


def lined(name: str, x: Sequence[Any], y: Sequence[Any], number: int, **other: Any) -> dict[str, Any]:
    """A line; single points are seen too."""
    mode = "lines+markers" if len(x) <= 30 else "lines"
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y), "line": {"color": colour(number)}, **other}


def every_line(runs: Sequence[Run]) -> Iterator[tuple[str, Run, Line, int]]:
    """All lines of all runs: a title, and a number for its colour."""
    number = 0
    for run in runs:
        for line in (run.line, *run.references.values()):
            kind = TITLES.get(line.name, line.name)
            title = kind if len(runs) == 1 else run.title if line is run.line else f"{run.title}: {kind}"
            yield title, run, line, number
            number += 1


# ---- what was learned


def learning(runs: Sequence[Run]) -> Iterator[Chart]:
    """Losses and accuracies of training, over rounds."""
    for metric, title in LEARNING.items():
        scale = 100 if metric == ACCURACY else 1
        data = [
            lined(name, [row["round"] for row in line.metrics if metric in row], [scale * v for v in line.column(metric)], number)
            for name, _, line, number in every_line(runs)
            if line.column(metric)
        ]
        if data:
            unit = ", %" if scale == 100 else ""
            caption = "On each round's own examples, before each step; a mean over clients, weighted by their numbers of examples."
            yield Chart(title.capitalize(), caption, data, axes("round", title + unit))


def held_out(runs: Sequence[Run]) -> Iterator[Chart]:
    """The metric by which clients are compared, over rounds: each client, their mean, the quartiles."""
    if max(len(line.evaluations) for _, _, line, _ in every_line(runs)) < 2:
        return
    shown, data = runs[0].shown, []
    alone = len(runs) == 1
    for name, run, line, number in every_line(runs):
        rounds = [row["round"] for row in line.evaluations]
        clients = sorted(line.last)
        table = np.array([[shown.scale * row["clients"][c][run.metric] for c in clients] for row in line.evaluations])
        low, high = np.percentile(table, [25, 75], axis=1)
        band = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "legendgroup": name}
        data += [
            {**band, "x": rounds, "y": high.tolist()},
            {**band, "x": rounds, "y": low.tolist(), "fill": "tonexty", "fillcolor": colour(number) + "26"},
            lined(name, rounds, table.mean(1).tolist(), number, legendgroup=name),
        ]
        if alone and line is run.line:
            faint = {"opacity": 0.35, "legendgroup": "clients", "mode": "lines"}
            data += [
                {**lined(c, rounds, table[:, k].tolist(), 7), **faint, "showlegend": not k, "name": c if k else "each client", "text": c}
                for k, c in enumerate(clients)
            ]
    caption = "The mean over clients; the band holds the middle half of them"
    caption += "; a click on “each client” hides the thin lines." if alone else "."
    yield Chart(f"Held-out {shown.title} over rounds", caption, data, axes("round", shown.caption))


# ---- who gained, who lost


def by_client(runs: Sequence[Run]) -> Iterator[Chart]:
    """Every client under every line."""
    first = runs[0]
    names = sorted(first.line.last, key=lambda name: (-first.clients.get(name, {}).get("train", 0), name))
    data = []
    for title, run, line, number in every_line(runs):
        values = run.values(line)
        bars = {"type": "bar", "name": title, "x": names, "y": [values.get(name) for name in names]}
        data.append({**bars, "marker": {"color": colour(number)}})
    layout = axes("", first.shown.caption, barmode="group")
    layout["xaxis"] |= {"tickangle": -40} if len(names) <= FEW else {"showticklabels": False, "title": {"text": "clients"}}
    if first.metric == ACCURACY:
        layout["shapes"] = [_level(50)]
    caption = "Those with most training examples on the left." + (" The dotted line is a guess." if first.metric == ACCURACY else "")
    yield Chart(f"Held-out {first.shown.title} of each client", caption, data, layout)


def gains(runs: Sequence[Run]) -> Iterator[Chart]:
    """What each client has of the federation: its value less what it reaches alone."""
    data = []
    for number, run in enumerate(runs):
        if "local" not in run.references or not run.references["local"].last:
            continue
        alone, values = run.values(run.references["local"]), run.values()
        sizes = [run.clients[name]["train"] for name in values]
        gained = [values[name] - alone[name] for name in values]
        marks = {"type": "scatter", "mode": "markers", "name": run.title, "x": sizes, "y": gained, "text": list(values)}
        data.append({**marks, "marker": {"color": colour(number), "size": 9}, "hovertemplate": "%{text}: %{y:+.1f}, %{x} examples"})
    if data:
        layout = axes("training examples", f"gain in {runs[0].shown.title}, points", shapes=[_level(0)])
        layout["xaxis"]["type"] = "log"
        caption = "Held-out, against training alone on its own data: above the line a client gains by taking part, below it loses."
        yield Chart("Who gained by taking part, and who lost", caption, data, layout)


def _level(value: float) -> dict[str, Any]:
    place = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
    return {**place, "line": {"dash": "dot", "width": 1, "color": "#888888"}}


# ---- what it cost


def traffic(runs: Sequence[Run]) -> Iterator[Chart]:
    """Bytes of each round, and what they bought."""
    data = []
    for number, run in enumerate(runs):
        rounds = [row["round"] for row in run.line.metrics]
        for way, dash in (("up", "solid"), ("down", "dot")):
            name = f"{run.title}: {way}" if len(runs) > 1 else way
            line = lined(name, rounds, [value / 1e6 for value in run.line.column(f"bytes_{way}")], number)
            data.append({**line, "line": {"color": colour(number), "dash": dash}})
    if data:
        caption = "Tensors sent in each round, over all clients: up to the coordinator, or to neighbours; down from the coordinator."
        layout = axes("round", "MB", hovermode="x")
        layout["yaxis"]["rangemode"] = "tozero"
        yield Chart("Data sent", caption, data, layout)
    data = []
    for number, run in enumerate(runs):
        if len(run.line.evaluations) < 2:
            continue
        sent = np.cumsum([row["bytes_up"] + row["bytes_down"] for row in run.line.metrics]) / 1e6
        at = {row["round"]: float(total) for row, total in zip(run.line.metrics, sent, strict=True)}
        means = [run.shown.scale * row["summary"][run.metric]["mean"] for row in run.line.evaluations]
        data.append(lined(run.title, [at[row["round"]] for row in run.line.evaluations], means, number))
    if data:
        caption = "The mean over clients against all that was sent until then, up and down."
        yield Chart(f"Held-out {runs[0].shown.title} for data sent", caption, data, axes("MB sent", runs[0].shown.caption))


def times(runs: Sequence[Run]) -> Iterator[Chart]:
    """Seconds of a round by its parts."""
    data = []
    found: dict[str, list[float]] = {}
    for run in runs:
        rows = run.line.metrics
        for part in PARTS:
            found.setdefault(part, []).append(sum(row.get(f"seconds/{part}", 0.0) for row in rows) / max(1, len(rows)))
        rest = sum(row["seconds"] for row in rows) / max(1, len(rows)) - sum(found[part][-1] for part in PARTS)
        found.setdefault("rest", []).append(max(0.0, rest))
    if not any(any(found[part]) for part in PARTS):
        return
    names = [run.title for run in runs]
    for number, (part, values) in enumerate(found.items()):
        if any(value > 1e-4 for value in values):
            text = PARTS.get(part, "the rest")
            data.append({"type": "bar", "orientation": "h", "name": text, "y": names, "x": values, "marker": {"color": colour(number)}})
    layout = {"xaxis": {"title": {"text": "seconds a round"}}, "yaxis": {"automargin": True}, "barmode": "stack", "bargap": 0.6}
    yield Chart("Where a round's time goes", "A mean over rounds, without evaluation.", data, layout)


# ---- agreement


def consensus(runs: Sequence[Run]) -> Iterator[Chart]:
    """The disagreement of clients that gossip, against what the graph promises."""
    data = []
    for number, run in enumerate(runs):
        after, before = run.line.column("consensus_error"), run.line.column("consensus_error_before_mixing")
        if not after:
            continue
        rounds = [row["round"] for row in run.line.metrics if "consensus_error" in row]
        prefix = f"{run.title}: " if len(runs) > 1 else ""
        data.append(lined(f"{prefix}after mixing", rounds, after, number))
        if before:
            data.append({**lined(f"{prefix}before mixing", rounds, before, number), "line": {"color": colour(number), "dash": "dash"}})
            second = rho(_matrix(run))
            bound = [second**2 * value for value in before]
            title = f"{prefix}bound: rho² = {second**2:.3f} of before"
            data.append({**lined(title, rounds, bound, number), "line": {"color": colour(number), "dash": "dot"}, "mode": "lines"})
    if data:
        layout = axes("round", "mean squared distance to the mean")
        layout["yaxis"] |= {"type": "log", "exponentformat": "power"}
        caption = (
            "One round of mixing leaves at most rho² of the disagreement, rho the second largest eigenvalue of the mixing matrix "
            "of the whole graph; distances are estimated from random sums."
        )
        yield Chart("Disagreement between clients", caption, data, layout)


def _matrix(run: Run) -> Any:
    names = list(run.clients)
    return run.experiment.network.matrix(names, run.experiment.seed, 0, range(len(names)))


def graph(runs: Sequence[Run]) -> Iterator[Chart]:
    """Who hears whom."""
    for run in runs:
        if not run.experiment.gossips:
            continue
        names = list(run.clients)
        links = nx.Graph(run.experiment.network.topology.graph(names, 0).to_undirected())
        places = nx.circular_layout(links)
        ends: tuple[list[float | None], list[float | None]] = ([], [])
        for one, other in links.edges():
            for k in (0, 1):
                ends[k].extend([float(places[one][k]), float(places[other][k]), None])
        values = run.values() if run.line.last else dict.fromkeys(names, math.nan)
        shown = [values.get(name, math.nan) for name in names]
        lines = {"type": "scatter", "mode": "lines", "x": ends[0], "y": ends[1], "hoverinfo": "skip", "line": {"color": "#8888888c"}}
        nodes = {
            "type": "scatter",
            "mode": "markers+text" if len(names) <= FEW else "markers",
            "x": [float(places[k][0]) for k in range(len(names))],
            "y": [float(places[k][1]) for k in range(len(names))],
            "text": names,
            "textposition": ["top center" if places[k][1] >= 0 else "bottom center" for k in range(len(names))],
            "customdata": shown,
            "hovertemplate": "%{text}: %{customdata:.1f}<extra></extra>",
            "cliponaxis": False,
            "marker": {"size": 14, "color": shown, "colorscale": "Viridis", "colorbar": {"thickness": 9}},
        }
        bare = {"visible": False, "range": [-1.35, 1.35]}
        layout = {"showlegend": False, "xaxis": bare, "yaxis": bare}
        title = "Who hears whom" + (f": {run.title}" if len(runs) > 1 else "")
        caption = "Links between clients in the first round; the colour is how each fares on its held-out data."
        yield Chart(title, caption, [lines, nodes], layout)


# ---- objectives and groups


def objectives(runs: Sequence[Run]) -> Iterator[Chart]:
    """Weights of objectives over rounds, and the point each run comes to."""
    data = []
    for number, run in enumerate(runs):
        names = [name for name in (run.line.metrics[-1] if run.line.metrics else {}) if name.startswith("weights/")]
        for k, name in enumerate(names):
            title = name.removeprefix("weights/")
            title = f"{run.title}: {title}" if len(runs) > 1 else title
            data.append(lined(title, [row["round"] for row in run.line.metrics], run.line.column(name), number + k))
    if data:
        caption = "The mean over clients of the weights by which gradients of objectives are combined."
        yield Chart("Weights of objectives", caption, data, axes("round", "weight"))


def front(content: Mapping[str, Any]) -> Chart:
    """A front of trade-offs, from `fedpref pareto`."""
    points, names = content["points"], content["objectives"]
    data = []
    for trained, symbol, title in ((True, "circle", "trained"), (False, "x", "means of neighbours' adapters")):
        some = [point for point in points if point["is_trained"] == trained]
        if some:
            text = [" / ".join(f"{share:.2f}" for share in point["preference"]) for point in some]
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers+text" if trained and len(some) <= FEW else "markers",
                    "name": title,
                    "x": [point["values"][0] for point in some],
                    "y": [point["values"][1] for point in some],
                    "text": text,
                    "textposition": "top center",
                    "cliponaxis": False,
                    "marker": {"symbol": symbol, "size": 10, "color": colour(0 if trained else 1)},
                }
            )
    figures = ", ".join(f"{name} {value:.4g}" for name, value in content["figures"].items())
    caption = f"Each point is a run under the preference beside it ({' / '.join(names)}). {figures[:1].upper()}{figures[1:]}."
    return Chart("The front of trade-offs", caption, data, axes(names[0], names[1]))


def calibration(runs: Sequence[Run]) -> Iterator[Chart]:
    """Of predicted shares: how far from the truth, and whether the stated deviations hold it."""
    data = []
    for number, run in enumerate(runs):
        rows = run.line.last
        if not all("calibration_error" in row for row in rows.values()):
            continue
        x, y = ([row[name] for row in rows.values()] for name in ("calibration_error", "coverage"))
        marks = {"type": "scatter", "mode": "markers", "name": run.title, "x": x, "y": y, "text": list(rows)}
        shown = {"marker": {"color": colour(number), "size": 9}, "hovertemplate": "%{text}: error %{x:.3f}, coverage %{y:.2f}"}
        data.append({**marks, **shown})
    if data:
        caption = (
            "Of each group: the calibration error of its options, and how often a true share lies within the standard deviation "
            "predicted (dotted: a calibrated one)."
        )
        yield Chart("Calibration of each group", caption, data, axes("calibration error", "coverage", shapes=[_level(0.683)]))
