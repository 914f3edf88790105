"""The page of runs: one file that opens from a disk, with everything in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedpref.errors import UserError, command, reason
from fedpref.numerics import files
from fedpref.numerics.intervals import FEWEST
from fedpref.numerics.metrics import HEADLINES
from fedpref.reports import charts, group_charts
from fedpref.reports import method_charts as methods
from fedpref.reports.comparison import Row, compare
from fedpref.reports.comparison_tables import TITLES, cells, columns_of, measured
from fedpref.reports.groups import Group, groups_of
from fedpref.reports.page import sums
from fedpref.reports.page.sentences import MEANINGS, facts, told
from fedpref.reports.page.tables import (
    agreement_rows,
    answer_rows,
    client_rows,
    fairness,
    joined,
    newcomer_rows,
    objective_rows,
    review_rows,
)
from fedpref.reports.run import Run, read
from fedpref.runs.sweep import is_sweep, members

REPORT = "report.html"
FRONT = "front.json"  # what `fedpref pareto` leaves in its folder


def write_report(paths: Sequence[Path], output: Path) -> Path:
    """Write the page of runs, or of the fronts among the folders, and return the file.

    Args:
        paths: Run directories, or folders of fronts.
        output: The file.

    Raises:
        UserError: There is nothing to show.
    """
    if paths and all(map(is_sweep, paths)):
        name = ", ".join(path.resolve().name for path in paths)
        return _written(page((), groups=groups_of(paths), rows=_rows(paths), name=name), output)
    paths = [run for path in paths for run in members(path)]
    fronts = [_front(path / FRONT) for path in paths if (path / FRONT).exists()]
    runs = told_apart([read(path) for path in paths if not (path / FRONT).exists()])
    if started := [run for run in runs if not run.line.evaluations]:
        raise UserError(
            f"{started[0].path}: the run has no evaluation yet (evaluate_every says when). "
            f"`{command('watch', started[0].path)}` shows it as it goes."
        )
    if len(runs) + len(fronts) > 1 and (summed := [run for run in runs if run.is_summed]):
        raise UserError(
            f"{summed[0].path}: its clients' figures are not told one by one, so that nothing can "
            "be laid beside them; give it a report of its own."
        )
    if len({run.metric for run in runs}) > 1:
        raise UserError(
            "runs of different tasks are compared by different metrics; give reports of their own."
        )
    if len({run.experiment.evaluate_on for run in runs}) > 1:
        raise UserError(
            "some runs are measured on validation rows and some on the test's, which are no "
            "figures to lay beside one another; give reports of their own."
        )
    return _written(page(runs, fronts), output)


def _rows(paths: Sequence[Path]) -> list[Row]:
    """Return the comparison of sweeps, which there is once all of their runs are done."""
    try:
        return compare(paths)
    except UserError:
        return []


def _written(text: str, output: Path) -> Path:
    if output.is_dir():
        raise UserError(f"--output {output}: this is a folder. Name a file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write(output, text)
    return output


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Return runs with titles of their own.

    These are their names, or their directories' where names are alike, or whole paths.
    """
    for title in (lambda run: run.path.name, lambda run: str(run.path)):
        names = [run.title for run in runs]
        runs = [
            replace(run, title=title(run)) if names.count(run.title) > 1 else run for run in runs
        ]
    return list(runs)


def _front(file: Path) -> Any:
    """Return what `fedpref pareto` has left; raises UserError where the file is damaged."""
    try:
        content = json.loads(file.read_text())
        if not content["objectives"] or not content["points"]:
            raise ValueError("there are no points")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: the file is damaged ({reason(error)}). The same `fedpref pareto` command "
            "writes it anew."
        ) from error
    return content


