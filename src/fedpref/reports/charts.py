"""Charts of runs, in Plotly's form: plain data, drawn by the page that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import escape

from fedpref.experiments.free_baselines import FREE_LINES
from fedpref.numerics.metrics import ACCURACY
from fedpref.reports.run import Line, Run

# told apart by the colour-blind too
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8A6FD1",
    "#7F7F7F",
)
GAIN, LOSS, PALE = COLOURS[0], COLOURS[1], "59"  # pale: where luck would do
DOTTED = {"dash": "dot", "width": 1, "color": "#888888"}
DASHES = ("solid", "dash", "dot")
FEW = 24  # clients whose names fit beside bars
MOST = 200  # clients that have a bar each; of more it is shown how they are spread
BINS = 25
LONG = 18  # characters of a name beside an axis; the whole is seen on hovering
LEARNING = {
    "loss": "training loss",
    ACCURACY: "training pair accuracy",
    "error": "training error",
    "reward": "training reward",
}
PARTS = {
    "each": "on clients",
    "mean": "averaging",
    "mix": "mixing with neighbours",
    "report": "reports",
}


@dataclass(frozen=True)
class Chart:
    """A figure with its title and how to read it."""

    title: str
    caption: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        """Return the figure for Plotly, with names escaped.

        Plotly would take tags in them for mark-up, and dollars for mathematics.
        """
        texts = ("name", "x", "y", "text", "legendgroup", "hovertext")
        return {
            "data": [
                {key: _text(value) if key in texts else value for key, value in trace.items()}
                for trace in self.data
            ],
            "layout": _titled(self.layout),
        }


def _titled(layout: Any) -> Any:
    """Return a layout with its titles escaped; names on axes are already."""
    if isinstance(layout, Mapping):
        return {
            key: _text(value) if key == "text" else _titled(value) for key, value in layout.items()
        }
    return [_titled(part) for part in layout] if isinstance(layout, list) else layout


def _text(value: Any) -> Any:
    if isinstance(value, str):
        return str(escape(value)).replace("$", "&#36;")
    return [_text(part) for part in value] if isinstance(value, list) else value


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def filled(number: int) -> dict[str, Any]:
    """Return the style of bars."""
    return {
        "color": colour(number),
        "pattern": {"shape": ("", "/", "x")[number // len(COLOURS) % 3]},
    }


def axes(x: str, y: str, **other: Any) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}, **other}


def names_on(axis: dict[str, Any], names: Sequence[str]) -> None:
    """Make an axis one of names; long ones are cut, and there are none where they are too many."""
    shown = [name if len(name) <= LONG else name[: LONG - 1] + "…" for name in names]
    axis |= {
        "type": "category",
        "tickvals": _text(list(names)),
        "ticktext": _text(shown),
        "showticklabels": len(names) <= FEW,
    }


def lined(
    name: str, x: Sequence[Any], y: Sequence[Any], number: int, dash: int = 0
) -> dict[str, Any]:
    """Return a line's points and style; single points are seen too."""
    mode = "lines+markers" if len(x) <= 30 else "lines"
    line = {"color": colour(number), "dash": DASHES[(dash + number // len(COLOURS)) % len(DASHES)]}
    return {"type": "scatter", "mode": mode, "name": name, "x": list(x), "y": list(y), "line": line}


def band(
    name: str, x: Sequence[Any], low: Sequence[Any], high: Sequence[Any], number: int
) -> list[dict[str, Any]]:
    """Return the two traces of a pale band, which goes with the line of its name."""
    edge = {
        "type": "scatter",
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": name,
        "x": list(x),
    }
    fill = {"fill": "tonexty", "fillcolor": colour(number) + "26"}
    return [{**edge, "y": list(high)}, {**edge, "y": list(low), **fill}]


def every_line(
    runs: Sequence[Run], *, untold: bool = False
) -> Iterator[tuple[str, Run, Line, int]]:
    """Yield (title, run, line, colour index) for all lines of all runs that were evaluated.

    A line has the same colour in all charts.

    Args:
        runs: Whose.
        untold: Also those of runs whose evaluations have no rows of single clients.
    """
    number = 0
    for run in runs:
        for line in (run.line, *run.baselines.values()):
            kind = line.name
            title = (
                kind
                if len(runs) == 1
                else run.title
                if line is run.line
                else f"{run.title}: {kind}"
            )
            if line.rounds < run.line.rounds:
                title += f", after round {line.rounds}"
            if line.last or (untold and run.is_summed):
                yield title, run, line, number
            number += 1


def main_lines(runs: Sequence[Run], *, untold: bool = False) -> Iterator[tuple[str, Run, int]]:
    """Yield (legend prefix, run, colour index) for each run's own algorithm; see `every_line`."""
    for title, run, line, number in every_line(runs, untold=untold):
        if line is run.line:
            yield title if len(runs) > 1 else "", run, number


def with_prefix(prefix: str, name: str) -> str:
    """Return a legend's entry with its prefix."""
    return f"{prefix}: {name}" if prefix else name


# ---- what was learned


def learning(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield charts of training's losses and accuracies, over rounds."""
    for metric, title in LEARNING.items():
        scale = 100 if metric == ACCURACY else 1
        data = [
            lined(
                name,
                [row["round"] for row in line.metrics if metric in row],
                [scale * v for v in line.column(metric)],
                number,
            )
            for name, _, line, number in every_line(runs, untold=True)
            if line.column(metric)
        ]
        if data:
            unit = ", %" if scale == 100 else ""
            caption = (
                "On each round's own examples, before each step; a mean over clients, "
                "weighted by their numbers of examples."
            )
            yield Chart(title.capitalize(), caption, data, axes("round", title + unit))


ROOM = 0.08  # of a chart's height, that a name takes


def held_out(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield charts of the metric by which clients are compared, over rounds.

    They show each client, the mean, and the quartiles.
    """
    if max((len(line.course) for _, _, line, _ in every_line(runs)), default=0) < 2:
        return
    shown, data = runs[0].shown, []
    alone = len(runs) == 1
    for name, run, line, number in every_line(runs):
        rounds = [row["round"] for row in line.course]
        clients = sorted(line.last)
        nobody = {run.metric: math.nan}  # a client that was left out of an evaluation
        table = np.array(
            [
                [shown.scale * row["clients"].get(c, nobody)[run.metric] for c in clients]
                for row in line.course
            ]
        )
        low, high = np.nanpercentile(table, [25, 75], axis=1)
        data += [
            *band(name, rounds, low.tolist(), high.tolist(), number),
            {
                **lined(name, rounds, np.nanmean(table, axis=1).tolist(), number),
                "legendgroup": name,
            },
        ]
        if alone and line is run.line:
            faint = {
                "opacity": 0.35,
                "legendgroup": "clients",
                "mode": "lines",
                "line": {"color": "#7F7F7F"},
            }
            data += [
                {
                    **lined(c, rounds, table[:, k].tolist(), 0),
                    **faint,
                    "showlegend": not k,
                    "name": c if k else "each client",
                    "hovertext": c,
                    "hoverinfo": "text+y",
                }
                for k, c in enumerate(clients)
            ]
            data.append(_named(rounds[-1], dict(zip(clients, table[-1].tolist(), strict=True))))
    caption = "The mean over clients; the band holds the middle half of them"
    caption += f"; thin lines are the clients of {runs[0].line.name}." if alone else "."
    caption += " On rows that are set aside to choose by." * runs[0].line.chooses
    yield Chart(f"Held-out {shown.title} over rounds", caption, data, axes("round", shown.caption))


def _named(round: int, values: Mapping[str, float]) -> dict[str, Any]:
    """Return names of clients at the ends of their lines: the best, the worst, and who has room."""
    ranked = sorted((value, name) for name, value in values.items() if math.isfinite(value))
    ends, room = ranked[:1], (ranked[-1][0] - ranked[0][0]) * ROOM if ranked else 0.0
    for value, name in ranked[1:-1]:
        if ends[-1][0] + room <= value <= ranked[-1][0] - room:
            ends.append((value, name))
    ends += ranked[1:][-1:]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [round] * len(ends),
        "y": [value for value, _ in ends],
        "text": [name if len(name) <= LONG else name[: LONG - 1] + "…" for _, name in ends],
        "textposition": ["bottom left", *["top left"] * (len(ends) - 1)],
        "textfont": {"size": 11},
        "hoverinfo": "skip",
        "showlegend": False,
    }


# ---- who gained, who lost


def gain_colours(gained: Mapping[str, float], luck: Mapping[str, float]) -> list[str]:
    """Return a colour for who gains and one for who loses, pale where luck would do."""
    return [
        (GAIN if value > 0 else LOSS) + ("" if abs(value) > luck.get(name, 0) else PALE)
        for name, value in gained.items()
    ]


def error_bars(lengths: Sequence[float | None]) -> dict[str, Any]:
    """Return thin lines of lengths to either side; none where that is not known."""
    return {
        "type": "data",
        "array": list(lengths),
        "thickness": 1,
        "width": 2,
        "color": "#888888",
    }


def _histogram(
    title: str, measure: str, lines: Mapping[str, tuple[Mapping[str, float], int]]
) -> Chart:
    """Return a chart of how many clients have which value.

    Args:
        title: Of the chart.
        measure: What is on its axis.
        lines: Values by client, and the number of a colour, by line.
    """
    everything = np.array([value for values, _ in lines.values() for value in values.values()])
    edges = np.histogram_bin_edges(everything, BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    data: list[dict[str, Any]] = []
    for name, (values, number) in lines.items():
        counts, _ = np.histogram(list(values.values()), edges)
        bars = {"type": "bar", "name": name, "x": middles.tolist(), "y": counts.tolist()}
        data.append({**bars, "marker": filled(number)})
    caption = "How many clients have which value; the best and the worst stand in the table."
    return Chart(title, caption, data, axes(measure, "clients", barmode="group"))


def gains(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield a chart of each client's value less what it reaches alone."""
    if max(len(run.gains("alone")) for run in runs) > MOST:
        spread = {
            with_prefix(prefix, "gain over alone"): (run.gains("alone"), number)
            for prefix, run, number in main_lines(runs)
            if run.gains("alone")
        }
        yield _histogram(
            "Who gained by taking part, and who lost",
            f"gain in {runs[0].shown.title}, points",
            spread,
        )
        return
    data: list[dict[str, Any]] = []
    names: list[str] = []
    for prefix, run, number in main_lines(runs):
        gained, noise = run.gains("alone"), run.noise("alone")
        names += [name for name in sorted(gained, key=gained.__getitem__) if name not in names]
        if gained:
            bars = {
                "type": "bar",
                "orientation": "h",
                "name": prefix or run.title,
                "marker": filled(number),
            }
            data.append({**bars, "x": list(gained.values()), "y": list(gained)})
            if len(runs) == 1:
                data[-1]["marker"] = {"color": gain_colours(gained, noise)}
            if noise:
                data[-1]["error_x"] = error_bars([noise[name] for name in gained])
    if data:
        layout = axes(f"gain in {runs[0].shown.title}, points", "", barmode="group")
        names_on(layout["yaxis"], names)
        layout["yaxis"] |= {"categoryorder": "array", "categoryarray": layout["yaxis"]["tickvals"]}
        caption = (
            "Held-out, against training alone on its own data: to the right a client gains "
            "by taking part, to the left it loses."
        )
        if "error_x" in data[0]:
            caption += " Thin lines: two standard errors, of held-out pairs"
            caption += "; pale where that is more than the gain." if len(runs) == 1 else "."
        yield Chart("Who gained by taking part, and who lost", caption, data, layout)


def by_client(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield a chart of every client under every line that trains; the table has all."""
    first = runs[0]
    if max(len(run.line.last) for run in runs) > MOST:
        spread = {
            title: (run.values(line), number)
            for title, run, line, number in every_line(runs)
            if line.name not in FREE_LINES
        }
        yield _histogram(f"Held-out {first.shown.title}, over clients", first.shown.caption, spread)
        return
    sizes = {name: run.clients[name]["train"] for run in reversed(runs) for name in run.line.last}
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    data = []
    for title, run, line, number in every_line(runs):
        if line.name in FREE_LINES:
            continue
        values = run.values(line)
        bars = {
            "type": "bar",
            "orientation": "h",
            "name": title,
            "y": names,
            "x": [values.get(name) for name in names],
        }
        data.append({**bars, "marker": filled(number)})
    layout = axes(first.shown.caption, "" if len(names) <= FEW else "clients", barmode="group")
    names_on(layout["yaxis"], names)
    layout["yaxis"] |= {"autorange": "reversed"}
    if first.metric == ACCURACY:
        layout["shapes"] = [
            {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 50, "x1": 50, "line": DOTTED}
        ]
    caption = "Those with most training examples above." + (
        " The dotted line is a guess." if first.metric == ACCURACY else ""
    )
    yield Chart(f"Held-out {first.shown.title} of each client", caption, data, layout)


# ---- what it cost


def traffic(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield charts of the bytes of each round, and of what they bought."""
    data = []
    for prefix, run, number in main_lines(runs, untold=True):
        rounds = [row["round"] for row in run.line.metrics]
        for dash, way in enumerate(("up", "down")):
            megabytes = [value / 1e6 for value in run.line.column(f"bytes_{way}")]
            data.append(lined(with_prefix(prefix, way), rounds, megabytes, number, 2 * dash))
    # the same in every round is a number, not a chart
    if any(len(set(trace["y"])) > 1 for trace in data):
        caption = (
            "Tensors sent in each round, over all clients: up to the coordinator, or to "
            "neighbours; down from the coordinator."
        )
        layout = axes("round", "MB", hovermode="x")
        layout["yaxis"]["rangemode"] = "tozero"
        yield Chart("Data sent", caption, data, layout)
    data = []
    for prefix, run, number in main_lines(runs, untold=True):
        if len(run.line.course) < 2 or not run.metric:
            continue
        sent = np.cumsum([row["bytes_up"] + row["bytes_down"] for row in run.line.metrics]) / 1e6
        at = {0: 0.0} | {
            row["round"]: float(total) for row, total in zip(run.line.metrics, sent, strict=True)
        }
        # of a run at work the last round may not be written yet, and a sum of figures may be lost
        course = [
            row for row in run.line.course if row["round"] in at and run.metric in row["summary"]
        ]
        means = [run.shown.scale * row["summary"][run.metric]["mean"] for row in course]
        data.append(lined(prefix or run.title, [at[row["round"]] for row in course], means, number))
    if data:
        caption = "The mean over clients against all that was sent until then, up and down."
        caption += " On rows that are set aside to choose by." * runs[0].line.chooses
        yield Chart(
            f"Held-out {runs[0].shown.title} for data sent",
            caption,
            data,
            axes("MB sent", runs[0].shown.caption),
        )


def times(runs: Sequence[Run]) -> Iterator[Chart]:
    """Yield a chart of the seconds of a round, by its verbs."""
    if len(runs) == 1:
        return  # one bar says what its number says
    seconds: dict[str, list[float]] = {part: [] for part in (*PARTS, "rest")}
    for run in runs:
        rows = run.line.metrics
        for part in PARTS:
            seconds[part].append(
                sum(row.get(f"seconds/{part}", 0.0) for row in rows) / max(1, len(rows))
            )
        whole = sum(row["seconds"] for row in rows) / max(1, len(rows))
        seconds["rest"].append(max(0.0, whole - sum(seconds[part][-1] for part in PARTS)))
    if not any(any(seconds[part]) for part in PARTS):
        return
    names = [run.title for run in runs]
    data = []
    for number, (part, values) in enumerate(seconds.items()):
        if any(value > 1e-4 for value in values):
            bars = {
                "type": "bar",
                "orientation": "h",
                "name": PARTS.get(part, "the rest"),
                "y": names,
                "x": values,
            }
            data.append({**bars, "marker": filled(number)})
    layout = axes("seconds a round", "", barmode="stack", bargap=0.6)
    names_on(layout["yaxis"], names)
    yield Chart(
        "Where a round's time goes", "A mean over rounds, without evaluation.", data, layout
    )
