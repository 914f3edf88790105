"""The command line."""

from __future__ import annotations

import io
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedpref import __version__
from fedpref.cli import benching, collecting, settings, showing, sites, training, using
from fedpref.cli.shared import SITES, app
from fedpref.errors import UserError, printable

PANELS = {
    training.__name__: "Train",
    benching.__name__: "Train",
    showing.__name__: "Look",
    using.__name__: "Use what was trained",
    collecting.__name__: "Choose and judge",
    settings.__name__: "Settings",
    sites.__name__: SITES,
}
app.registered_commands.sort(key=lambda command: list(PANELS).index(command.callback.__module__))
for command in app.registered_commands:
    command.rich_help_panel = PANELS[command.callback.__module__]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedpref {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated and decentralised preference alignment of language models."""


def main() -> None:
    """Run the command line; a user's mistake is a sentence and exit code 2.

    So is what the system refuses.
    """
    # modules of one's own lie in the folder where one works; last, so that they hide nothing
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    # what was begun for a run, workers and simulated sites, ends with it
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # a terminal or file that cannot show a client's name shows its escape, and ends nothing
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # of libraries to their own callers, which users of a command are not
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app()
    except BrokenPipeError:
        sys.exit(1)  # who read what this prints has had enough
    except (UserError, OSError) as error:
        text = (
            f"{error.filename}: {error.strerror}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        Console(stderr=True, emoji=False).print(
            f"[bold red]error:[/bold red] {escape(printable(text))}",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(2)
