"""A comparison as a table: on a terminal, as Markdown, LaTeX and CSV, and what is said of it."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence

from fedpref.numerics.metrics import HEADLINES
from fedpref.reports.comparison import AS_ENDED, NEVER, Row, Terms
from fedpref.reports.equal_terms import CLOSE
from fedpref.reports.folded import FoldedTable
from fedpref.reports.tables import bytes_text

TITLES = (
    "",
    "seeds",
    "mean [95 %]",
    "gain [95 %]",
    "worst client",
    "worst decile",
    "sd over clients",
    "Jain",
    "worse off, %",
    "bytes a round",
    "s a round",
    "newcomers",
    "with reward head",
    "to the figure",
)
NONE = (math.nan, math.nan)


def _with_interval(digits: int, mean: float, low: float, high: float, sign: str = "") -> str:
    return f"{mean:{sign}.{digits}f}" + (
        "" if math.isnan(low) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    )


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text for people."""
    digits = HEADLINES[row.metric].digits
    return (
        row.name,
        str(row.seeds),
        _with_interval(digits, row.mean, *row.interval),
        "" if row.gain is None else _with_interval(digits, *row.gain, sign="+"),
        _with_interval(digits, row.worst, *(row.even.worst if row.even else NONE)),
        _with_interval(digits, row.worst_decile, *(row.even.worst_decile if row.even else NONE)),
        _with_interval(digits, row.std, *(row.even.std if row.even else NONE)),
        "" if math.isnan(row.jain) else f"{row.jain:.4f}",
        "" if row.harmed is None else " to ".join(f"{100 * bound:.0f}" for bound in row.harmed),
        bytes_text(row.bytes_per_round),
        f"{row.seconds_per_round:.1f}",
        ""
        if row.newcomers is None
        else f"{row.newcomers[0]:.{digits}f} to {row.newcomers[1]:.{digits}f}",
        "" if row.combined is None else f"{row.combined:.{digits}f}",
        "" if row.cost is None else _spent(row.cost),
    )


def _spent(cost: Mapping[str, float]) -> str:
    if math.isnan(cost["rounds"]):
        return "never"
    sent = bytes_text(1e6 * cost["mb"])
    return f"{cost['rounds']:.1f} rounds, {cost['seconds']:.0f} s, {sent}"


def notes(rows: Sequence[Row], terms: Terms = AS_ENDED) -> list[str]:
    """Return, in sentences, on what terms lines are compared, and which were not on equal ones."""
    if terms.at:
        return [f"Values are those where {terms.at} first, between evaluations in proportion."]
    first = rows[0]
    said = [
        f"{row.name}: its runs differ by more than their seeds, by {', '.join(row.differs)}."
        for row in rows
        if row.differs
    ]
    for row in rows[1:]:
        unequal = [
            f"{name} {own:,.0f} to {theirs:,.0f}"
            for name, own, theirs in (
                ("examples seen", row.seen, first.seen),
                ("local steps", row.steps, first.steps),
            )
            if abs(own - theirs) > CLOSE * theirs
        ]
        if unequal:
            said.append(
                f"{row.name} and {first.name} were not on equal terms: {', '.join(unequal)}. "
                "--at pairs=N compares lines after as many."
            )
    if any(row.even and not _is_within(row.worst, row.even.worst) for row in rows):
        said.append(
            "Intervals of the worst clients are of what they truly have: the worst figure is low "
            "by luck too, and may lie below its interval."
        )
    if len(rows) > 2:
        said.append(
            f"Of {len(rows)} lines the best is flattered by luck; what was chosen by this table "
            "needs rows that it was not chosen by."
        )
    return said


def _is_within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def caption(rows: Sequence[Row]) -> str:
    """Return what a table shows: the figure, whose gains, and what intervals are over."""
    first = rows[0]
    return f"{measured(rows)}; gains over {first.name}; intervals over {first.over}"


def measured(rows: Sequence[Row]) -> str:
    """Return what is measured, and on which rows."""
    of = "validation" if rows[0].is_chosen_by else "held-out"
    return f"{of} {HEADLINES[rows[0].metric].caption}"


def table(rows: Sequence[Row]) -> FoldedTable:
    """Return the comparison for a terminal."""
    columns = columns_of(rows)
    texts = [[cells(row)[i] for i in columns] for row in rows]
    return FoldedTable(caption(rows), [TITLES[i] for i in columns], texts)


def markdown(rows: Sequence[Row]) -> str:
    """Return the comparison for a document."""
    lines = [TITLES, ("---",) * len(TITLES), *map(cells, rows)]
    columns = columns_of(rows)
    cells_of = (
        [_marked(line[i]) if i == 0 else line[i] for i in columns]  # names are anybody's
        for line in lines
    )
    return "".join(f"| {' | '.join(some)} |\n" for some in cells_of)


def _marked(text: str) -> str:
    """Return a text that is one cell of Markdown, and no mark-up."""
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", text).replace("<", "&lt;").replace("\n", " ")


def latex(rows: Sequence[Row]) -> str:
    """Return the comparison as a LaTeX table, which needs the package booktabs."""
    columns, said = columns_of(rows), caption(rows)
    titles = [_of_latex(TITLES[i]) for i in columns]
    body = [" & ".join(_of_latex(cells(row)[i]) for i in columns) for row in rows]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_of_latex(said[:1].upper() + said[1:])}.}}",
            rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            r"\toprule",
            rf"{' & '.join(titles)} \\",
            r"\midrule",
            *(rf"{line} \\" for line in body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _of_latex(text: str) -> str:
    """Return a text as LaTeX prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return "".join(special.get(mark, mark) for mark in text)


def columns_of(rows: Sequence[Row]) -> list[int]:
    """Return the columns that have something in them."""
    texts = [cells(row) for row in rows]
    return [i for i in range(len(TITLES)) if not i or any(text[i] for text in texts)]


def csv_text(rows: Sequence[Row]) -> str:
    """Return the comparison for other programs, as plain numbers."""
    names = [
        "name",
        "seeds",
        "mean",
        "low",
        "high",
        "gain",
        "gain_low",
        "gain_high",
        "worst",
        "worst_low",
        "worst_high",
        "worst_decile",
        "worst_decile_low",
        "worst_decile_high",
        "std",
        "std_low",
        "std_high",
        "jain",
        "harmed_low",
        "harmed_high",
        "bytes_per_round",
        "seconds_per_round",
        "newcomers_before",
        "newcomers",
        "with_reward_head",
        "seen",
        "steps",
        *(f"to_figure_{name}" for name in NEVER),
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        even = [
            [value, *(getattr(row.even, name) if row.even else ("", ""))]
            for name, value in (
                ("worst", row.worst),
                ("worst_decile", row.worst_decile),
                ("std", row.std),
            )
        ]
        rest = [value for some in even for value in some]
        rest += [row.jain, *(row.harmed or ("", "")), row.bytes_per_round, row.seconds_per_round]
        writer.writerow(
            [
                row.name,
                row.seeds,
                row.mean,
                *row.interval,
                *(row.gain or ("", "", "")),
                *rest,
                *(row.newcomers or ("", "")),
                "" if row.combined is None else row.combined,
                row.seen,
                row.steps,
                *(row.cost.values() if row.cost else [""] * len(NEVER)),
            ]
        )
    return out.getvalue()
