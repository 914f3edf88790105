"""Charts of what only some methods have: agreement of neighbours, objectives, calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedpref.experiments.rounds import Cohorts
from fedpref.numerics.metrics import of_objectives
from fedpref.numerics.topology import networkx, rho
from fedpref.reports.charts import (
    DOTTED,
    FEW,
    Chart,
    axes,
    colour,
    every_line,
    lined,
    main_lines,
    with_prefix,
)
from fedpref.reports.paired import stated
from fedpref.reports.run import Run

ROUNDING = 1e-12  # of the largest: what is below is rounding


def consensus(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield charts of how far clients that gossip are apart, against what the graph promises."""
    data = []
    for prefix, run, number in main_lines(runs):
        rows = [row for row in run.line.metrics if "consensus_error" in row]
        if not rows:
            continue
        before = [row.get("consensus_error_before_mixing", math.nan) for row in rows]
        floor = ROUNDING * max((value for value in before if math.isfinite(value)), default=0.0)
        rounds = [row["round"] for row in rows]
        after = [max(row["consensus_error"], floor) for row in rows]
        data.append(lined(with_prefix(prefix, "after mixing"), rounds, after, number))
        if floor:
            bounds = [
                max(value * left**2, floor)
                for value, left in zip(before, left_by_mixing(run, rows), strict=True)
            ]
            data.append(lined(with_prefix(prefix, "before mixing"), rounds, before, number, 1))
            data.append(
                {**lined(with_prefix(prefix, "bound"), rounds, bounds, number, 2), "mode": "lines"}
            )
    if data:
        layout = axes("round", "mean squared distance to the mean")
        values = [value for trace in data for value in trace["y"] if value > 0]
        decades = math.log10(max(values) / min(values)) if values else 0.0
        layout["yaxis"] |= {
            "type": "log",
            "tickformat": ".0e",
            "dtick": math.ceil(decades / 8) if decades > 4 else "D2",
        }
        caption = (
            "The bound is rho² of what there was before, rho the largest singular value of the "
            "round's mixing matrix beside the mean, "
            "with clients' weights, by which it may be above one; distances are estimated from "
            "random sums."
        )
        yield Chart("Disagreement between clients", caption, data, layout)


