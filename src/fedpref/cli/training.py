"""Commands that train."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from fedpref.cli.shared import (
    Config,
    DataOverrides,
    Open,
    Overrides,
    app,
    console,
    files_of,
    follow,
    saying,
)
from fedpref.errors import UserError, command
from fedpref.numerics import files

if TYPE_CHECKING:
    from fedpref.experiments.experiment import Experiment


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="The run directory; by default runs/NAME-TIME.")
    ] = None,
    opens: Open = False,
) -> None:
    """Run an experiment, with a table and a report at the end.

    Example: fedpref run demo rounds=10 --open
    """
    from fedpref.experiments.experiment import Experiment
    from fedpref.experiments.rounds import new_directory
    from fedpref.runs.launch import happenings

    experiment = Experiment.load(config, overrides or ())
    folder = new_directory(experiment, output)
    folder.refuse_existing()
    follow(happenings(experiment, folder), folder, opens)


@app.command()
def demo(
    overrides: Overrides = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="On the small model that comes with fedpref.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="The run directory; by default runs/demo-TIME.")
    ] = None,
    opens: Open = False,
) -> None:
    """Give each of twelve clients a model of its own, beside one for all, and compare them.

    The model is SmolLM2-135M, of which 93 MB are fetched once; where it cannot be fetched, the
    small one that comes with fedpref is taken.

    Example: fedpref demo --offline
    """
    from fedpref.models.named import fetch

    name = "demo-offline"
    if not offline:
        try:
            fetch("smollm2-q4")
            name = "demo"
        except UserError as error:
            console.print(
                f"{error}\nThis is the small model that comes with fedpref, which writes no "
                "sentences.",
                highlight=False,
            )
    run(Path(name), overrides, output, opens)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where the config goes.")] = Path(),
    data: Annotated[
        str | None,
        typer.Option(
            help="Your rows: a JSONL, CSV, TSV or Parquet file, a dataset folder or a Hub id."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The column of prompts.")] = None,
    chosen: Annotated[str | None, typer.Option(help="The column of better answers.")] = None,
    rejected: Annotated[str | None, typer.Option(help="The column of worse answers.")] = None,
    client: Annotated[
        str | None, typer.Option(help="The column that says whose a row is; none shares them out.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A Hub id, a folder, builtin, or a name of `fedpref model`.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="A name of `fedpref list algorithms`.")
    ] = None,
) -> None:
    """Write a config for rows of your own; what is not given is asked, on a terminal.

    The rows are read, and what cannot be used is left out or cut, as the config says. No file is
    overwritten.

    Example: fedpref init clinics --data pairs.jsonl --client clinic --model smollm2-q4
    """
    from fedpref.experiments.starter import Wanted, columns_of, completed, starter

    file = folder / "experiment.yaml"
    if file.exists():
        raise UserError(f"{file} is there already, and is left as it is. Give another folder.")
    asks = sys.stdin.isatty()
    if data is None and asks:
        data = typer.prompt("Your rows (a JSONL, CSV, TSV or Parquet file, a folder or a Hub id)")
    if data is None:
        raise UserError(
            "--data is missing: a JSONL, CSV, TSV or Parquet file, a folder or a Hub id."
        )
    if asks and client is None:
        known = ", ".join(columns_of(data))
        client = typer.prompt(f"Which column says whose a row is ({known})", default="none")
    if asks and model is None:
        model = typer.prompt("The model", default="smollm2-q4")
    columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    wanted = Wanted(
        name=folder.resolve().name or "experiment",
        data=data,
        columns={role: name for role, name in columns.items() if name},
        client=None if client == "none" else client,
        model=model or "builtin",
        algorithm=algorithm,
    )
    if asks and algorithm is None:
        usual = completed(wanted).algorithm
        algorithm = typer.prompt("The algorithm (`fedpref list algorithms`)", default=usual)
    text, note = starter(replace(wanted, algorithm=algorithm))
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    said = quote(str(file))
    for line in (f"written: {file}", note, f"fedpref check {said}", f"fedpref run {said}"):
        if line:
            console.print(line, highlight=False, soft_wrap=True)


@app.command()
def resume(
    path: Annotated[
        Path, typer.Argument(help="The directory of a run that was interrupted.", metavar="RUN")
    ],
) -> None:
    """Take an interrupted run or sweep up again; it ends as if nothing had happened.

    Example: fedpref resume runs/demo
    """
    from fedpref.experiments.finished import FinishedRun
    from fedpref.runs.launch import happenings
    from fedpref.runs.sweep import is_sweep

    if is_sweep(path):
        return swept(path)
    run = FinishedRun.at(path)
    if run.is_finished:
        console.print(f"{path}: the run is finished.", highlight=False, soft_wrap=True)
        return follow(iter(()), run.folder)
    follow(happenings(run.experiment, run.folder), run.folder)


@app.command()
def clean(
    folders: Annotated[
        list[Path], typer.Argument(help="Runs, sweeps, or folders of sites.", metavar="FOLDER")
    ],
) -> None:
    """Remove what runs keep to save work, and would compute again: their `cache` folders.

    Example: fedpref clean runs/demo
    """
    from fedpref.runs.cleaning import clean as remove

    console.print(f"{remove(folders) / 1e6:,.1f} MB are free.", highlight=False)


@app.command()
def audit(
    config: Config,
    overrides: Overrides = None,
    canaries: Annotated[
        int | None,
        typer.Option(min=20, help="How many; by default 400 of clients, 100 of what one has."),
    ] = None,
) -> None:
    """Try to break a config's privacy with canaries, and hold what that shows beside epsilon.

    Ends with status 1 if more is shown than is promised. Keeps nothing of what it trains.

    Example: fedpref audit private.yaml --canaries 200
    """
    from fedpref.experiments.experiment import Experiment
    from fedpref.privacy.settings import unit_in_words
    from fedpref.runs.auditing import audit as audited

    holds = True
    for found in audited(Experiment.load(config, overrides or ()), canaries):
        verdict = "within the promise" if found.holds else "MORE THAN IS PROMISED"
        guesses = f" ({found.bound.right} of {found.bound.guesses} guesses right)"
        console.print(
            f"of one {unit_in_words(found.promise.unit)}: epsilon {found.epsilon:.3g} at delta "
            f"{found.promise.delta:g} by the accountant; {found.canaries} canaries show at least "
            f"{found.bound.epsilon:.3g} at 95 % confidence"
            f"{guesses if found.bound.guesses else ''}: {verdict}. So many canaries could show "
            f"{found.highest:.3g}.",
            highlight=False,
            soft_wrap=True,
        )
        holds = holds and found.holds
    if not holds:
        raise typer.Exit(1)


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Validate a config and its data and print the clients; trains and writes nothing.

    Example: fedpref check demo partition.max_clients=4
    """
    from fedpref.errors import printable
    from fedpref.experiments.clients import about, when_drawn
    from fedpref.experiments.experiment import Experiment, encoded
    from fedpref.experiments.promises import in_words
    from fedpref.experiments.robustness import gold_of
    from fedpref.reports.tables import ENOUGH_HELD_OUT, size_table
    from fedpref.runs.trackers import require_trackers

    experiment = Experiment.load(config, overrides or ())
    require_trackers(experiment.report_to)
    task = experiment.build_task()
    reading, shards = encoded(experiment, task)
    gold_of(experiment, task)
    sizes = {
        name: (int(one["train"]), int(one["test"]), int(one["truncated"]))
        for name, one in about(reading.clients, shards).items()
    }
    experiment.check_clients({name: train for name, (train, _, _) in sizes.items()})
    console.print(task.description, highlight=False, soft_wrap=True)
    console.print(size_table(sizes))
    said = [reading.skipped and f"{reading.skipped}; they are left out.", *reading.notes]
    said.append(when_drawn(shards))
    if reading.left_out:
        said.append(
            f"{reading.left_out} training rows are left out, because their prompt also stands "
            "among the source's test rows."
        )
    few = sorted((test, name) for name, (_, test, _) in sizes.items())
    few = [(count, name) for count, name in few if count < ENOUGH_HELD_OUT]
    if few:
        error = 50 / few[0][0] ** 0.5
        named = ", ".join(f"{printable(name)} ({count})" for count, name in few[:8])
        said.append(
            f"{len(few)} clients have fewer than {ENOUGH_HELD_OUT} held-out examples, too few for "
            f"a figure of their own: {named}{', ...' * (len(few) > 8)}. Of {few[0][0]}, an "
            f"accuracy has a standard error of up to {error:.0f} points. Raise "
            "data.test_fraction, or set partition.min_test_rows."
        )
    said.append(in_words(experiment, task, shards))
    for text in filter(None, said):
        console.print(text, highlight=False, soft_wrap=True)
    console.print(f"{config} is valid: {experiment.algorithm.name}, {experiment.rounds} rounds.")


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help='An algorithm, or "NAME: key=value key=value"; give it for each line of the table.'
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE,VALUE: each value is a variant; of several, each combination."
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Seeds 0, 1, ... of every variant, each with a split of its own."),
    ] = 3,
    same_split: Annotated[
        bool, typer.Option("--same-split", help="One split for all seeds, the config's.")
    ] = False,
    select: Annotated[
        str | None,
        typer.Option(
            help="A metric by which the best variant is chosen on validation prompts; it alone is "
            "then measured on the test's, as in rewards/accuracies.",
            metavar="METRIC",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the runs go; by default runs/NAME-sweep. What is done there is kept."
        ),
    ] = None,
    parallel: Annotated[
        int,
        typer.Option(
            min=1, help="Runs at a time, each with its share of the processors, and a model each."
        ),
    ] = 1,
) -> None:
    """Run variants of one experiment by seeds, and compare them.

    Begin it again and it goes on where it was. Its folder is taken by compare, report, figures,
    watch, resume and export.

    Example: fedpref sweep demo --variant feddpo --variant fedpdpo --seeds 3
    """
    from fedpref.experiments.experiment import Experiment
    from fedpref.experiments.run_directory import in_runs, refuse_run
    from fedpref.runs.sweep import (
        ALGORITHMS,
        Variant,
        plan,
        unfinished,
        with_former,
        with_grid,
        write_plan,
    )
    from fedpref.runs.sweep import selecting as selecting_by

    spec = Experiment.load(config, overrides or ())
    if spec.baselines:
        variants_too = [name for name in spec.baselines if name in ALGORITHMS]
        said = " ".join(f"--variant {name}" for name in variants_too)
        others = [name for name in spec.baselines if name not in ALGORITHMS]
        console.print(
            f"baselines {', '.join(spec.baselines)} are left out of a sweep."
            + (f" Take as variants: {said}." if said else "")
            + (f" `fedpref run` has {', '.join(others)} beside a run." if others else ""),
            highlight=False,
            soft_wrap=True,
        )
    folder = output or in_runs(spec.name, "sweep")
    refuse_run(folder)
    variants: Sequence[str | Variant] = variant or ([] if grid else ["feddpo", "fedpdpo"])
    if grid:
        variants = with_grid(variants, grid)
    on_validation = selecting_by(spec, select) if select else []
    settings = [*(overrides or ()), *on_validation]
    runs = plan(config, variants, range(seeds), settings, folder, redraws=not same_split)
    runs = with_former(runs, folder, select)
    unfinished(runs)  # nothing is written over what is in the way
    write_plan(runs, folder, select)
    swept(folder, parallel)


