"""The tables at the end of a run: every client, the algorithm, and the baselines."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedpref.errors import printable
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.free_baselines import FREE_LINES
from fedpref.experiments.run_directory import SAMPLES, client_path
from fedpref.experiments.run_files import CLIENTS, read_json, read_rows
from fedpref.numerics.metrics import (
    ACCURACY,
    ALIGNMENT,
    COMBINED,
    HEADLINES,
    ClientMetrics,
    headline,
    of_objectives,
    over_clients,
    standard_error,
)
from fedpref.reports.folded import FoldedTable
from fedpref.tasks.generation_metrics import before_and_after

# held-out examples of a client, for a figure of its own: an accuracy's standard error of 16 points
ENOUGH_HELD_OUT = 10


def sizes(path: Path) -> dict[str, dict[str, int]]:
    """Return each client's numbers of examples in a run, `train` and `test`."""
    clients: dict[str, dict[str, int]] = read_json(path / CLIENTS)
    return clients


def metric_table(metrics: ClientMetrics) -> FoldedTable:
    """Return all metrics, a column for each client; for many clients the most important ones."""
    first = next(iter(metrics.values()))
    if len(metrics) <= 4:
        rows = [[name, *(f"{row[name]:.4g}" for row in metrics.values())] for name in first]
        return FoldedTable("", ["", *map(printable, metrics)], rows)
    shown = [
        metric
        for metric in (*HEADLINES, "rewards/margins", "kl", "loss", "num_examples")
        if metric in first
    ]
    rows = [
        [printable(client), *(f"{row[metric]:.4g}" for metric in shown)]
        for client, row in metrics.items()
    ]
    return FoldedTable("", ["client", *shown], rows)


def client_table(path: Path, evaluations: Mapping[str, ClientMetrics]) -> FoldedTable:
    """Return each client's value under each line, then summaries.

    Clients with most training examples come first.
    """
    pairs, metric = sizes(path), _headline(next(iter(evaluations.values())))
    shown = HEADLINES[metric]
    first = next(iter(evaluations.values()))
    names = sorted(first, key=lambda name: (-pairs[name]["train"], name))
    # a task may measure fewer than are held out
    counts = {name: int(row["num_examples"]) for name, row in first.items()}
    figures = {
        line: {name: row[metric] for name, row in rows.items() if name in counts}
        for line, rows in evaluations.items()
    }
    summaries = {line: over_clients(values, counts) for line, values in figures.items()}

    def line_of(title: str, train: str, test: str, values: Iterable[float]) -> list[str]:
        return [title, train, test, *map(shown.text, values)]

    def of_some(title: str, some: Sequence[str]) -> list[str]:
        """Return a row with sizes and means of some clients."""
        train, test = (str(sum(of[name] for name in some)) for of in (trained, counts))
        means = (
            _mean([values[name] for name in some if name in values]) for values in figures.values()
        )
        return line_of(title, train, test, means)

    trained = {name: pairs[name]["train"] for name in names}
    rows = [
        line_of(
            printable(name),
            str(trained[name]),
            str(counts[name]),
            (values.get(name, math.nan) for values in figures.values()),
        )
        for name in names
    ]
    rows.append(of_some("mean", names))
    both = [
        [row[COMBINED] for row in rows_of.values() if COMBINED in row]
        for rows_of in evaluations.values()
    ]
    if any(both):
        rows.append(line_of("mean with reward heads", "", "", map(_mean, both)))
    if metric == ACCURACY:
        errors = (standard_error(values, counts) for values in figures.values())
        rows.append(line_of("standard error (pairs)", "", "", errors))
    half = len(names) // 2
    # who has least is nobody in particular where others have as little
    if half >= 2 and trained[names[half - 1]] > trained[names[half]]:
        rows.append(of_some(f"the {len(names) - half} with least data", names[half:]))
    for key, title in (
        ("weighted_mean", "by held-out examples"),
        ("worst", "worst client"),
        ("worst_decile", "worst decile"),
        *([("gap", "best less worst")] if metric == ALIGNMENT else []),
    ):
        rows.append(line_of(title, "", "", (summaries[line][key] for line in figures)))
    if all("jain" in summary for summary in summaries.values()):
        indices = (f"{summary['jain']:.4f}" for summary in summaries.values())
        rows.append(["Jain index", "", "", *indices])
    # words-personal is as wide as the page has room for, in two lines
    titles = [line.replace("-", "-\n") if line in FREE_LINES else line for line in figures]
    return FoldedTable(
        f"held-out {shown.caption}",
        ["client", "training\nexamples", "held-out\nexamples", *titles],
        rows,
        bold=[len(names)],
        sections=[len(names)],
        main=3,
    )


