"""The page's tables, as rows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedpref.numerics.fairness import fairness as even_of
from fedpref.numerics.intervals import interval
from fedpref.numerics.metrics import of_objectives, over_clients
from fedpref.reports.charts import MOST, every_line, main_lines
from fedpref.reports.run import Line, Run
from fedpref.tasks.generation_metrics import before_and_after

EXTREME = 20  # of many clients, the best and the worst that have a row
FAIRNESS = {
    "mean": "mean",
    "weighted_mean": "by held-out examples",
    "worst": "worst client",
    "worst_decile": "worst decile",
    "gap": "gap",
    "std": "standard deviation",
    "jain": "Jain index",
}
# of a table: whose, clients' values, the sign they are written with
Column = tuple[Run, Mapping[str, float], str]


def fairness(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return how values spread over clients: titles of the measures, and a row for each line."""
    spreads = [(title, _spread(run, line)) for title, run, line, _ in every_line(runs)]
    keys = [key for key in FAIRNESS if any(key in spread for _, spread in spreads)]
    return [FAIRNESS[key] for key in keys], [
        (title, [spread.get(key, "") for key in keys]) for title, spread in spreads
    ]


def _spread(run: Run, line: Line) -> dict[str, str]:
    counts = {client: int(row["num_examples"]) for client, row in line.last.items()}
    values = run.values(line)
    summary = over_clients(values, counts)
    texts = {
        key: f"{value:.{4 if key == 'jain' else run.shown.digits}f}"
        for key, value in summary.items()
    }
    known = run.errors(line)
    even = even_of([*values.values()], [known.get(name, math.nan) for name in values])
    for key in ("worst", "worst_decile", "std"):
        if even:
            low, high = getattr(even, key)
            texts[key] += f" [{low:.{run.shown.digits}f}, {high:.{run.shown.digits}f}]"
    return texts


def client_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, list[str]]]:
    """Return a row for each client that trained.

    It has its examples, its value under each line, and what it gains over training alone. Of many
    clients the best and the worst have one.
    """
    known: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        for name in run.line.last:
            known.setdefault(name, []).append(run.clients[name])
    names = sorted(known, key=lambda name: (-known[name][0]["train"], name))
    if len(names) > MOST:
        values = max((run.values() for run in runs), key=len)
        ranked = sorted(values, key=lambda name: (values[name], name))
        names = list(dict.fromkeys([*reversed(ranked[-EXTREME:]), *ranked[:EXTREME]]))
    columns: list[Column] = [(run, run.values(line), "") for _, run, line, _ in every_line(runs)]
    columns += [
        (run, gained, "+") for _, run, _ in main_lines(runs) if (gained := run.gains("alone"))
    ]
    return [(name, *_sizes(*known[name]), _cells(columns, name)) for name in names]


def _sizes(*abouts: Mapping[str, Any]) -> tuple[str, str]:
    """Return numbers of training and of held-out examples.

    There are several of each where runs have given one name to different data.
    """
    train, test = (
        " | ".join(dict.fromkeys(str(about[side]) for about in abouts))
        for side in ("train", "test")
    )
    return train, test


def _cells(columns: Sequence[Column], name: str) -> list[str]:
    return [
        f"{values[name]:{sign}.{run.shown.digits}f}" if name in values else ""
        for run, values, sign in columns
    ]


def joined(runs: Sequence[Run]) -> list[tuple[str, Column]]:
    """Return columns about newcomers: a title, and the values."""
    return [
        (f"{title}, {when}", (run, values, ""))
        for title, run, line, _ in every_line(runs)
        for when, values in zip(
            ("as they came", "after own steps"), run.newcomers.get(line.name, ()), strict=False
        )
    ]


def newcomer_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, list[str]]]:
    """Return a row for each client that joined after training."""
    columns = [column for _, column in joined(runs)]
    known = {name: run.sizes[name] for run, values, _ in columns for name in values}
    return [(name, *_sizes(known[name]), _cells(columns, name)) for name in sorted(known)]


def agreement_rows(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Return who agrees least with gold pairs first: client, early rounds, all rounds."""
    return [
        (name, "" if math.isnan(early) else f"{early:+.2f}", f"{whole:+.2f}")
        for run in runs
        for name, (early, whole) in sorted(run.agreement.items(), key=lambda item: item[1][1])
    ]


def review_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return a row for each blind review of a run: what it was of, and what came of it."""
    rows = []
    for run in runs:
        for name, found in run.reviews.items():
            share = "nothing yet"
            if found["judged"]:
                low, high = 100 * found["low"], 100 * found["high"]
                share = f"{found['preferred']} of {found['judged']}, {low:.0f} to {high:.0f} %"
            raters = f"{len(found['raters'])}"
            if found["alpha"] is not None:
                raters += f", alpha {found['alpha']:.2f}"
            longer = "" if found["longer"] is None else f"{100 * found['longer']:.0f} %"
            whose = f"{run.title}: {name}" if len(runs) > 1 else name
            rows.append((whose, [share, str(found["ties"]), str(found["bad"]), raters, longer]))
    return rows


def answer_rows(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return lines that answered, and a row for each figure of their answers.

    A cell has a mean over clients before training, after, and the difference with its interval.
    """
    found = {
        title: [before_and_after(row) for row in line.last.values()]
        for title, _, line, _ in every_line(runs)
    }
    found = {title: rows for title, rows in found.items() if any(rows)}
    tables = [*found.values()]
    names = list(dict.fromkeys(name for table in tables for row in table for name in row))
    return [*found], [
        (name, [_moved([row.get(name) for row in table]) for table in tables]) for name in names
    ]


def _moved(pairs: Sequence[tuple[float | None, float] | None]) -> str:
    known = [pair for pair in pairs if pair is not None]
    if not known:
        return ""
    after = [value for _, value in known]
    mean = sum(after) / len(after)
    before = [value for value, _ in known if value is not None]
    if len(before) < len(after):
        return f"{mean:.3g}{_bracketed(after)}"
    apart = [value - then for value, then in zip(after, before, strict=True)]
    return (
        f"{sum(before) / len(before):.3g} → {mean:.3g} "
        f"({sum(apart) / len(apart):+.2g}{_bracketed(apart, '+')})"
    )


def _bracketed(values: Sequence[float], sign: str = "") -> str:
    low, high = interval(np.array([values]))
    return "" if math.isnan(low) else f" [{low:{sign}.2g}, {high:{sign}.2g}]"


def objective_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return a row for each metric of several objectives.

    It has means over clients under each line, at the first evaluation and the last.
    """
    lines = [line for _, _, line, _ in every_line(runs)]
    names = list(
        dict.fromkeys(
            name for line in lines for name in of_objectives(next(iter(line.last.values())))
        )
    )
    return [(name, [_course(line, name) for line in lines]) for name in names]


def _course(line: Line, metric: str) -> str:
    means = [
        f"{row['summary'][metric]['mean']:.3f}"
        # from one to the next they are compared on the same rows alone
        for row in (line.course if line.evaluations[-1] in line.course else line.evaluations[-1:])
        if metric in row["summary"]
    ]
    return " → ".join([means[0], means[-1]] if len(means) > 1 else means)
