"""The page of runs: one file that opens from a disk, with everything in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedpref.errors import UserError
from fedpref.reports import charts
from fedpref.reports.comparison import bootstrap
from fedpref.reports.read import Line, Run, read
from fedpref.reports.tables import TITLES, bytes_text
from fedpref.rewards.reward import plain
from fedpref.rundirectory import CONFIG
from fedpref.summary import ACCURACY, over_clients

REPORT = "report.html"
FRONT = "front.json"  # what `fedpref pareto` leaves in its folder
FAIRNESS = {
    "mean": "mean",
    "weighted_mean": "by held-out examples",
    "worst": "worst client",
    "worst_decile": "worst decile",
    "gap": "gap",
    "jain": "Jain index",
}
SAMPLES = 12  # answers shown of each run


def write_report(paths: Sequence[Path], output: Path) -> Path:
    """Write the page of runs, or of the fronts among the folders; raises UserError where there is nothing to show."""
    fronts = [json.loads((path / FRONT).read_text()) for path in paths if (path / FRONT).exists()]
    runs = told_apart([read(path) for path in paths if not (path / FRONT).exists()])
    if started := [run for run in runs if not run.line.last]:
        raise UserError(f"{started[0].path}: the run has no evaluation yet. `fedpref watch {started[0].path}` shows it as it goes.")
    if len({run.metric for run in runs}) > 1:
        raise UserError("runs of different tasks are compared by different metrics; give reports of their own.")
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.part")
    beside.write_text(page(runs, fronts))
    beside.replace(output)
    return output


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs with titles of their own: their names, or their directories' where names are alike."""
    names = [run.title for run in runs]
    return [replace(run, title=run.path.name) if names.count(run.title) > 1 else run for run in runs]


