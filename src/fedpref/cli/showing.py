"""Commands that show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpref.cli.shared import app, console
from fedpref.errors import UserError, command


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Finished runs or sweeps; the first one's name is what others are compared with.",
            metavar="RUN",
        ),
    ],
    at: Annotated[
        str | None,
        typer.Option(
            help="Compare where lines were first at one value of a metric, as in kl=2, or of "
            "rounds, pairs, seconds or mb; between evaluations in proportion.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="Also say what it took to reach a mean, in the table's unit, as in 65.",
            metavar="VALUE",
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX, for booktabs.")] = False,
) -> None:
    """Compare runs: means, gains with intervals over clients and seeds, worst clients, cost.

    One run alone is compared with its own baselines.

    Example: fedpref compare runs/feddpo runs/fedpdpo
    """
    from fedpref.reports import comparison_tables
    from fedpref.reports.comparison import Terms, compare_all

    terms = Terms(at, to)
    rows = compare_all(runs, terms)
    forms = (
        (markdown, comparison_tables.markdown),
        (csv, comparison_tables.csv_text),
        (latex, comparison_tables.latex),
    )
    wanted = [form for is_wanted, form in forms if is_wanted]
    for form in wanted:
        print(form(rows), end="")
    if not wanted:
        console.print(comparison_tables.table(rows))
        for note in comparison_tables.notes(rows, terms):
            console.print(note, highlight=False, soft_wrap=True)


@app.command()
def watch(
    path: Annotated[
        Path,
        typer.Argument(
            help="The directory of a run or sweep that goes on elsewhere.", metavar="RUN"
        ),
    ],
) -> None:
    """Show a run that goes on elsewhere, from its directory, with the time that is left.

    Ctrl-C ends the watching, not the run.

    Example: fedpref watch runs/demo
    """
    from fedpref.reports.progress import show
    from fedpref.runs.sweep import members
    from fedpref.runs.watch import await_begin, watched

    for run in members(path):
        if run != path:
            console.print(f"{run}", style="bold", highlight=False)
            await_begin(run)
        show(watched(run), console)
    console.print(
        f"the run is finished; `{command('report', path)}` writes its page",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Runs, sweeps, or folders of fronts that `fedpref pareto` made.", metavar="RUN"
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The file; by default report.html in the run, or here for several."),
    ] = None,
    opens: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
) -> None:
    """Write one page about runs: what was learned, who gained and who lost, what it cost.

    It opens from a disk and needs no network.

    Example: fedpref report runs/fedpdpo runs/feddpo --output comparison.html --open
    """
    from fedpref.reports.page import REPORT, write_report

    file = write_report(runs, output or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT)))
    console.print(f"report: {file}", highlight=False, soft_wrap=True)
    if opens:
        typer.launch(str(file))


@app.command()
def figures(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs or sweeps.", metavar="RUN")],
    to: Annotated[Path, typer.Option("--to", help="The folder; figures there are replaced.")],
) -> None:
    """Write figures as SVG and PDF, and the comparison as LaTeX (booktabs) and CSV.

    Example: fedpref figures runs/demo --to figures
    """
    from fedpref.reports.figures import write_figures

    for file in write_figures(runs, to):
        console.print(str(file), highlight=False, soft_wrap=True)


@app.command()
def topology(
    spec: Annotated[
        str,
        typer.Argument(help='A name, or "{name: erdos-renyi, probability: 0.2}".', metavar="SPEC"),
    ],
    clients: Annotated[int, typer.Option(min=1, max=10_000, help="How many there are.")] = 8,
    weights: Annotated[str, typer.Option(help="metropolis, max-degree or uniform.")] = "metropolis",
) -> None:
    """Show a graph between clients: how fast it lets them agree, and who hears whom.

    Example: fedpref topology ring --clients 16
    """
    import yaml

    from fedpref import config
    from fedpref.federation.network import Network
    from fedpref.reports.network_view import drawn, graph_metrics, metric_table

    try:
        config.refuse_large(spec)
        content = yaml.safe_load(spec)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"SPEC {spec!r}: this is no name and no YAML mapping.") from error
    network = config.parse(Network, {"topology": content, "weights": weights}, "SPEC")
    names = [f"client-{i}" for i in range(clients)]
    network.check(names)
    console.print(metric_table(graph_metrics(network, names)))
    console.print()
    console.print(drawn(network.matrix(names, 0, 0, range(clients)), names), soft_wrap=True)
