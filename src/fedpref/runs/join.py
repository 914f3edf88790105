"""Clients that join a finished run with data of their own."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedpref.data import IID, Files, Natural, Opinions
from fedpref.data.placed import label
from fedpref.data.source import PathSource
from fedpref.data.tables import read_table
from fedpref.errors import UserError
from fedpref.experiments.evaluations import evaluate, export
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.run_directory import JOINED
from fedpref.experiments.run_files import NEWCOMERS
from fedpref.federation.algorithm import Algorithm


@dataclass(frozen=True)
class Newcomer:
    """A client that joined a finished run.

    Attributes:
        train: Number of training examples.
        test: Number of held-out examples.
        before: Held-out metrics with the model as it found it.
        after: Held-out metrics after its own steps.
        path: The folder of its exported model.
    """

    train: int
    test: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    path: Path


def as_read(source: Any, data: Files, given: Collection[str] = ()) -> Any:
    """Return a source of other data: their file, with the run's settings where it read files.

    Where the run's data had a form of their own, as those of `shp`, others are read so unless they
    are in TRL's.

    Args:
        source: The run's.
        data: The others; what is given of them counts, and for the rest the run's does.
        given: What is given, beside what is not its default.
    """
    if isinstance(source, Opinions):
        said = _said(data, given)
        if unknown := said.keys() - {field.name for field in fields(source)}:
            raise UserError(
                f"data.{min(unknown)}: rows of opinions have no such setting. Leave it out."
            )
        return replace(source, **{**said, "path": data.path, "groups": "all"})
    if isinstance(source, Files):
        return replace(source.at(data.path), **_said(data, given))
    said = _said(data, given)
    own = {field.name for field in fields(source)}
    if isinstance(source, PathSource) and said.keys() <= own and not _is_of_trl(data):
        return replace(source, **{**said, "path": data.path})
    return replace(
        data,
        test_fraction=source.test_fraction,
        split_seed=source.split_seed,
    )


def _said(data: Files, given: Collection[str]) -> dict[str, Any]:
    """Return what is said of how rows are read: what is given, or is not the default."""
    default = Files(path=data.path)
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    return {
        name: value
        for name, value in values.items()
        if name in given or value != getattr(default, name)
    }


def _is_of_trl(data: Files) -> bool:
    """Return whether the first row has what TRL's formats have; False where it cannot be read."""
    try:
        with warnings.catch_warnings(action="ignore"):  # whoever reads all of it is told
            first = next(read_table(data.path, split=data.train_split, name=data.config), None)
    except UserError:
        return False
    wanted = ({data.chosen_column, data.rejected_column}, {data.completion_column})
    return first is None or any(columns <= first[1].keys() for columns in wanted)


def personalize(
    run: str | Path,
    data: Files,
    *,
    column: str | None = None,
    name: str | None = None,
    steps: int | None = None,
    given: Collection[str] = (),
) -> dict[str, Newcomer]:
    """Let clients join a run: they take what is shared and make what is private to them.

    What is shared stays as it is. Rows are read as the run's were, if these are of files, survey
    or the like: by the same columns, and held out by the same rule. Prompts that the run has
    trained on are held out for nobody.

    Args:
        run: The run directory.
        data: The newcomers' rows.
        column: Its values are the newcomers; without it there is one.
        name: The one newcomer's name; by default the file's.
        steps: Local steps; by default the run's `federation.join_steps`.
        given: Settings of the rows that count though they are the defaults.

    Returns:
        The newcomers by name. Their models go to RUN/newcomers/NAME.

    Raises:
        UserError: The run is not finished, or a name is taken; before anything is computed.
    """
    if column and name:
        raise UserError(
            f"--name {name!r}: newcomers are named by the column {column!r}. "
            "Leave one of the two out."
        )
    if name is not None and not name.strip():
        raise UserError("--name: the newcomer's name is empty. Leave it out to take the file's.")
    finished = FinishedRun.at(run).require_done()
    experiment = finished.experiment
    how = Natural(column=column) if column else IID(clients=1)
    # told apart as the run's prompts were, or those that it has trained on are not known again;
    # nothing is chosen by newcomers, for which rows would have to be set aside
    source = replace(
        as_read(experiment.data, data, given),
        split_by=experiment.data.split_by,
        validation_fraction=0.0,
    )
    # what the run's own training was chosen, promised or attacked by is not theirs
    spec = replace(
        experiment,
        data=source,
        partition=how,
        evaluate_on="test",
        stop=None,
        keep="last",
        privacy=None,
        secrecy=None,
        attack=None,
    )
    reading = spec.read(finished.trained_prompts or ()).settled()
    clients = reading.clients
    if reading.skipped:
        warnings.warn(f"{reading.skipped}.", stacklevel=2)
    if finished.trained_prompts is None and not isinstance(experiment.data, Opinions):
        warnings.warn(
            f"{run}: the run does not say which prompts it has trained on (it is older than "
            "fedpref 0.2, or its data stayed at sites), so that the newcomers' held-out prompts "
            "may be among them.",
            stacklevel=2,
        )
    if not column:
        # as names in a column are written
        called = label(name or Path(data.path).name.split(".")[0])
        if called is None:
            said = (
                f"the file's name {Path(data.path).name!r}" if name is None else f"--name {name!r}"
            )
            raise UserError(f"{said} names nobody. Give another one by --name.")
        clients = (replace(clients[0], name=called),)
    if taken := [client.name for client in clients if client.name in finished.clients]:
        raise UserError(f"{run}: {taken[:5]} took part in the run. Give another name.")
    folders = {client.name: finished.joined_folder(client.name) for client in clients}
    if taken := [client for client, folder in folders.items() if folder.exists()]:
        raise UserError(
            f"{run}: {taken[:5]} joined already. Give another name, or remove {folders[taken[0]]}."
        )
    with (
        finished.folder.alone(),
        tempfile.TemporaryDirectory() as cache,
        finished.opened(clients, Path(cache), spec=spec) as opened,
    ):
        engine = opened.engine
        algorithm: Algorithm[Any] = spec.algorithm
        before = engine.disclose(engine.each(evaluate, *opened.model))
        engine.begin(0, engine.clients, "join")
        local_steps = steps or spec.federation.join_steps
        model = algorithm.model(algorithm.join(engine, opened.state, local_steps))
        after = engine.disclose(engine.each(evaluate, *model))
        engine.each(export, JOINED, *model)
        shards = opened.shards
        joined = {}
        for i, (client, folder) in enumerate(folders.items()):
            sizes = len(shards[i].train), len(shards[i].test)
            joined[client] = one = Newcomer(*sizes, before[i], after[i], folder)
            row = {"client": client, "train": one.train, "test": one.test}
            finished.folder.append(NEWCOMERS, {**row, "before": one.before, "after": one.after})
    return joined
