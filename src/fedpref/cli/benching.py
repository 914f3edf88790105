"""The benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpref.cli.shared import Overrides, app, console, saying
from fedpref.errors import UserError


@app.command()
def bench(
    suite: Annotated[
        str,
        typer.Argument(
            help="quick, people, opposed, opinions, objectives or papers.", metavar="[SUITE]"
        ),
    ] = "quick",
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder; by default runs/bench-SUITE. It goes on.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="A folder of local tables; without it sets are read from the Hub."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A set of the suite; give it for each.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help='A method beside the first: NAME, or "NAME: key=value ...", as of your own. By '
            "default all of the suite."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Repetitions.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Begin nothing new after so many hours.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 1,
    submit: Annotated[Path | None, typer.Option(help="Write one file that can be sent in.")] = None,
    leaderboard: Annotated[
        list[Path] | None,
        typer.Option(help="Print the board of such files, and run nothing; give it for each."),
    ] = None,
) -> None:
    """Measure methods by the same rules: settings chosen on validation prompts, the test's once.

    Each seed has a split of its own, and each method the same number of trials. What is done
    already is not done again.

    Example: fedpref bench quick
    """
    from dataclasses import replace

    from fedpref.bench.leaderboard import board, overview, read_submission, write_tables
    from fedpref.bench.suites import suite_of, with_methods
    from fedpref.bench.trials import Study
    from fedpref.experiments.run_directory import refuse_run
    from fedpref.numerics import files
    from fedpref.numerics.files import refuse_unwritable

    if leaderboard:
        print(board(leaderboard))
        return
    wanted = with_methods(suite_of(suite), method or ())
    if only:
        known = {one.name: one for one in wanted.sets}
        if unknown := sorted(set(only) - known.keys()):
            raise UserError(
                f"--only {unknown[0]}: the suite {suite} has no such set; it has {list(known)}."
            )
        wanted = replace(wanted, sets=tuple(known[name] for name in only))
    wanted = replace(wanted, seeds=seeds or wanted.seeds)
    folder = output or Path(f"runs/bench-{suite}")
    refuse_run(folder)
    if submit is not None:
        refuse_unwritable(submit)  # before hours are spent
    study = Study(wanted, folder, data, tuple(overrides or ()))
    study.check()
    trials = len(wanted.rates)
    console.print(
        f"{suite}: {len(wanted.sets)} sets, {len(wanted.methods)} methods, {wanted.seeds} seeds, "
        f"{trials} trials and a run each: {study.planned()} runs.",
        highlight=False,
        soft_wrap=True,
    )
    if not study.has_begun:
        console.print(
            f"By a step of plain training: {study.expected().said}. The first result says it "
            "better.",
            highlight=False,
            soft_wrap=True,
        )
    with saying(lambda: f"the same command goes on with {study.output}"):
        for sentence in study.carry_out(parallel, budget):
            console.print(sentence, highlight=False, soft_wrap=True)
    written = write_tables(study)
    print(written[0].read_text())
    console.print(overview(read_submission(written[1])), highlight=False)
    for path in written:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    if submit is not None:
        files.write(submit, written[1].read_bytes())
        console.print(f"to send in: {submit}", highlight=False, soft_wrap=True)
