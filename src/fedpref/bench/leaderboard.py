"""What a study came to: tables, a file that can be sent in, and a board of such files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fedpref import __version__
from fedpref.bench.trials import TRIALS, Study
from fedpref.errors import UserError, printable, reason
from fedpref.experiments.environment import described
from fedpref.experiments.finished import FinishedRun
from fedpref.numerics import files
from fedpref.numerics.metrics import HEADLINES
from fedpref.reports.comparison import compare
from fedpref.reports.comparison_tables import caption, csv_text, latex, markdown
from fedpref.reports.page import write_report
from fedpref.reports.tables import bytes_text
from fedpref.runs.sweep import members

FORMAT = 3
Number = Annotated[float, Field(allow_inf_nan=False)]


class Figures(TypedDict):
    """What a method came to on a set, in the table's unit: `values` [seeds, clients], of which
    `mean` and the ends of 95 % intervals are made.
    """

    seeds: int
    values: list[list[Number]] | None
    mean: Number
    low: Number | None
    high: Number | None
    worst: Number
    gain: Number | None
    gain_low: Number | None
    gain_high: Number | None
    pairs: Number | None
    seconds_per_round: Number
    processor_seconds: Number | None
    trial_processor_seconds: Number | None
    bytes_per_round: Number
    rates: list[Number]


class SetFigures(TypedDict):
    """What methods, and baselines that are not trained, came to on a set."""

    unit: str
    intervals_over: str
    model: str
    clients: int
    methods: dict[str, Figures]
    free: dict[str, Number]


class Submission(TypedDict):
    """A study that can be sent in."""

    format: int
    suite: str
    fedpref: str
    platform: str
    versions: dict[str, str]
    sets: dict[str, SetFigures]


_FORM = TypeAdapter(Submission)


def submission(study: Study) -> Submission:
    """Return a study's figures, of the seeds of which all methods are done.

    Raises:
        UserError: There are none yet, or runs of another study are in their place.
    """
    about = json.loads(described())
    sets: dict[str, SetFigures] = {}
    for data in study.suite.sets:
        folder = study.output / data.name
        study.refuse_others(data)
        if not study.keep(data):
            continue
        rates, costs = study.chosen_rates(data), study.costs(data)
        seeds = [FinishedRun.at(path).experiment.seed for path in members(folder)]
        first = FinishedRun.at(members(folder)[0])
        rows = compare([folder])
        sets[data.name] = {
            "unit": HEADLINES[rows[0].metric].caption,
            "intervals_over": rows[0].over,
            "model": first.experiment.task.model.path,
            "clients": len(first.clients),
            "methods": {
                row.name: {
                    "seeds": row.seeds,
                    "values": row.values.tolist(),
                    "mean": row.mean,
                    "low": _number(row.interval[0]),
                    "high": _number(row.interval[1]),
                    "worst": row.worst,
                    "gain": _number(row.gain[0]) if row.gain else None,
                    "gain_low": _number(row.gain[1]) if row.gain else None,
                    "gain_high": _number(row.gain[2]) if row.gain else None,
                    "pairs": _number(row.seen),
                    "seconds_per_round": row.seconds_per_round,
                    "processor_seconds": _mean(costs, f"{row.name}/seed-SEED", seeds),
                    "trial_processor_seconds": _mean(
                        costs, f"{TRIALS}/{row.name}/seed-SEED/", seeds
                    ),
                    "bytes_per_round": row.bytes_per_round,
                    "rates": rates[row.name],
                }
                for row in rows
            },
            "free": _free(study, folder, rows[0].metric),
        }
    if not sets:
        raise UserError(
            f"{study.output}: no seed has all of its methods yet. The same command goes on."
        )
    return {
        "format": FORMAT,
        "suite": study.suite.name,
        "fedpref": __version__,
        "platform": str(about["platform"]),
        "versions": {name: str(version) for name, version in about["versions"].items()},
        "sets": sets,
    }


def _mean(costs: Mapping[str, float | None], folder: str, seeds: Iterable[int]) -> float | None:
    """Return the mean over seeds of what runs in a folder took; None where a part is not known.

    Args:
        costs: By run.
        folder: The run's, or what all of them are in, with `SEED` for the seed.
        seeds: The seeds.
    """
    totals = []
    for seed in set(seeds):
        place = folder.replace("SEED", str(seed))
        some = [
            seconds
            for name, seconds in costs.items()
            if name == place or (place.endswith("/") and name.startswith(place))
        ]
        if not some or None in some:
            return None
        totals.append(sum(seconds for seconds in some if seconds is not None))
    return sum(totals) / len(totals)


def _costs(figures: SetFigures) -> str:
    """Return a table of what methods cost, means over seeds."""
    lines = [
        "| | pairs | bytes a round | processor seconds | of trials |",
        "|---|---|---|---|---|",
    ]
    for name, own in figures["methods"].items():
        cells = (
            "" if own["pairs"] is None else f"{own['pairs']:,.0f}",
            bytes_text(own["bytes_per_round"]),
            *(
                "" if seconds is None else f"{seconds:,.0f}"
                for seconds in (own["processor_seconds"], own["trial_processor_seconds"])
            ),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    said = (
        "The first method's runs also make the baselines that are not trained, and its trials what "
        "is computed once for all."
    )
    return "\n".join([*lines, "", said]) + "\n"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _free(study: Study, folder: Path, metric: str) -> dict[str, float]:
    """Return the means over clients and seeds of baselines that are not trained, in the unit."""
    values: dict[str, list[float]] = {}
    for path in members(folder):
        if path.parent.name != study.methods[0]:
            continue
        for name, clients in FinishedRun.at(path).result().evaluations.items():
            if name != FinishedRun.at(path).experiment.algorithm.name:
                some = [metrics[metric] for metrics in clients.values() if metric in metrics]
                values.setdefault(name, []).append(HEADLINES[metric].scale * sum(some) / len(some))
    return {name: sum(some) / len(some) for name, some in values.items()}


def write_tables(study: Study) -> list[Path]:
    """Write what there is of a study: `bench.md`, a page and tables of each set, `bench.json`.

    Raises:
        UserError: There is nothing yet.
    """
    found, texts, written = submission(study), [f"# {study.suite.name}\n"], []
    for name, figures in found["sets"].items():
        folder = study.output / name
        rows = compare([folder])
        texts.append(
            f"## {name}\n{figures['clients']} clients, {figures['model']}; {caption(rows)}.\n\n"
            f"{markdown(rows)}"
        )
        free = ", ".join(f"{line} {value:.1f}" for line, value in figures["free"].items())
        texts.append(f"Without training: {free}.\n" if free else "")
        texts.append(_costs(figures))
        (folder / "table.tex").write_text(latex(rows))
        (folder / "table.csv").write_text(csv_text(rows))
        written += [write_report([folder], folder / "report.html")]
    files.write(study.output / "bench.md", "\n".join(filter(None, texts)))
    files.write(study.output / "bench.json", json.dumps(found, indent=1) + "\n")
    return [study.output / "bench.md", study.output / "bench.json", *written]


def read_submission(path: Path) -> Submission:
    """Read a file that was sent in.

    Raises:
        UserError: It is none, or of another format.
    """
    try:
        content = json.loads(path.read_bytes())
        form = content.get("format") if isinstance(content, dict) else FORMAT
        if isinstance(form, int) and form != FORMAT:
            raise UserError(f"{path}: its format is {form}, and this fedpref reads {FORMAT}.")
        return _FORM.validate_python(content, strict=False)
    except (OSError, ValidationError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: this is no file of `fedpref bench`: {reason(error)}.") from error


def board(paths: Sequence[Path]) -> str:
    """Return the leaderboard of files that were sent in, as Markdown: the best mean first.

    Raises:
        UserError: One is no such file.
    """
    rows: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    firsts: dict[tuple[str, str, str], set[str]] = {}  # over which gains are
    for path in paths:
        found = read_submission(path)
        for name, figures in found["sets"].items():
            where = (found["suite"], name, figures["model"])
            for method, own in figures["methods"].items():
                if own["gain"] is None:
                    firsts.setdefault(where, set()).add(_said(method))
                cells = (
                    _said(method),
                    _between(own["mean"], own["low"], own["high"], ".1f"),
                    _between(own["gain"], own["gain_low"], own["gain_high"], "+.1f"),
                    f"{own['worst']:.1f}",
                    "" if own["pairs"] is None else f"{own['pairs']:,.0f}",
                    str(own["seeds"]),
                    _said(figures["intervals_over"]),
                    _said(path.stem),
                    _said(found["fedpref"]),
                )
                rows.setdefault(where, []).append((own["mean"], f"| {' | '.join(cells)} |"))
    texts = []
    for (suite, name, model), lines in sorted(rows.items()):
        ranked = sorted(lines, key=lambda line: -line[0])
        first = " or ".join(sorted(firsts.get((suite, name, model), {"the first"})))
        texts += [
            f"**{_said(suite)}, {_said(name)}, {_said(model)}**\n",
            f"| method | mean | gain over {first} | worst client | pairs | seeds "
            "| intervals over | sent in as | fedpref |",
            "|---|---|---|---|---|---|---|---|---|",
            *(line for _, line in ranked),
            "",
        ]
    return "\n".join(texts)


def _between(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if value is None:
        return ""
    ends = "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
    return f"{value:{form}}{ends}"


def _said(text: str) -> str:
    """Return a text that is no markup in a table."""
    plain = printable(text).translate(str.maketrans("|[]\n", "/() "))
    return plain.replace("<", "&lt;")[:60]


def overview(found: Mapping[str, Any]) -> str:
    """Return a sentence for each set: who is ahead."""
    said = []
    for name, figures in found["sets"].items():
        best = max(figures["methods"], key=lambda method: figures["methods"][method]["mean"])
        said.append(f"{name}: {best} is ahead with {figures['methods'][best]['mean']:.1f}")
    return "; ".join(said)