def answer_table(evaluations: Mapping[str, ClientMetrics]) -> FoldedTable | None:
    """Return figures of models' own answers, before training and after, under each line; None where
    none were measured.
    """
    found = {
        line: [before_and_after(row) for row in rows.values()] for line, rows in evaluations.items()
    }
    found = {line: rows for line, rows in found.items() if any(rows)}
    names = list(dict.fromkeys(name for rows in found.values() for row in rows for name in row))
    if not names:
        return None
    lines = []
    for name in names:
        cells = []
        for rows in found.values():
            pairs = [row[name] for row in rows if name in row]
            before = [value for value, _ in pairs if value is not None]
            then = f"{_mean(before):.3g} → " if before else ""
            cells.append(f"{then}{_mean([value for _, value in pairs]):.3g}" if pairs else "")
        lines.append([name, *cells])
    title = "answers to held-out prompts: means over clients, before training and after"
    return FoldedTable(title, ["", *found], lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def objective_table(evaluations: Mapping[str, ClientMetrics]) -> FoldedTable | None:
    """Return means over clients of several objectives' metrics, under each line; None for one."""
    wanted = of_objectives(next(iter(next(iter(evaluations.values())).values())))
    if len(wanted) < 2:
        return None
    lines = [
        [
            metric,
            *(
                f"{_mean([row[metric] for row in rows.values()]):.3f}"
                for rows in evaluations.values()
            ),
        ]
        for metric in wanted
    ]
    return FoldedTable("objectives: means over clients", ["", *evaluations], lines)


def sample_table(path: Path, shown: int = 3) -> Table | None:
    """Return prompts with answers before and after training; None if none are kept.

    If clients were asked alike and answer with models of their own, it is one prompt, and the two
    whose answers differ most in length; otherwise the first client's prompts.
    """
    kept = {
        name: rows
        for name in (sorted(sizes(path)) if (path / SAMPLES).is_dir() else ())
        if (file := client_path(path, SAMPLES, name, ".jsonl")) and (rows := read_rows(file))
    }
    if not kept:
        return None
    first, *_ = kept
    alike = {
        name: row
        for name, rows in kept.items()
        for row in rows
        if row["prompt"] == kept[first][0]["prompt"]
    }
    if len({row["after"]["completion"] for row in alike.values()}) > 1:
        by_length = sorted(alike, key=lambda name: len(alike[name]["after"]["completion"]))
        return _two_answers(alike, by_length[-1], by_length[0])
    table = _answers(f"answers to {printable(first)}", ("prompt", "before", "after"))
    for row in kept[first][:shown]:
        table.add_row(_asked(row), *(_answer(row[name]) for name in ("before", "after")))
    return table


def _two_answers(rows: Mapping[str, Any], long: str, brief: str) -> Table:
    columns = ("before", *(f"after, by {printable(name)}" for name in (long, brief)))
    table = _answers(_asked(rows[long]).plain, columns)
    table.add_row(
        _answer(rows[long]["before"]), *(_answer(rows[name]["after"]) for name in (long, brief))
    )
    return table


def _answers(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_style="bold", title_justify="left", show_lines=True)
    for column in columns:
        table.add_column(Text(column), ratio=1)
    return table


def _asked(row: Mapping[str, Any]) -> Text:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    return Text(str(prompt).strip())


def _answer(said: Mapping[str, Any]) -> Text:
    return Text("\n".join([said["completion"].strip(), *_rewards(said["rewards"])]))


def next_commands(path: Path) -> list[str]:
    """Return commands that a finished run invites to."""
    names = list(sizes(path))
    chooses = (
        f" --client {printable(shlex.quote(names[-1]))}" if (path / "clients").is_dir() else ""
    )
    opens = f"open the page:      fedpref report {shlex.quote(str(path))} --open"
    answers = FinishedRun.at(path).experiment.task.name != "opinion"
    if not answers or not ((path / "adapter").is_dir() or chooses):
        return [opens]
    where = shlex.quote(str(path))
    return [f'let it answer:      fedpref generate {where}{chooses} "How do I ...?"', opens]


def _rewards(rewards: Mapping[str, float]) -> list[str]:
    return (
        ["[" + ", ".join(f"{name} {value:.2f}" for name, value in rewards.items()) + "]"]
        if rewards
        else []
    )


def newcomer_table(
    pairs: Mapping[str, Mapping[str, int]], lines: Mapping[str, tuple[ClientMetrics, ClientMetrics]]
) -> FoldedTable:
    """Return held-out metrics of clients that joined after training, under each line.

    They are with the shared model, and after their own steps.
    """
    metric = _headline(next(iter(lines.values()))[0])
    shown = HEADLINES[metric]
    titles = ["client", "training\nexamples", "held-out\nexamples"]
    columns = []
    for line, (before, after) in lines.items():
        for title, metrics in ((f"{line}\nas received", before), ("after own\nsteps", after)):
            titles.append(title)
            columns.append({name: row[metric] for name, row in metrics.items()})
    rows = [
        [
            printable(name),
            str(pairs[name]["train"]),
            str(pairs[name]["test"]),
            *(shown.text(column[name]) for column in columns),
        ]
        for name in columns[0]
    ]
    count = len(rows)
    if count > 1:
        means = (shown.text(_mean(list(column.values()))) for column in columns)
        rows.append(["mean", "", "", *means])
    return FoldedTable(
        f"newcomers: held-out {shown.caption}", titles, rows, bold=[count], sections=[count]
    )


def _headline(rows: ClientMetrics) -> str:
    return headline(next(iter(rows.values())))


def size_table(clients: Mapping[str, tuple[int, int, int]], shown: int = 30) -> FoldedTable:
    """Return clients' sizes: training examples, held-out examples, truncated rows.

    Where there are very many clients, only the largest are shown.
    """
    ranked = sorted(clients.items(), key=lambda item: (-item[1][0], item[0]))

    def total(title: str, some: Sequence[tuple[str, tuple[int, int, int]]]) -> list[str]:
        return [title, *(str(sum(size[i] for _, size in some)) for i in range(3))]

    rows = [[printable(name), *map(str, size)] for name, size in ranked[:shown]]
    if len(ranked) > shown:
        rows.append(total(f"... and {len(ranked) - shown} smaller ones", ranked[shown:]))
    count = len(rows)
    rows.append(total("all", ranked))
    titles = ["client", "training examples", "held-out examples", "truncated"]
    return FoldedTable(f"{len(clients)} clients", titles, rows, bold=[count], sections=[count])


def bytes_text(count: float) -> str:
    """Return a number of bytes for people: 1.5 MB."""
    power = min(4, int(math.log(count, 1000))) if count >= 1 else 0
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
