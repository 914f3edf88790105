"""What the page says of a run whose clients' figures are told as sums, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedpref.numerics.metrics import ACCURACY, COMBINED
from fedpref.reports.charts import Chart, axes, colour, learning, lined, traffic
from fedpref.reports.run import Run
from fedpref.reports.tables import bytes_text

NO_FIGURES = "Nothing is told of clients' figures in this run."
AS_SUMS = "Figures of single clients stay where they are; those here are of all together."


def words(run: Run) -> str:
    """Return a sentence of who took part and what came of it."""
    done, planned = len(run.line.metrics), run.experiment.rounds
    said = f"{done} of {planned} rounds of {run.experiment.algorithm.name} were trained"
    if not run.metric:
        return f"{said}. {NO_FIGURES}"
    one = run.line.evaluations[-1]["summary"][run.metric]
    said += f"; the mean held-out {run.shown.title} over clients is {run.shown.text(one['mean'])}"
    if "noise" in one:
        said += f", with noise whose standard deviation is {run.shown.text(one['noise'])}"
    return f"{said}. {AS_SUMS}"


def cards(run: Run) -> list[tuple[str, str, str]]:
    """Return the numbers that come first: a name, a value, a note."""
    tiles = [("clients that are known", str(len(run.clients)), "those that were drawn took part")]
    summary = run.line.evaluations[-1]["summary"]
    names = {run.metric: f"held-out {run.shown.caption}", COMBINED: "with reward heads"}
    for metric, title in names.items() if run.metric else ():
        if one := summary.get(metric):
            kind, of = ("noise", "of its noise ") if "noise" in one else ("std", "")
            note = f"mean over clients, standard deviation {of}{run.shown.text(one[kind])}"
            tiles.append((title, run.shown.text(one["mean"]), note))
    for name, line in run.baselines.items():
        if line.evaluations and (one := line.evaluations[-1]["summary"].get(run.metric)):
            tiles.append((name, run.shown.text(one["mean"]), "mean over clients"))
    rounds = max(1, len(run.line.metrics))
    up, down, seconds = (
        sum(run.line.column(name)) for name in ("bytes_up", "bytes_down", "seconds")
    )
    time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    cost = f"in rounds; {bytes_text(up / rounds)} up and {bytes_text(down / rounds)} down in each"
    return [*tiles, ("what it cost", time, cost)]


def sections(run: Run) -> list[tuple[str, list[Chart]]]:
    """Return titles, and the charts under them."""
    drawn = [
        ("What was learned", [*_held_out(run), *learning([run])]),
        ("Clients", [*_bins(run)]),
        ("What it cost", [*traffic([run])]),
    ]
    return [(title, some) for title, some in drawn if some]


def _held_out(run: Run) -> Iterator[Chart]:
    rows = [row for row in run.line.course if run.metric in row["summary"]]
    if len(rows) > 1:
        means = [run.shown.scale * row["summary"][run.metric]["mean"] for row in rows]
        data = [lined(run.line.name, [row["round"] for row in rows], means, 0)]
        title = f"Held-out {run.shown.title} over rounds"
        yield Chart(title, "The mean over clients.", data, axes("round", run.shown.caption))


def _bins(run: Run) -> Iterator[Chart]:
    counts: Sequence[float] = run.line.evaluations[-1].get("bins", {}).get(run.metric, ())
    if counts and run.metric == ACCURACY:
        names = [f"{10 * k} to {10 * k + 10}" for k in range(len(counts))]
        bars = {"type": "bar", "x": names, "y": list(counts), "marker": {"color": colour(0)}}
        noisy = run.experiment.telling == "private"
        caption = "How many clients have so much of it at the end."
        caption += " Counts have noise, and may be below zero." if noisy else ""
        title = f"Clients by held-out {run.shown.title}"
        yield Chart(title, caption, [bars], axes(run.shown.caption, "clients"))
