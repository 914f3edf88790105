"""What commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedpref.errors import UserError, command

if TYPE_CHECKING:
    from fedpref.data import Files
    from fedpref.experiments.rounds import Event
    from fedpref.experiments.run_directory import RunDirectory

app = typer.Typer(
    help="Federated and decentralised preference alignment of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# a file has room for whole tables
# without markup: names and paths may have brackets
console = Console(
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, markup=False, emoji=False
)
Config = Annotated[
    Path,
    typer.Argument(
        help="A YAML file, or a name of `fedpref list configs`, as in demo.", metavar="CONFIG"
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that override the file's: rounds=20 task.loss.beta=0.2", metavar="KEY=VALUE"
    ),
]
DataOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="How the rows are read, where otherwise than the run's: data.chosen_column=better",
        metavar="KEY=VALUE",
    ),
]
SITES = "Sites on other machines"  # a panel of the help
Open = Annotated[bool, typer.Option("--open", help="Show the report in a browser at the end.")]


def files_of(path: str, overrides: list[str] | None) -> tuple[Files, set[str]]:
    """Return rows that a command is given, and which of their settings are said.

    Raises:
        UserError: There are settings of anything else.
    """
    from fedpref import config
    from fedpref.data import Files

    for one in overrides or ():
        if not one.startswith("data.") or "=" not in one:
            raise UserError(
                f"{one!r}: settings of the rows alone are taken here, as data.chosen_column=better."
            )
    wanted = [one.removeprefix("data.") for one in overrides or ()]
    said = {one.split("=")[0].split(".")[0] for one in wanted}
    if "path" in said:
        raise UserError("data.path: the rows are those of --data.")
    return config.of_overrides(Files, {"path": path}, wanted), said


@contextmanager
def saying(how: Callable[[], str]) -> Iterator[None]:
    """Whoever presses Ctrl-C is told how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"interrupted; {how()}.", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def follow(happenings: Iterator[Event], folder: RunDirectory, opens: bool = False) -> None:
    """Show a run as it goes, then its table, its page, and where it lies."""
    from fedpref.experiments.finished import FinishedRun
    from fedpref.reports.page import REPORT, write_report
    from fedpref.reports.paired import sentences
    from fedpref.reports.progress import show
    from fedpref.reports.tables import (
        answer_table,
        client_table,
        newcomer_table,
        next_commands,
        objective_table,
        sample_table,
        sizes,
    )

    with saying(
        lambda: (
            f"`{command('resume', folder.path)}` takes it up"
            if folder.path.exists()
            else "nothing had been written"
        )
    ):
        show(happenings, console)
    outcome = FinishedRun(folder).result()
    if not outcome.tells_each:
        report = write_report([outcome.path], outcome.path / REPORT)
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
        console.print(f"run directory: {outcome.path}", highlight=False, soft_wrap=True)
        if opens:
            typer.launch(str(report))
        return
    console.print(client_table(outcome.path, outcome.evaluations))
    for sentence in sentences(outcome.path):
        console.print(f"{sentence}.", highlight=False)
    if objectives := objective_table(outcome.evaluations):
        console.print(objectives)
    if answers := answer_table(outcome.evaluations):
        console.print(answers)
    if samples := sample_table(outcome.path):
        console.print(samples)
    if outcome.newcomers:
        console.print(newcomer_table(sizes(outcome.path), outcome.newcomers))
    console.print(
        f"report: {write_report([outcome.path], outcome.path / REPORT)}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"run directory: {outcome.path}", highlight=False, soft_wrap=True)
    for line in next_commands(outcome.path):
        console.print(line, highlight=False, soft_wrap=True)
    if opens:
        typer.launch(str(outcome.path / REPORT))