def swept(folder: Path, parallel: int = 1) -> None:
    """Do what is left of a sweep, so many runs at a time, and show what it came to."""
    from fedpref.experiments.finished import FinishedRun
    from fedpref.models.trunk import remove_states
    from fedpref.reports.comparison import compare
    from fedpref.reports.comparison_tables import csv_text, latex, markdown, notes, table
    from fedpref.reports.page import REPORT, write_report
    from fedpref.reports.progress import show
    from fedpref.runs.sweep import chosen, planned, selection, side_by_side
    from fedpref.runs.sweep import sweep as runs_to_do

    def goes_on() -> str:
        return f"`{command('resume', folder)}` goes on where it was"

    def follow_all(runs: Mapping[Path, Experiment]) -> None:
        if parallel > 1:
            failed = 0
            with saying(goes_on):
                for path, why in side_by_side(runs, folder / "cache", parallel):
                    failed += bool(why)
                    said = f"failed: {why}" if why else "done"
                    console.print(f"{path}: {said}", highlight=False, soft_wrap=True)
            if failed:
                raise UserError(
                    f"{failed} of {len(runs)} runs failed, as said above. "
                    f"`{command('resume', folder)}` does what is left."
                )
            remove_states(folder / "cache")
            return
        for path, happenings in runs_to_do(runs, folder / "cache"):
            console.print(f"{path}", style="bold", highlight=False)
            with saying(goes_on):
                show(happenings, console)
        remove_states(folder / "cache")

    follow_all(planned(folder))
    if not all(FinishedRun.at(path).result().tells_each for path in planned(folder)):
        console.print("clients' figures are not told one by one, so that there is no table;")
        console.print("`fedpref report RUN` shows what is told of each run", highlight=False)
        return
    rows = compare([folder])
    for name, text in (
        ("comparison.md", markdown(rows)),
        ("comparison.csv", csv_text(rows)),
        ("table.tex", latex(rows)),
    ):
        files.write(folder / name, text)
    console.print(table(rows), *notes(rows), sep="\n", highlight=False, soft_wrap=True)
    console.print(
        f"the table as Markdown, CSV and LaTeX: {folder}/comparison.md, comparison.csv, table.tex",
        f"report: {write_report([folder], folder / REPORT)}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    if metric := selection(folder):
        name, runs = chosen(folder, metric)
        count = len({one.name for one in planned(folder).values()})
        said = f"by {metric} on validation prompts: {name}, of {count} variants"
        luck = "; being the best of them, its figure above is too good" if count > 1 else ""
        console.print(f"{said}{luck}.", highlight=False, soft_wrap=True)
        follow_all(runs)
        console.print(table(compare(list(runs))))
        console.print("on the test's prompts, which nothing was chosen by.", highlight=False)


@app.command()
def pareto(
    config: Config,
    overrides: Overrides = None,
    points: Annotated[
        int,
        typer.Option(
            min=2,
            max=1001,
            help="Preferences along each edge: 11 are 0.0, 0.1, ..., 1.0 of two objectives.",
        ),
    ] = 11,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each point.")] = 1,
    interpolate: Annotated[
        int,
        typer.Option(
            min=0, help="Points between neighbours by means of their adapters, untrained."
        ),
    ] = 0,
    reference: Annotated[
        str,
        typer.Option(
            help="The hypervolume's reference point, as in -1,0; needed to compare two fronts."
        ),
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="Where runs go; by default runs/NAME-front.")
    ] = None,
) -> None:
    """Sweep the preference over objectives: the front of trade-offs, its hypervolume, and a figure.

    Example: fedpref pareto firm --points 5
    """
    import json
    from dataclasses import asdict

    from fedpref.experiments.experiment import Experiment
    from fedpref.experiments.run_directory import in_runs, refuse_run
    from fedpref.models.trunk import remove_states
    from fedpref.reports.front_figure import draw_front, front_table
    from fedpref.reports.progress import show
    from fedpref.runs import pareto as front
    from fedpref.runs.sweep import sweep as runs_to_do

    folder = output or in_runs(Experiment.load(config, overrides or ()).name, "front")
    refuse_run(folder)
    objectives, runs = front.plan_front(
        config, points, range(seeds), overrides or (), folder, interpolates=bool(interpolate)
    )
    given = front.parse_reference(reference, objectives) if reference else None
    for path, happenings in runs_to_do(
        {path: one for some in runs.values() for path, one in some.items()}, folder / "cache"
    ):
        console.print(f"{path}", style="bold", highlight=False)
        with saying(lambda: f"the same command goes on where it was, in {folder}"):
            show(happenings, console)
    measured = front.measured(
        objectives, {preference: list(some) for preference, some in runs.items()}
    )
    if interpolate:
        measured += front.interpolated(objectives, runs, interpolate, folder / "cache")
    remove_states(folder / "cache")
    measured.sort(key=lambda point: point.preference)
    above = given or front.reference_of(measured)
    measures = front.front_metrics(measured, above)
    console.print(front_table(objectives, measured, measures))
    console.print(
        f"hypervolume above {', '.join(f'{value:.4g}' for value in above)}", highlight=False
    )
    content = {
        "objectives": objectives,
        "reference": above,
        "figures": measures,
        "points": [asdict(point) for point in measured],
    }
    files.write(folder / "front.json", json.dumps(content, indent=1) + "\n")
    draw_front(objectives, measured, folder / "front.svg")
    console.print(
        f"the front and its figure: {folder}/front.json, front.svg", highlight=False, soft_wrap=True
    )


