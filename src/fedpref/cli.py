"""The command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedpref import __version__
from fedpref.errors import UserError

if TYPE_CHECKING:
    from fedpref.rundirectory import RunDirectory
    from fedpref.running import Event

app = typer.Typer(
    help="Federated and decentralised preference alignment of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
federation = typer.Typer(help="Make a federation of sites.", no_args_is_help=True)
site_app = typer.Typer(help="Start and stop a site, or the server.", no_args_is_help=True)
app.add_typer(federation, name="federation")
app.add_typer(site_app, name="site")
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)  # a file has room for whole tables
Config = Annotated[Path, typer.Argument(help="A YAML file; configs/ has examples.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that override the file's: rounds=20 task.loss.beta=0.2", metavar="KEY=VALUE")
]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="The run directory; by default runs/NAME-TIME.")] = None,
) -> None:
    """Run an experiment, with a table at the end."""
    from fedpref.experiment import Experiment
    from fedpref.launch import happenings
    from fedpref.running import new_directory

    experiment = Experiment.load(config, overrides or ())
    folder = new_directory(experiment, output)
    folder.refuse_existing()
    _follow(happenings(experiment, folder), folder)


@app.command()
def resume(path: Annotated[Path, typer.Argument(help="The directory of a run that was interrupted.", metavar="RUN")]) -> None:
    """Take an interrupted run up again; it ends as if nothing had happened."""
    from fedpref.launch import happenings
    from fedpref.running import existing_directory, read_experiment

    folder = existing_directory(path)
    _follow(happenings(read_experiment(folder), folder), folder)


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Validate a config and its data and print the clients; trains and writes nothing."""
    from fedpref.experiment import Experiment
    from fedpref.reports.tables import size_table

    experiment = Experiment.load(config, overrides or ())
    clients, left_out = experiment.clients()
    task = experiment.build_task()
    shards = [task.encode(client) for client in clients]
    experiment.check_clients({shard.name: len(shard) for shard in shards})
    console.print(task.description, highlight=False, soft_wrap=True, markup=False)
    console.print(size_table({shard.name: (len(shard.train), len(shard.test), shard.truncated) for shard in shards}))
    if left_out:
        console.print(f"{left_out} training rows are left out, because their prompt also stands among the source's test rows.")
    console.print(f"{config} is valid: {experiment.algorithm.name}, {experiment.rounds} rounds.")


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    variant: Annotated[
        list[str] | None, typer.Option(help='An algorithm, or "NAME: key=value key=value"; give it for each line of the table.')
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of every variant.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Where the runs go; by default runs/NAME-sweep. What is done there is kept.")] = None,
) -> None:
    """Run variants of one experiment by seeds, on one split, and compare them; begin it again and it goes on where it was."""
    from fedpref.experiment import Experiment
    from fedpref.reports.comparison import compare, csv_text, markdown, table
    from fedpref.reports.progress import show
    from fedpref.sweep import plan
    from fedpref.sweep import sweep as runs_to_do

    place = output or Path(f"runs/{Experiment.load(config, overrides or ()).name}-sweep")
    runs = plan(config, variant or ["feddpo", "fedpdpo"], range(seeds), overrides or (), place)
    for path, happenings in runs_to_do(runs, place / "cache"):
        console.print(f"{path}", style="bold", highlight=False)
        show(happenings, console)
    rows = compare(list(runs))
    (place / "comparison.md").write_text(markdown(rows))
    (place / "comparison.csv").write_text(csv_text(rows))
    console.print(table(rows))
    console.print(f"the table as Markdown and CSV: {place}/comparison.md, comparison.csv", highlight=False, soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Finished runs; the first one's name is what others are compared with.", metavar="RUN...")
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Compare runs: accuracy or alignment, gains with intervals over clients and seeds, worst clients, bytes, time."""
    from fedpref.reports import comparison

    rows = comparison.compare(runs)
    if markdown or csv:
        print(comparison.markdown(rows) if markdown else comparison.csv_text(rows), end="")
    else:
        console.print(comparison.table(rows))


@app.command()
def pareto(
    config: Config,
    overrides: Overrides = None,
    points: Annotated[int, typer.Option(min=2, help="Preferences along each edge: 11 are 0.0, 0.1, ..., 1.0 of two objectives.")] = 11,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each point.")] = 1,
    interpolate: Annotated[int, typer.Option(min=0, help="Points between neighbours by means of their adapters, untrained.")] = 0,
    reference: Annotated[str, typer.Option(help="The hypervolume's reference point, as in -1,0; needed to compare two fronts.")] = "",
    output: Annotated[Path | None, typer.Option(help="Where runs go; by default runs/NAME-front.")] = None,
) -> None:
    """Sweep the preference over objectives: the front of trade-offs, its hypervolume, and a figure.

    Example: fedpref pareto configs/firm.yaml --points 5
    """
    import json
    from dataclasses import asdict

    from fedpref import pareto as front
    from fedpref.experiment import Experiment
    from fedpref.reports.front import draw_front, front_table
    from fedpref.reports.progress import show
    from fedpref.sweep import sweep as runs_to_do

    place = output or Path("runs") / f"{Experiment.load(config, overrides or ()).name}-front"
    objectives, runs = front.plan_front(config, points, range(seeds), overrides or (), place, interpolates=bool(interpolate))
    given = front.parse_reference(reference, objectives) if reference else None
    for path, happenings in runs_to_do({path: one for some in runs.values() for path, one in some.items()}, place / "cache"):
        console.print(f"{path}", style="bold", highlight=False)
        show(happenings, console)
    found = front.measured(objectives, {preference: list(some) for preference, some in runs.items()})
    if interpolate:
        found += front.interpolated(objectives, runs, interpolate, place / "cache")
    found.sort(key=lambda point: point.preference)
    above = given or front.reference_of(found)
    measures = front.figures(found, above)
    console.print(front_table(objectives, found, measures))
    console.print(f"hypervolume above {', '.join(f'{value:.4g}' for value in above)}", highlight=False)
    content = {"objectives": objectives, "reference": above, "figures": measures, "points": [asdict(point) for point in found]}
    (place / "front.json").write_text(json.dumps(content, indent=1) + "\n")
    draw_front(objectives, found, place / "front.svg")
    console.print(f"the front and its figure: {place}/front.json, front.svg", highlight=False, soft_wrap=True)


@app.command()
def personalise(
    path: Annotated[Path, typer.Argument(help="The directory of a finished run.", metavar="RUN")],
    data: Annotated[str, typer.Option(help="The newcomers' pairs: a JSONL, CSV or Parquet file, a dataset folder or a Hub id.")],
    column: Annotated[str | None, typer.Option(help="A column whose values are the newcomers; without it there is one.")] = None,
    name: Annotated[str | None, typer.Option(help="The one newcomer's name; by default the file's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Local steps; by default the run's federation.join_steps.")] = None,
) -> None:
    """Let clients that took no part join a run: they make what is their own on their data, and are evaluated on held-out pairs."""
    from fedpref.data import Files
    from fedpref.newcomers import personalise as join
    from fedpref.reports.tables import newcomer_table

    joined = join(path, Files(path=data), column=column, name=name, steps=steps)
    sizes = {client: {"train": one.train, "test": one.test} for client, one in joined.items()}
    before, after = ({client: getattr(one, when) for client, one in joined.items()} for when in ("before", "after"))
    console.print(newcomer_table(sizes, {str(path): (before, after)}))
    console.print(f"their models: {path}/newcomers", highlight=False, soft_wrap=True)


@app.command()
def topology(
    spec: Annotated[str, typer.Argument(help='A name, or "{name: erdos-renyi, probability: 0.2}".', metavar="SPEC")],
    clients: Annotated[int, typer.Option(min=1, help="How many there are.")] = 8,
    weights: Annotated[str, typer.Option(help="metropolis, max-degree or uniform.")] = "metropolis",
) -> None:
    """Show a graph between clients: how fast it lets them agree, and who hears whom."""
    import yaml

    from fedpref import config
    from fedpref.network import Network
    from fedpref.reports.graph import drawn, figure_table, figures

    try:
        content = yaml.safe_load(spec)
    except yaml.YAMLError as error:
        raise UserError(f"SPEC {spec!r}: this is no name and no YAML mapping.") from error
    network = config.parse(Network, {"topology": content, "weights": weights}, "SPEC")
    names = [f"client-{i}" for i in range(clients)]
    network.check(names)
    console.print(figure_table(figures(network, names)))
    console.print()
    console.print(drawn(network.matrix(names, 0, 0, range(clients)), names), soft_wrap=True)


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="The directory of a finished run.", metavar="RUN")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; by default read from standard input.")] = None,
    client: Annotated[str | None, typer.Option(help="The client whose model answers; not needed where all share one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Take the prompt as it is, without the chat template.")] = False,
) -> None:
    """Let a run's model, or a client's own, answer a prompt."""
    from fedpref.models.exported import generate as answer
    from fedpref.running import exported

    folder = exported(path, client)
    try:
        text = sys.stdin.read().strip() if prompt is None else prompt
    except UnicodeDecodeError as error:
        raise UserError("the prompt on standard input is not UTF-8 text.") from error
    if not text:
        raise UserError("the prompt is empty; give it on the command line or on standard input.")
    print(answer(folder, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, chat=not plain))


@app.command()
def reward(
    path: Annotated[Path, typer.Argument(help="The directory of a finished run of the task `opinion`.", metavar="RUN")],
    data: Annotated[Path, typer.Argument(help="Rows with prompt and completions, or prompt, chosen and rejected.", metavar="FILE")],
    group: Annotated[list[str] | None, typer.Option(help="A group; give it for each, or leave it out for all.")] = None,
    combine: Annotated[str, typer.Option(help='mean, min, max or alpha, or "{name: alpha, decay: 0.8}".')] = "mean",
    logits: Annotated[bool, typer.Option("--logits", help="What the shares are a softmax of, in place of shares.")] = False,
) -> None:
    """Score answers as a run's groups would: JSON Lines with each group's reward of each completion, and the combined one."""
    from fedpref.scoring.answers import score

    for line in score(path, data, group or (), combine, "logit" if logits else "share"):
        print(line)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    admin: Annotated[Path, typer.Option(help="The kit of who submits, a folder that `fedpref federation init` made.")] = Path(
        "federation/admin"
    ),
    output: Annotated[Path | None, typer.Option(help="The run directory; by default runs/NAME-TIME.")] = None,
) -> None:
    """Run an experiment over sites that have been started, each with its own data.

    Example: fedpref submit configs/fedpdpo.yaml --admin federation/admin@example.org
    """
    from fedpref.experiment import Experiment
    from fedpref.flare import submitted
    from fedpref.running import new_directory

    experiment = Experiment.load(config, [*(overrides or ()), "engine=flare"])
    folder = new_directory(experiment, output)
    folder.refuse_existing()
    _follow(submitted(experiment, admin, folder), folder)


@federation.callback()
def of_federation() -> None:
    """Make a federation of sites."""


@federation.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where kits go; it must not be there yet.", metavar="FOLDER")],
    site: Annotated[list[str], typer.Option(help="A site's name; give it for each.", prompt="Names of sites, with commas between")],
    server: Annotated[str, typer.Option(help="The host name by which sites reach the coordinator.", prompt="Host name of the server")],
    port: Annotated[int, typer.Option(help="The one port that must be open there.")] = 8002,
    admin: Annotated[str, typer.Option(help="Who submits experiments, as an address.")] = "admin@fedpref.org",
    name: Annotated[str, typer.Option(help="The federation's name.")] = "federation",
) -> None:
    """Make certificates, and a folder for each participant to hand over.

    Example: fedpref federation init federation --server fl.example.org --site clinic --site bank
    """
    from fedpref.kits import provision

    names = [part.strip() for text in site for part in text.split(",") if part.strip()]
    kits = provision(folder, name, server, port, names, admin)
    for participant, kit in kits.items():
        console.print(f"{participant:24s} {kit}", highlight=False, soft_wrap=True)
    console.print("Hand each over by a safe way, edit each site's site.yaml, then: fedpref site start FOLDER (the server's too).")


@site_app.command(name="start")
def site_start(
    kit: Annotated[Path, typer.Argument(help="A site's or the server's folder.", metavar="KIT")],
    runs: Annotated[Path, typer.Option(help="Where the server keeps runs.")] = Path("runs"),
    functions: Annotated[str, typer.Option(help="Rewards that the server may import: module:function, with commas between.")] = "",
) -> None:
    """Start a site, or the server, from its kit; it goes on in the background.

    Example: fedpref site start federation/clinic
    """
    from fedpref import kits
    from fedpref.flare import FUNCTIONS, RUNS, SITE_FILE
    from fedpref.hosting import SiteFile

    file = kit / kits.SITE_FILE
    if file.exists():
        SiteFile.load(file)
    variables = {SITE_FILE: str(file.resolve())} if file.exists() else {RUNS: str(runs.resolve()), FUNCTIONS: functions}
    runs.mkdir(parents=True, exist_ok=True)
    kits.start(kit.resolve(), variables)
    console.print(f"{kit.name} is starting; its log: {kit}/{kits.LOG}", highlight=False, soft_wrap=True)


@site_app.command(name="stop")
def site_stop(kit: Annotated[Path, typer.Argument(help="A site's or the server's folder.", metavar="KIT")]) -> None:
    """Stop it, with the jobs that it runs.

    Example: fedpref site stop federation/clinic
    """
    from fedpref import kits

    kits.stop(kit.resolve())
    console.print(f"{kit.name} is stopped.", highlight=False)


@site_app.command(name="status")
def site_status(kit: Annotated[Path, typer.Argument(help="A site's or the server's folder.", metavar="KIT")]) -> None:
    """Say whether it runs.

    Example: fedpref site status federation/clinic
    """
    from fedpref import kits

    console.print(f"{kit.name} {'is running' if kits.running(kit.resolve()) else 'is not running'}.", highlight=False)


@app.command(name="list")
def list_() -> None:
    """What there is: algorithms, losses, tasks, sources of data, partitions."""
    from typing import get_args

    from rich.table import Table
    from rich.text import Text

    from fedpref.algorithms import AnyAlgorithm
    from fedpref.data import Partition, Source
    from fedpref.losses import Loss
    from fedpref.tasks import AnyTask

    groups = {"algorithms": AnyAlgorithm, "losses": Loss, "tasks": AnyTask, "data": Source, "partitions": Partition}
    table = Table.grid(padding=(0, 2))
    for title, group in groups.items():
        table.add_row(f"[bold]{title}[/bold]")
        for kind in get_args(group) or (group,):
            table.add_row(f"  {kind.name}", Text((kind.__doc__ or "").strip().splitlines()[0]))
    console.print(table)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedpref {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Federated and decentralised preference alignment of language models."""


def main() -> None:
    """Entry point: a mistake of the user's is a sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _follow(happenings: Iterator[Event], folder: RunDirectory) -> None:
    """Show a run as it goes, then its table and where it lies."""
    from fedpref.reports.progress import show
    from fedpref.reports.tables import client_table, newcomer_table, objective_table, sample_table, sizes
    from fedpref.running import result

    show(happenings, console)
    outcome = result(folder)
    console.print(client_table(outcome.path, outcome.evaluations))
    if objectives := objective_table(outcome.evaluations):
        console.print(objectives)
    if samples := sample_table(outcome.path):
        console.print(samples)
    if outcome.newcomers:
        console.print(newcomer_table(sizes(outcome.path), outcome.newcomers))
    console.print(f"run directory: {outcome.path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
