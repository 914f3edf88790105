"""Commands about settings: what there is, a schema for editors, old files made new."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fedpref.cli.shared import app, console
from fedpref.errors import UserError
from fedpref.numerics import files


@app.command(name="list")
def list_(
    what: Annotated[
        str | None,
        typer.Argument(help="A kind, as in losses, or a name, as in feddpo; by default all."),
    ] = None,
) -> None:
    """List what there is: algorithms, losses, tasks, data, configs; or the settings of one of them.

    Example: fedpref list feddpo
    """
    from fedpref.algorithms import AnyAlgorithm
    from fedpref.config import NEAR, opened
    from fedpref.experiments.packaged import packaged_configs
    from fedpref.reports.settings import (
        kind_table,
        kinds_table,
        named_kinds,
        own_kind,
        setting_table,
    )

    if what == "configs":
        for name, about in packaged_configs().items():
            said = Text.assemble((name, "bold"), f": {about}")
            console.print(said, highlight=False, soft_wrap=True)
        return
    groups = named_kinds()
    if what is None or what in groups:
        console.print(kinds_table(groups if what is None else {what: groups[what]}))
        return
    chosen = {kind for group in groups.values() for kind in group if what in kind.names}
    if not chosen and (own := own_kind(what)):
        chosen = {own}
    if not chosen:
        names = {name for group in groups.values() for kind in group for name in kind.names}
        choice = opened(AnyAlgorithm)
        also = dict(choice.also) if choice else {}  # as others call them
        near = difflib.get_close_matches(what, sorted({"configs", *groups, *names, *also}), 1, NEAR)
        near = [also.get(name, name) for name in near]
        raise UserError(
            f"{what!r} is neither a kind nor a name"
            + (f"; did you mean {near[0]!r}? " if near else ". ")
            + f"Kinds are configs, {', '.join(groups)}; "
            "`fedpref list` shows all names."
        )
    for kind in sorted(chosen, key=lambda kind: kind.title):
        console.print(kind_table(kind))
        console.print(setting_table(kind))


@app.command()
def model(
    name: Annotated[
        str | None, typer.Argument(help="Which; by default those that there are are listed.")
    ] = None,
) -> None:
    """Fetch a model that experiments may name, once, into a folder of yours.

    Example: fedpref model smollm2
    """
    from fedpref.models.named import MODELS, SAYS, cache, fetch

    if name is None:
        for known, named in MODELS.items():
            here = (cache() / "models" / known / SAYS).is_file()
            console.print(f"{known}: {named.says}{', here' if here else ''}", highlight=False)
        return
    fetched = fetch(name)
    if fetched.note:
        console.print(fetched.note, highlight=False, soft_wrap=True)
    console.print(
        f"task.model.path={fetched.name} is {fetched.folder}", highlight=False, soft_wrap=True
    )


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option(help="The file; by default it is printed.")] = None,
) -> None:
    """Write a JSON schema of experiments, by which editors complete and check YAML files.

    Example: fedpref schema --output fedpref.schema.json
    """
    import json

    from fedpref import config
    from fedpref.experiments.experiment import Experiment

    text = json.dumps(config.schema(Experiment), indent=1)
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n")
        console.print(
            f"schema: {output}; begin a YAML file with # yaml-language-server: $schema={output}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def migrate(
    config: Annotated[
        Path, typer.Argument(help="A YAML file of an older fedpref.", metavar="CONFIG")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The new file; by default CONFIG itself.")
    ] = None,
) -> None:
    """Rewrite a config with today's keys and names; comments and all else stay.

    Example: fedpref migrate configs/mine.yaml
    """
    from fedpref.experiments.migration import migrated_text

    if not config.is_file():
        raise UserError(f"{config}: there is no such config file.")
    try:
        written = config.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config}: cannot be read as UTF-8 text: {error}") from error
    try:
        text = written.replace("\r\n", "\n")
        renewed = migrated_text(text)
    except UserError as error:
        raise UserError(f"{config}: {error}") from error
    goal = output or config
    if renewed == text and goal == config:
        console.print(f"{config}: nothing to change.", highlight=False, soft_wrap=True)
        return
    files.write(goal, renewed if text == written else renewed.replace("\n", "\r\n"))
    console.print(f"written: {goal}", highlight=False, soft_wrap=True)
