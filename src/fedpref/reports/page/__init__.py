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
from fedpref.models.language import BUILTIN
from fedpref.reports import charts, methods
from fedpref.reports.comparison import bootstrap
from fedpref.reports.read import Line, Run, read
from fedpref.reports.tables import TITLES, bytes_text
from fedpref.rewards.reward import plain
from fedpref.rundirectory import CONFIG
from fedpref.summary import ACCURACY, of_objectives, over_clients

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
Column = tuple[Run, Mapping[str, float], str]  # of a table: whose, clients' values, the sign they are written with
SAMPLES = 12  # answers shown of each run
ENOUGH = 8  # clients, for an interval: with fewer, percentiles are much too narrow (see `bootstrap`)
MEANINGS = {"local": "alone is each client's own model, trained on its own data", "centralised": "pooled is one model on all data together"}


def write_report(paths: Sequence[Path], output: Path) -> Path:
    """Write the page of runs, or of the fronts among the folders; raises UserError where there is nothing to show."""
    fronts = [json.loads((path / FRONT).read_text()) for path in paths if (path / FRONT).exists()]
    runs = told_apart([read(path) for path in paths if not (path / FRONT).exists()])
    if started := [run for run in runs if not run.line.last]:
        raise UserError(
            f"{started[0].path}: the run has no evaluation yet (evaluate_every says when). "
            f"`fedpref watch {started[0].path}` shows it as it goes."
        )
    if len({run.metric for run in runs}) > 1:
        raise UserError("runs of different tasks are compared by different metrics; give reports of their own.")
    if output.is_dir():
        raise UserError(f"--output {output}: this is a folder. Name a file.")
    text = page(runs, fronts)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.part")
    beside.write_text(text)
    beside.replace(output)
    return output


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs with titles of their own: their names, or their directories' where names are alike, or whole paths where these are too."""
    for title in (lambda run: run.path.name, lambda run: str(run.path)):
        names = [run.title for run in runs]
        runs = [replace(run, title=title(run)) if names.count(run.title) > 1 else run for run in runs]
    return list(runs)


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
        fairness_titles=[FAIRNESS[key] for key in _spreads(runs)],
        caption=runs[0].shown.caption if runs else "",
        clients=client_rows(runs),
        client_lines=[title for title, _, _, _ in charts.every_line(runs)],
        gain_lines=[charts.with_prefix(prefix, "gain over alone") for prefix, run, _ in charts.main_lines(runs) if run.gains("local")],
        newcomers=newcomer_rows(runs),
        newcomer_lines=[title for title, _ in _joined(runs)],
        objectives=objective_rows(runs),
        meanings=[text for name, text in MEANINGS.items() if any(name in run.references for run in runs)],
        enough=ENOUGH,
    )