def left_by_mixing(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return rho of each round's mixing matrix, among those that took part.

    It is nan where fewer did than were drawn.
    """
    spec, names = run.experiment, list(run.clients)
    sizes = {name: int(about["train"]) for name, about in run.clients.items()}
    chances = spec.federation.weights(sizes, spec.seed)
    errors, known = [], dict[tuple[int, ...], float]()
    cohorts = Cohorts(spec, chances)
    for row in rows:
        active, _ = cohorts.of(row["round"] - 1)
        if not (spec.network.is_fixed and active in known):
            weights = [
                1.0 if spec.federation.weighting == "equal" else sizes[names[i]] for i in active
            ]
            matrix = spec.network.matrix(names, spec.seed, row["round"] - 1, active)[active, :][
                :, active
            ]
            known[active] = rho(matrix, weights)
        errors.append(known[active] if len(active) == row["clients"] else math.nan)
    return errors


def graph(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield a chart of who hears whom."""
    for run in runs:
        if not run.experiment.algorithm.gossips:
            continue
        names = list(run.clients)
        links = networkx().Graph(run.experiment.network.topology.graph(names, 0).to_undirected())
        positions = networkx().circular_layout(links)
        ends: tuple[list[float | None], list[float | None]] = ([], [])
        for one, other in links.edges():
            for k in (0, 1):
                ends[k].extend([float(positions[one][k]), float(positions[other][k]), None])
        values = run.values()
        shown = [values.get(name, math.nan) for name in names]
        lines = {
            "type": "scatter",
            "mode": "lines",
            "x": ends[0],
            "y": ends[1],
            "hoverinfo": "skip",
            "line": {"color": "#8888888c"},
        }
        nodes = {
            "type": "scatter",
            "mode": "markers+text" if len(names) <= FEW else "markers",
            "x": [float(positions[k][0]) for k in range(len(names))],
            "y": [float(positions[k][1]) for k in range(len(names))],
            "text": names,
            "textposition": [
                "top center" if positions[k][1] >= 0 else "bottom center" for k in range(len(names))
            ],
            "customdata": shown,
            "hovertemplate": "%{text}: %{customdata:.1f}<extra></extra>",
            "cliponaxis": False,
            "marker": {
                "size": 14,
                "color": shown,
                "colorscale": "Viridis",
                "line": {"width": 1, "color": "#888888"},
                "colorbar": {"thickness": 9, "title": {"text": run.shown.caption, "side": "right"}},
            },
        }
        bare = {"visible": False, "range": [-1.35, 1.35]}
        layout = {"showlegend": False, "xaxis": bare, "yaxis": bare}
        title = "Who hears whom" + (f": {run.title}" if len(runs) > 1 else "")
        caption = (
            "Links between clients, those of the first round where they change; the colour "
            "is how each fares on its held-out data."
        )
        yield Chart(title, caption, [lines, nodes], layout)


# ---- objectives and groups


def objectives(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield charts of what objectives come to, and of their weights, over rounds."""
    # then objectives are told apart by dashes, otherwise by colours
    several = len(list(every_line(runs))) > 1
    reached, weighed = [], []

    def drawn(name: str, x: Sequence[Any], y: Sequence[Any], number: int, k: int) -> dict[str, Any]:
        return lined(name, x, y, number, k) if several else lined(name, x, y, number + k)

    for title, _, line, number in every_line(runs):
        metrics = [
            name
            for name in of_objectives(next(iter(line.last.values())))
            if name.startswith("rewards/")
        ]
        if len(metrics) < 2 or len(line.course) < 2:
            continue
        for k, metric in enumerate(metrics):
            name = with_prefix(title if several else "", metric.rsplit("/", 1)[1])
            rounds = [row["round"] for row in line.course]
            means = [row["summary"][metric]["mean"] for row in line.course]
            reached.append(drawn(name, rounds, means, number, k))
    for prefix, run, number in main_lines(runs):
        last = run.line.metrics[-1] if run.line.metrics else {}
        for k, name in enumerate(name for name in last if name.startswith("weights/")):
            rounds = [row["round"] for row in run.line.metrics if name in row]
            title = with_prefix(prefix, name.removeprefix("weights/"))
            weighed.append(drawn(title, rounds, run.line.column(name), number, k))
    if reached:
        caption = "Held-out, of each objective: means over clients."
        yield Chart(
            "What objectives come to", caption, reached, axes("round", "reward or accuracy")
        )
    if weighed:
        caption = (
            "The mean over clients of the weights by which gradients of objectives are combined."
        )
        yield Chart("Weights of objectives", caption, weighed, axes("round", "weight"))


def front(content: Mapping[str, Any]) -> Chart:
    """Return the chart of a front of trade-offs, from `fedpref pareto`."""
    points, names = content["points"], content["objectives"]
    data = []
    for trained, symbol, title in (
        (True, "circle", "trained"),
        (False, "x", "means of neighbours' adapters"),
    ):
        some = [point for point in points if point["is_trained"] == trained]
        if some:
            text = [" / ".join(f"{share:.2f}" for share in point["preference"]) for point in some]
            marker: dict[str, Any] = {
                "size": 10,
                "symbol": symbol,
                "color": colour(0 if trained else 1),
            }
            if len(names) > 2:
                third = [point["values"][2] for point in some]
                marker |= {
                    "color": third,
                    "colorscale": "Viridis",
                    "colorbar": {"thickness": 9, "title": {"text": names[2], "side": "right"}},
                }
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers+text" if trained and len(some) <= FEW else "markers",
                    "name": title,
                    "x": [point["values"][0] for point in some],
                    "y": [point["values"][1] for point in some],
                    "text": text,
                    "textposition": "top center",
                    "marker": marker,
                }
            )
    figures = ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" for name, value in content["figures"].items()
    )
    caption = (
        f"Each point is a run under the preference beside it ({' / '.join(names)}). "
        f"{figures[:1].upper()}{figures[1:]}."
    )
    if len(names) > 3:
        caption += f" Of {len(names)} objectives the first three are drawn."
    return Chart("The front of trade-offs", caption, data, axes(names[0], names[1]))


def for_kl(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield a chart of what a line has reached for how far it has moved, where that is measured."""
    data = []
    for name, run, line, number in every_line(runs):
        rows = [row["summary"] for row in line.course if "kl" in row["summary"]]
        if len(rows) > 1:
            x = [row["kl"]["mean"] for row in rows]
            y = [run.shown.scale * row[run.metric]["mean"] for row in rows]
            text = [f"round {row['round']}" for row in line.course if "kl" in row["summary"]]
            data.append({**lined(name, x, y, number), "text": text})
    if data:
        caption = (
            "Means over clients at each evaluation, against the KL divergence from the reference: "
            "of two lines the better one is above at the same KL, not the one that ends higher."
        )
        layout = axes("KL to the reference", runs[0].shown.caption)
        yield Chart(f"Held-out {runs[0].shown.title} for KL", caption, data, layout)


def reliability(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield a chart of how often pairs are ranked rightly, by how sure a line is of them."""
    data: list[dict[str, Any]] = []
    for name, run, line, number in every_line(runs):
        known = stated(run.path, line.name) if run.done else {}
        if not known:
            continue
        together = [pair for some in known.values() for pair in some]
        x, y, text = _binned(together)
        data.append({**lined(name, x, y, number), "text": text, "hoverinfo": "text+name"})
        if len(runs) == 1 and line is run.line:
            for k, (client, some) in enumerate(known.items()):
                x, y, text = _binned(some)
                data.append(
                    {
                        **lined(client if k else "each client", x, y, 0),
                        "opacity": 0.35,
                        "mode": "lines",
                        "line": {"color": "#7F7F7F"},
                        "legendgroup": "clients",
                        "showlegend": not k,
                        "text": [f"{client}: {one}" for one in text],
                        "hoverinfo": "text",
                    }
                )
    if data:
        even = {"type": "line", "x0": 0.5, "y0": 0.5, "x1": 1, "y1": 1, "line": DOTTED}
        caption = (
            "Pairs by the probability that a line gives to the answer it prefers (sigmoid of the "
            "reward margin), and the share of them that it ranks rightly; on the dotted line it is "
            "as often right as it says, below it too sure. Hover for the number of pairs."
        )
        layout = axes("stated probability", "share ranked rightly", shapes=[even])
        yield Chart("Is it as sure as it may be?", caption, data, layout)


def _binned(
    pairs: Sequence[tuple[float, float]],
) -> tuple[list[float], list[float], list[str]]:
    """Return mean probability, share right and a text, of pairs in bins of a tenth."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for sure, right in pairs:
        bins.setdefault(min(int(10 * sure), 9), []).append((sure, right))
    x, y, text = [], [], []
    for _, some in sorted(bins.items()):
        sure, right = (sum(values) / len(some) for values in zip(*some, strict=True))
        x.append(sure)
        y.append(right)
        text.append(f"{100 * sure:.0f} % sure, {100 * right:.0f} % right, {len(some)} pairs")
    return x, y, text


def calibration(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield a chart of how far predicted shares are from the truth, and how often intervals hold
    it.
    """
    data = []
    for prefix, run, number in main_lines(runs):
        rows = run.line.last
        if not all({"calibration_error", "coverage"} <= row.keys() for row in rows.values()):
            continue
        x, y = ([row[name] for row in rows.values()] for name in ("calibration_error", "coverage"))
        marks = {
            "type": "scatter",
            "mode": "markers",
            "name": prefix or run.title,
            "x": x,
            "y": y,
            "text": list(rows),
        }
        shown = {
            "marker": {"color": colour(number), "size": 9},
            "hovertemplate": "%{text}: error %{x:.3f}, coverage %{y:.2f}",
        }
        data.append({**marks, **shown})
    if data:
        caption = (
            "Of each group: the calibration error of its options, and how often a true share "
            "lies within the standard deviation "
            "predicted (dotted: a calibrated one)."
        )
        calibrated = {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": 0.683,
            "y1": 0.683,
            "line": DOTTED,
        }
        yield Chart(
            "Calibration of each group",
            caption,
            data,
            axes("calibration error", "coverage", shapes=[calibrated]),
        )