def page(runs: Sequence[Run], fronts: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    room = files("fedpref.reports.page")
    drawn = sections(runs, fronts)
    return environment.from_string((room / "page.html").read_text()).render(
        title=", ".join(run.title for run in runs) or "front of trade-offs",
        style=Markup((room / "page.css").read_text()),
        script=Markup((room / "page.js").read_text()),
        plotly=Markup((room / "plotly-basic.min.js").read_text()),
        runs=[told(run) for run in runs],
        sections=drawn,
        charts=Markup(_json([chart.content for _, some in drawn for chart in some])),
        fairness=fairness(runs),
        fairness_titles=list(FAIRNESS.values()),
        caption=runs[0].shown.caption if runs else "",
        clients=client_rows(runs),
        client_lines=[title for title, _, _, _ in charts.every_line(runs)],
    )


def _json(content: Any) -> str:
    """Data inside a script: no number that JSON lacks, nothing that ends the script."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: finite(part) for key, part in value.items()}
        return [finite(part) for part in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(content), separators=(",", ":")).replace("</", "<\\/")


def sections(runs: Sequence[Run], fronts: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[charts.Chart]]]:
    """Titles, and the charts under them that these runs have something for."""
    found = [("Trade-offs", [charts.front(content) for content in fronts])]
    if runs:
        found += [
            ("What was learned", [*charts.held_out(runs), *charts.learning(runs), *charts.calibration(runs)]),
            ("Who gained, who lost", [*charts.gains(runs), *charts.by_client(runs)]),
            ("Objectives", [*charts.objectives(runs)]),
            ("Agreement", [*charts.consensus(runs), *charts.graph(runs)]),
            ("What it cost", [*charts.traffic(runs), *charts.times(runs)]),
        ]
    return [(title, some) for title, some in found if some]


# ---- figures and tables


def interval(values: Mapping[str, float], digits: int) -> str:
    """The 95 % interval of a mean over clients."""
    low, high = bootstrap(np.array([list(values.values())]))
    return "" if math.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"


def told(run: Run) -> dict[str, Any]:
    """A run in words and figures."""
    samples = [(client, row) for client, rows in run.samples.items() for row in rows][:SAMPLES]
    return {
        "title": run.title,
        "words": words(run),
        "cards": cards(run),
        "facts": {name: text for name, text in facts(run).items() if text},
        "config": (run.path / CONFIG).read_text(),
        "samples": [(client, {**row, "prompt": plain(row["prompt"])}) for client, row in samples],
    }


def words(run: Run) -> str:
    """One sentence: who took part, what came of it, who has what of it."""
    values, digits = run.values(), run.shown.digits
    mean, worst, best = _mean(values), min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    rounds = f"{len(run.line.metrics)} of {run.experiment.rounds} rounds of {run.experiment.algorithm.name}"
    said = [f"{len(run.clients)} clients trained {rounds}; their mean held-out {run.shown.title} is {mean:.{digits}f}"]
    if alone := gained(run, "local"):
        up, down = sum(value > 0 for value in alone.values()), sum(value < 0 for value in alone.values())
        kept = f", {len(alone) - up - down} stay" if up + down < len(alone) else ""
        said.append(f"taking part gives {_mean(alone):+.{digits}f} points over training alone: {up} clients gain, {down} lose{kept}")
    said.append(f"the best client is {best} ({values[best]:.{digits}f}), the worst {worst} ({values[worst]:.{digits}f})")
    return "; ".join(said) + "."


def cards(run: Run) -> list[tuple[str, str, str]]:
    """The figures that come first: a name, a value, a note."""
    values, digits, rounds = run.values(), run.shown.digits, max(1, len(run.line.metrics))
    mean, worst = _mean(values), min(values, key=values.__getitem__)
    sent, seconds = (sum(run.line.column(name)) for name in ("bytes_up", "seconds"))
    sent += sum(run.line.column("bytes_down"))
    found = [(f"held-out {run.shown.caption}", f"{mean:.{digits}f}", f"mean over clients{interval(values, digits)}")]
    differences = {name: difference for name in run.references if (difference := gained(run, name))}
    found += [
        (f"against {TITLES[name]}", f"{_mean(some):+.{digits}f}", f"points{interval(some, digits)}") for name, some in differences.items()
    ]
    found.append(("worst client", f"{values[worst]:.{digits}f}", worst))
    cost = f"{bytes_text(sent / rounds)} a round"
    if run.metric == ACCURACY and mean > 50:
        cost += f", {bytes_text(sent / (mean - 50))} for each point above a guess"
    time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    return [*found, ("sent", bytes_text(sent), cost), ("time", time, f"{seconds / rounds:.1f} s a round")]


def gained(run: Run, reference: str) -> dict[str, float]:
    """Each client's value less what it has under a reference line; nothing where the run has none."""
    other = run.values(run.references[reference]) if reference in run.references else {}
    return {client: value - other[client] for client, value in run.values().items()} if other else {}


def facts(run: Run) -> dict[str, str]:
    """What ran, on what."""
    spec, here = run.experiment, run.environment
    versions = {"python": here.get("python", ""), **here.get("versions", {})}
    train, test = (sum(about[side] for about in run.clients.values()) for side in ("train", "test"))
    return {
        "algorithm": spec.algorithm.name,
        "model": spec.task.model.path,
        "data": spec.data.name + (f" ({spec.data.path})" if hasattr(spec.data, "path") else ""),
        "clients": f"{len(run.clients)}, {train} training and {test} held-out examples",
        "rounds": f"{len(run.line.metrics)} of {spec.rounds}" + ("" if run.done else " (not finished)"),
        "seed": str(spec.seed),
        "started": here.get("started", ""),
        "machine": f"{here['platform']}, {here['processors']} processors" if here else "",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        "commit": here.get("commit") or "",
        "directory": str(run.path),
    }


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def fairness(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """A row for each line: how its figures spread over clients."""
    return [(title, _spread(run, line)) for title, run, line, _ in charts.every_line(runs) if line.last]


def _spread(run: Run, line: Line) -> list[str]:
    counts = {client: int(row["num_examples"]) for client, row in line.last.items()}
    summary = over_clients(run.values(line), counts)
    return [f"{summary[key]:.{4 if key == 'jain' else run.shown.digits}f}" if key in summary else "" for key in FAIRNESS]


def client_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, list[str]]]:
    """A row for each client: its examples, and its value under each line."""
    known = {name: about for run in runs for name, about in run.clients.items()}
    names = sorted(known, key=lambda name: (-known[name]["train"], name))
    columns = [(run, run.values(line)) for _, run, line, _ in charts.every_line(runs)]
    return [
        (
            name,
            str(known[name]["train"]),
            str(known[name]["test"]),
            [f"{values[name]:.{run.shown.digits}f}" if name in values else "" for run, values in columns],
        )
        for name in names
    ]