def page(
    runs: Sequence[Run],
    fronts: Sequence[Mapping[str, Any]] = (),
    groups: Sequence[Group] = (),
    rows: Sequence[Row] = (),
    name: str = "",
) -> str:
    """Return the page as text.

    Args:
        runs: Runs, each with its own lines.
        fronts: Fronts of trade-offs.
        groups: In place of runs, variants by seeds.
        rows: The comparison of these.
        name: What these are called together.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    room = resources.files("fedpref.reports.page")
    summed, everything = [run for run in runs if run.is_summed], runs
    runs = [run for run in runs if not run.is_summed]
    drawn = sections(runs, fronts) + group_sections(groups)
    drawn += [one for run in summed for one in sums.sections(run)]
    measures, spreads = fairness(runs)
    answering, answers = answer_rows(runs)
    environment.filters["anchor"] = _anchor
    columns = columns_of(rows)
    contents = [
        *(["Variants by seeds"] if groups else []),
        *(title for title, _ in drawn),
        *(["Clients, and how evenly they fare"] if runs else []),
    ]
    listed = [(_anchor(title), title) for title in contents]
    listed += [("answers1", "Answers")] if any(run.samples for run in everything[:1]) else []
    listed += [("ran1", "What ran")] if everything else []
    return environment.from_string((room / "page.html").read_text()).render(
        title=", ".join(run.title for run in everything) or name or "front of trade-offs",
        style=Markup((room / "page.css").read_text()),
        script=Markup((room / "page.js").read_text()),
        plotly=Markup((room / "plotly-basic.min.js").read_text()),
        runs=[told(run) for run in everything],
        captioned=bool(runs),
        sections=drawn,
        groups=[facts(group.run) | {"variant": group.name} for group in groups],
        contents=listed,
        compared=[[cells(row)[i] for i in columns] for row in rows],
        lead=_led(rows),
        compared_titles=[TITLES[i] for i in columns],
        compared_caption=measured(rows)[0].upper() + measured(rows)[1:] if rows else "",
        charts=Markup(_json([chart.content for _, some in drawn for chart in some])),
        fairness=spreads,
        fairness_titles=measures,
        caption=runs[0].shown.caption if runs else "",
        clients=client_rows(runs),
        num_clients=len({name for run in runs for name in run.line.last}),
        agreement=agreement_rows(runs),
        reviews=review_rows(everything),
        client_lines=[title for title, _, _, _ in charts.every_line(runs)],
        gain_lines=[
            charts.with_prefix(prefix, "gain over alone")
            for prefix, run, _ in charts.main_lines(runs)
            if run.gains("alone")
        ],
        newcomers=newcomer_rows(runs),
        newcomer_lines=[title for title, _ in joined(runs)],
        objectives=objective_rows(runs),
        answers=answers,
        answer_lines=answering,
        meanings=[
            text for name, text in MEANINGS.items() if any(name in run.baselines for run in runs)
        ],
        enough=FEWEST,
    )


def _led(rows: Sequence[Row]) -> str:
    """Return a sentence of which variant is ahead; empty for fewer than two."""
    if len(rows) < 2:
        return ""
    shown, first = HEADLINES[rows[0].metric], rows[0]
    best = max(rows, key=lambda row: row.mean)
    said = f"{best.name} has the highest mean of {len(rows)}, {best.mean:.{shown.digits}f}"
    if best.gain is None or math.isnan(best.gain[1]):
        return f"{said}."
    gain, low, high = best.gain
    doubt = "" if low > 0 or high < 0 else ", which cannot be told from none"
    digits = shown.digits
    return (
        f"{said}; over {first.name} that is {gain:+.{digits}f} "
        f"[{low:+.{digits}f}, {high:+.{digits}f}]{doubt}."
    )


def group_sections(groups: Sequence[Group]) -> list[tuple[str, list[charts.Chart]]]:
    """Return titles and charts of variants by seeds."""
    if not groups:
        return []
    drawn = [
        ("Who gained, who lost", [*group_charts.gains(groups), *group_charts.by_client(groups)]),
        ("What was learned", [*group_charts.held_out(groups), *group_charts.learning(groups)]),
    ]
    return [(title, some) for title, some in drawn if some]


def _anchor(title: str) -> str:
    """Return what a link within the page calls a section."""
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))


def _json(content: Any) -> str:
    """Return data for a script: no number that JSON lacks, nothing that ends the script."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: finite(part) for key, part in value.items()}
        return [finite(part) for part in value] if isinstance(value, list | tuple) else value

    return json.dumps(finite(content), separators=(",", ":")).replace("<", "\\u003c")


def sections(
    runs: Sequence[Run], fronts: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[charts.Chart]]]:
    """Return titles, and the charts under them that these runs have something for."""
    drawn = [("Trade-offs", [methods.front(content) for content in fronts])]
    if runs:
        gained = list(charts.gains(runs))
        drawn += [
            (
                "What was learned",
                [
                    *charts.held_out(runs),
                    *charts.learning(runs),
                    *methods.calibration(runs),
                    *methods.reliability(runs),
                    *methods.for_kl(runs),
                ],
            ),
            ("Who gained, who lost" if gained else "Clients", [*gained, *charts.by_client(runs)]),
            ("Objectives", [*methods.objectives(runs)]),
            ("Agreement", [*methods.consensus(runs), *methods.graph(runs)]),
            ("What it cost", [*charts.traffic(runs), *charts.times(runs)]),
        ]
    return [(title, some) for title, some in drawn if some]
