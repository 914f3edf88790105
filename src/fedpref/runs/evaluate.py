"""What a finished run's models make of any other preferences."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from fedpref.data import ClientData, Files, Row
from fedpref.data.placed import Placed
from fedpref.data.unusable import Unusable, summary
from fedpref.errors import UserError
from fedpref.experiments.evaluations import evaluate as evaluate_client
from fedpref.experiments.finished import FinishedRun
from fedpref.runs.join import as_read

SHARED = "shared"


def evaluate(
    run: str | Path,
    data: Files,
    client: str | None = None,
    column: str | None = None,
    given: Collection[str] = (),
) -> dict[str, Mapping[str, float]]:
    """Measure a run's models on any preferences.

    Nothing keeps rows out that the run has trained on.

    Args:
        run: The run directory.
        data: The preferences, of which all rows are used. What is not given of them, such as
            columns' names, is as in the run.
        client: Whose model is asked; by default the one that all share, or each client's own.
        column: Says whose a row is: each client's model is measured on the client's own rows.
        given: Settings of the rows that count though they are the defaults.

    Returns:
        Metrics by client, or under `shared`.

    Raises:
        UserError: The run is not finished, has no such client, or has trained no language model;
            there are no rows; both `client` and `column` are given.
    """
    finished = FinishedRun.at(run).require_done()
    if client is not None and column is not None:
        raise UserError(
            "--client and --column: give one of them; with a column every client is asked about "
            "its own rows."
        )
    finished.refuse_opinions()
    known = list(finished.clients)
    source = as_read(finished.experiment.data, data, given)
    if isinstance(source, Files):
        source = replace(
            source,
            only=data.only,
            train_split=data.train_split,
            test_split=None,
            split_column=None,
        )
    read = list(source.read())
    unusable = [row for row in read if isinstance(row, Unusable)]
    rows: tuple[Row, ...] = tuple(
        replace(row, side="test") for row in read if not isinstance(row, Unusable)
    )
    if unusable and source.unusable == "refuse":
        raise UserError(summary(unusable, len(read)))
    if unusable:
        warnings.warn(f"{len(unusable)} of {len(read)} rows cannot be used.", stacklevel=2)
    if not rows:
        raise UserError(f"{data.path}: there are no rows.")
    groups = {SHARED: rows}
    if column:
        placed = Placed.of((("test", row) for row in rows), column)
        groups = {
            name: tuple(placed.take(places).rows("test"))
            for name, places in sorted(placed.groups(column).items())
        }
    asked = list(groups) if column else known if client is None else [client]
    if unknown := [name for name in asked if name not in known]:
        raise UserError(
            f"{run}: there is no client {unknown[0]!r}; the clients are {known[:12]}. "
            "Those that joined later were measured then."
        )
    task = finished.experiment.task.evaluating(len(rows))
    own = replace(finished.experiment.data, unusable=source.unusable)
    spec = replace(finished.experiment, task=task, data=own)
    # with several objectives, a task looks for examples of each among the training rows too
    both = len(task.objectives) > 1
    clients = [ClientData(name, some if both else (), some) for name, some in groups.items()]
    with (
        tempfile.TemporaryDirectory() as cache,
        finished.opened(clients, Path(cache), spec=spec, known=known) as opened,
    ):
        is_shared = all(isinstance(part, Mapping) for part in opened.model)
        is_one = is_shared and client is None and column is None
        cohort = [0] if is_one else sorted(known.index(name) for name in asked)
        opened.engine.begin(0, cohort, "evaluate")
        measured = opened.engine.disclose(opened.engine.each(evaluate_client, *opened.model))
    return {SHARED if is_one else known[i]: metrics for i, metrics in measured.items()}
