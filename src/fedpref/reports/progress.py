"""A run as it goes: one line per algorithm, with a bar on a terminal, plain rows elsewhere."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fedpref.engines.private_examples import PrivateExamples
from fedpref.engines.private_sums import PrivateSums
from fedpref.numerics.metrics import ACCURACY
from fedpref.reports.tables import bytes_text

if TYPE_CHECKING:
    from fedpref.experiments.rounds import Event

TRAINING = {
    "loss": "loss",
    ACCURACY: "accuracy",
    "rewards/margins": "margin",
    "reward": "reward",
    "kl": "KL",
    "error": "error",
}
UNITS = {"num_pairs": "pairs", "num_points": "points", "num_samples": "answers"}
DIAGNOSTICS = {
    "pooled_loss": "pooled loss",
    "pooled_gradient_norm_squared": "squared gradient",
    "disagreement": "disagreement",
    "pareto_stationarity": "Pareto-stationarity",
}
LONGEST = 10**10  # seconds that are written; a run of so many is never over
RECENT = 10  # rounds by which the time that is left is judged


# what a round has spent of privacy: of clients, and of what each has
SPENT = {PrivateSums.spends: "epsilon", PrivateExamples.spends: "epsilon of units"}


def show(happenings: Iterator[Event], console: Console) -> None:
    """Show events until they end."""
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
    held_out, said = dict[str, str](), dict[str, str]()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars: dict[str, TaskID] = {}
        for event in happenings:
            if event.kind == "begin":
                console.print(event.note, highlight=False, soft_wrap=True)
                continue
            text = _figures(event)
            title = event.note if event.kind == "prepare" else event.line
            if event.kind == "round":
                recent[title].append(event.metrics["seconds"])
                text += _left(event, recent[title])
            if not console.is_terminal:
                if event.kind != "prepare" or event.done == event.total:
                    console.print(
                        f"{title:12s} {event.kind} {event.done}/{event.total}  {text}",
                        highlight=False,
                        soft_wrap=True,
                    )
                continue
            if title not in bars:
                bars[title] = progress.add_task(title, total=event.total, figures="")
            if event.kind == "evaluate":
                if event.metrics:
                    held_out[title] = f"held-out {event.metrics['mean']:.3f}  "
            else:
                said[title] = text
            progress.update(
                bars[title],
                completed=event.done,
                figures=held_out.get(title, "") + said.get(title, ""),
            )


def _left(event: Event, seconds: deque[float]) -> str:
    """Return how long the line's remaining rounds will take, by the last ones.

    Evaluations come on top.
    """
    rounds = event.total - event.done
    left = min(round(rounds * sum(seconds) / len(seconds)), LONGEST)
    return f"  {timedelta(seconds=left)} left" if rounds else ""


def _figures(event: Event) -> str:
    figures = event.metrics
    if event.kind == "prepare":
        return "clients"
    if event.kind == "evaluate":
        if not figures:
            return event.note
        text = f"held-out {event.note} {figures['mean']:.3f}"
        if "noise" in figures:
            text += f", of which the noise's standard deviation is {figures['noise']:.3f}"
        if "worst" in figures:
            text += f", worst client {figures['worst']:.3f}"
        return ", ".join(
            [
                text,
                *(
                    f"{title} {figures[name]:.3g}"
                    for name, title in DIAGNOSTICS.items()
                    if name in figures
                ),
            ]
        )
    sent = bytes_text(figures["bytes_up"] + figures["bytes_down"])
    shown = "  ".join(
        f"{title} {figures[name]:.3f}" for name, title in TRAINING.items() if name in figures
    )
    speed = "  ".join(
        f"{figures[name] / figures['seconds']:.0f} {unit}/s"
        for name, unit in UNITS.items()
        if name in figures
    )
    spent = "".join(
        f"  {title} {figures[name]:.3g}" for name, title in SPENT.items() if name in figures
    )
    return f"{shown}{spent}  {sent}  {speed}"