@app.command()
def personalize(
    path: Annotated[Path, typer.Argument(help="The directory of a finished run.", metavar="RUN")],
    data: Annotated[
        str,
        typer.Option(
            help="The newcomers' pairs: a JSONL, CSV, TSV or Parquet file, a dataset folder or a "
            "Hub id."
        ),
    ],
    column: Annotated[
        str | None,
        typer.Option(help="A column whose values are the newcomers; without it there is one."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The one newcomer's name; by default the file's.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Local steps; by default the run's federation.join_steps."),
    ] = None,
    overrides: DataOverrides = None,
) -> None:
    """Let clients that took no part join a run and make what is their own on their data.

    They are evaluated on held-out pairs before and after.

    Example: fedpref personalize runs/fedpdpo --data pairs.jsonl
    """
    from fedpref.reports.page import REPORT, write_report
    from fedpref.reports.tables import newcomer_table
    from fedpref.runs.join import personalize as join

    rows, said = files_of(data, overrides)
    joined = join(path, rows, column=column, name=name, steps=steps, given=said)
    sizes = {client: {"train": one.train, "test": one.test} for client, one in joined.items()}
    before, after = (
        {client: getattr(one, when) for client, one in joined.items()}
        for when in ("before", "after")
    )
    console.print(newcomer_table(sizes, {str(path): (before, after)}))
    console.print(f"their models: {path}/newcomers", highlight=False, soft_wrap=True)
    console.print(f"report: {write_report([path], path / REPORT)}", highlight=False, soft_wrap=True)