def _json(content: Any) -> str:
    """Data inside a script: no number that JSON lacks, nothing that ends the script."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: finite(part) for key, part in value.items()}
        return [finite(part) for part in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(content), separators=(",", ":")).replace("<", "\\u003c")


def sections(runs: Sequence[Run], fronts: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[charts.Chart]]]:
    """Titles, and the charts under them that these runs have something for."""
    found = [("Trade-offs", [methods.front(content) for content in fronts])]
    if runs:
        gained = list(charts.gains(runs))
        found += [
            ("What was learned", [*charts.held_out(runs), *charts.learning(runs), *methods.calibration(runs)]),
            ("Who gained, who lost" if gained else "Clients", [*gained, *charts.by_client(runs)]),
            ("Objectives", [*methods.objectives(runs)]),
            ("Agreement", [*methods.consensus(runs), *methods.graph(runs)]),
            ("What it cost", [*charts.traffic(runs), *charts.times(runs)]),
        ]
    return [(title, some) for title, some in found if some]


# ---- figures and tables


def interval(values: Mapping[str, float], digits: int, sign: str = "") -> str:
    """The 95 % interval of a mean over clients, in brackets; nothing where they are too few."""
    if len(values) < ENOUGH:
        return ""
    low, high = bootstrap(np.array([list(values.values())]))
    return f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def told(run: Run) -> dict[str, Any]:
    """A run in words and figures."""
    ranked = sorted(
        (k, client, row) for client, rows in run.samples.items() for k, row in enumerate(rows)
    )  # each client's first ones first
    return {
        "title": run.title,
        "words": words(run),
        "cards": cards(run),
        "facts": {name: text for name, text in facts(run).items() if text},
        "config": (run.path / CONFIG).read_text(),
        "samples": [(client, {**row, "prompt": plain(row["prompt"])}) for _, client, row in ranked[:SAMPLES]],
        "all_samples": len(ranked),
    }


def words(run: Run) -> str:
    """Who took part, what came of it, who has what of it."""
    values, digits = run.values(), run.shown.digits
    mean, worst, best = _mean(values), min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    rounds = f"{len(run.line.metrics)} of {run.experiment.rounds} rounds of {run.experiment.algorithm.name}"
    joined = len(next(iter(run.newcomers.values()))[1]) if run.newcomers else 0
    said = [f"{len(values)} clients trained {rounds}" + (f", {joined} joined afterwards" if joined else "")]
    said[0] += f"; their mean held-out {run.shown.title} is {mean:.{digits}f}"
    if gained := run.gains("local"):
        found = f"against training alone that is {_mean(gained):+.{digits}f} points{interval(gained, digits, '+')}"
        said += [f"{found}{_doubt(gained)}", f"{_counted(gained, run.noise('local'))}"]
    if values[best] > values[worst]:
        said.append(f"the best client is {best} ({values[best]:.{digits}f}), the worst {worst} ({values[worst]:.{digits}f})")
    return "; ".join(said) + "."


def _doubt(gained: Mapping[str, float]) -> str:
    """What is to be said where a mean gain may be none."""
    if len(gained) < ENOUGH:
        return f", over {len(gained)} clients: too few to tell it from none"
    low, high = bootstrap(np.array([list(gained.values())]))
    return ", which cannot be told from none" if low <= 0 <= high else ""


def _counted(gained: Mapping[str, float], noise: Mapping[str, float]) -> str:
    up, down = sum(value > 0 for value in gained.values()), sum(value < 0 for value in gained.values())
    kept = f", {len(gained) - up - down} stay" if up + down < len(gained) else ""
    text = f"{up} clients gain, {down} lose{kept}"
    if not noise:
        return text
    up, down = (sum(way * value > noise[name] for name, value in gained.items()) for way in (1, -1))
    return f"{text} ({up} and {down} of them by more than two standard errors of their held-out pairs)"


def cards(run: Run) -> list[tuple[str, str, str]]:
    """The figures that come first: a name, a value, a note."""
    values, digits, rounds = run.values(), run.shown.digits, max(1, len(run.line.metrics))
    mean, worst = _mean(values), min(values, key=values.__getitem__)
    up, down, seconds = (sum(run.line.column(name)) for name in ("bytes_up", "bytes_down", "seconds"))
    found = [(f"held-out {run.shown.caption}", f"{mean:.{digits}f}", f"mean over clients{interval(values, digits)}")]
    gains = {name: gained for name in run.references if (gained := run.gains(name))}
    found += [
        (f"against {TITLES[name]}", f"{_mean(some):+.{digits}f}", f"points{interval(some, digits, '+')}") for name, some in gains.items()
    ]
    found.append(("worst client", f"{values[worst]:.{digits}f}", worst))
    for name, (before, after) in run.newcomers.items():
        if name == run.line.name:
            note = f"{len(after)} clients, mean; {_mean(before):.{digits}f} as they came"
            found.append(("newcomers", f"{_mean(after):.{digits}f}", note))
    each = (up + down) / max(1.0, sum(run.line.column("clients")))
    cost = f"{bytes_text(up / rounds)} up and {bytes_text(down / rounds)} down a round; {bytes_text(each)} a client and round"
    if run.metric == ACCURACY and len(values) >= ENOUGH and bootstrap(np.array([list(values.values())]))[0] > 50:
        cost += f"; {bytes_text((up + down) / (mean - 50))} for each point above a guess"
    time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    note = f"{seconds / rounds:.1f} s a round; preparing, evaluating and what it is compared with come on top"
    return [*found, ("sent", bytes_text(up + down), cost), ("time in rounds", time, note)]


def facts(run: Run) -> dict[str, str]:
    """What ran, on what."""
    spec, here = run.experiment, run.environment
    versions = {"python": here.get("python", ""), **here.get("versions", {})}
    trained = [run.clients[name] for name in run.line.last]
    train, test = (sum(about[side] for about in trained) for side in ("train", "test"))
    later = len(run.clients) - len(trained)
    model = spec.task.model.path
    return {
        "algorithm": f"{spec.algorithm.name}: {_first_line(spec.algorithm)}",
        "task": spec.task.name + (f", loss {spec.task.loss.name}" if hasattr(spec.task, "loss") else ""),
        "model": f"{model}, the small model that comes with fedpref" if model == BUILTIN else model,
        "data": f"{spec.data.name}: {_first_line(spec.data)}" + (f" ({spec.data.path})" if hasattr(spec.data, "path") else ""),
        "clients": f"{len(trained)} that trained, with {train} training and {test} held-out examples"
        + (f"; {later} that did not" if later else ""),
        "rounds": f"{len(run.line.metrics)} of {spec.rounds}"
        + ("" if run.done else " (not finished, or not all that it is compared with)"),
        "seed": str(spec.seed),
        "started": here.get("started", ""),
        "machine": f"{here['platform']}, {here['processors']} processors" if here else "",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        "commit": ", ".join(f"{name} {commit}" for name, commit in here.get("commits", {}).items()),
        "directory": str(run.path),
    }


def _first_line(kind: Any) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def fairness(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """A row for each line: how its figures spread over clients."""
    keys = _spreads(runs)
    return [(title, [_spread(run, line).get(key, "") for key in keys]) for title, run, line, _ in charts.every_line(runs)]


def _spreads(runs: Sequence[Run]) -> list[str]:
    """Those of the measures that some line has."""
    return [key for key in FAIRNESS if any(key in _spread(run, line) for _, run, line, _ in charts.every_line(runs))]


def _spread(run: Run, line: Line) -> dict[str, str]:
    counts = {client: int(row["num_examples"]) for client, row in line.last.items()}
    summary = over_clients(run.values(line), counts)
    return {key: f"{value:.{4 if key == 'jain' else run.shown.digits}f}" for key, value in summary.items()}


def client_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, list[str]]]:
    """A row for each client that trained: its examples, its value under each line, and what it gains over training alone."""
    known = {name: run.clients[name] for run in reversed(runs) for name in run.line.last}
    names = sorted(known, key=lambda name: (-known[name]["train"], name))
    columns: list[Column] = [(run, run.values(line), "") for _, run, line, _ in charts.every_line(runs)]
    columns += [(run, gained, "+") for _, run, _ in charts.main_lines(runs) if (gained := run.gains("local"))]
    return [(name, *_sizes(known[name]), _cells(columns, name)) for name in names]


def _sizes(about: Mapping[str, Any]) -> tuple[str, str]:
    return str(about["train"]), str(about["test"])


def _cells(columns: Sequence[Column], name: str) -> list[str]:
    return [f"{values[name]:{sign}.{run.shown.digits}f}" if name in values else "" for run, values, sign in columns]


def _joined(runs: Sequence[Run]) -> list[tuple[str, Column]]:
    """Columns about newcomers: a title, and the values."""
    return [
        (f"{title}, {when}", (run, values, ""))
        for title, run, line, _ in charts.every_line(runs)
        for when, values in zip(("as they came", "after own steps"), run.newcomers.get(line.name, ()), strict=False)
    ]


def newcomer_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, list[str]]]:
    """A row for each client that joined after training."""
    columns = [column for _, column in _joined(runs)]
    known = {name: run.clients[name] for run, values, _ in columns for name in values}
    return [(name, *_sizes(known[name]), _cells(columns, name)) for name in sorted(known)]


def objective_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Of several objectives, what each is measured by: means over clients under each line, at the first evaluation and the last."""
    lines = [line for _, _, line, _ in charts.every_line(runs)]
    names = list(dict.fromkeys(name for line in lines for name in of_objectives(next(iter(line.last.values())))))
    return [(name, [_course(line, name) for line in lines]) for name in names]


def _course(line: Line, metric: str) -> str:
    means = [f"{row['summary'][metric]['mean']:.3f}" for row in line.evaluations if metric in row["summary"]]
    return " → ".join([means[0], means[-1]] if len(means) > 1 else means)
