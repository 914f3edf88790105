"""What one calls from Python: run an experiment on rows in memory or elsewhere, and look at it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from fedpref import config
from fedpref.data import Files
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import Event, new_directory
from fedpref.experiments.run_directory import ROWS, RunDirectory
from fedpref.experiments.run_files import METRICS
from fedpref.models.loading import load_model
from fedpref.numerics.metrics import HEADLINES, ClientMetrics, headline
from fedpref.reports.page import REPORT, write_report
from fedpref.reports.paired import sentences
from fedpref.reports.progress import show
from fedpref.reports.tables import sizes
from fedpref.runs.launch import happenings

if TYPE_CHECKING:
    from pandas import DataFrame

MOST_MB = 256  # of rows that are given in memory
SPLIT = "split"  # the column that says which split of several a row was in
OnEvent = Callable[[Event], Any]


@dataclass(frozen=True)
class Result:
    """What a run came to; a notebook shows it as a table.

    Attributes:
        path: The run directory.
        evaluations: For each line, each client's held-out metrics, by name.
        newcomers: For each line, the metrics of clients that joined after training, with the model
            as they find it, and after their own steps.
    """

    path: Path
    evaluations: Mapping[str, ClientMetrics]
    newcomers: Mapping[str, tuple[ClientMetrics, ClientMetrics]]

    @staticmethod
    def at(path: str | Path) -> Result:
        """Return what a finished run came to.

        Args:
            path: The run directory.

        Raises:
            UserError: There is no run, or it is not finished.
        """
        outcome = FinishedRun.at(path).result()
        return Result(outcome.path, outcome.evaluations, outcome.newcomers)

    def table(self) -> DataFrame:
        """Return every client's held-out metrics as a DataFrame.

        It has a row for each line and client, with columns `line`, `client`, `train` and `test`,
        which count examples, and one for each metric.
        """
        import pandas

        counts = sizes(self.path)
        return pandas.DataFrame(
            [
                {"line": line, "client": name, **_counts(counts[name]), **metrics}
                for line, clients in self.evaluations.items()
                for name, metrics in clients.items()
            ]
        )

    def rounds(self, line: str | None = None) -> DataFrame:
        """Return what was measured in each round of training, a row a round.

        Args:
            line: Of which line; by default the algorithm's own.

        Raises:
            UserError: The run has no line of this name.
        """
        import pandas

        run = FinishedRun.at(self.path)
        name = line or run.experiment.algorithm.name
        if name not in run.lines:
            raise UserError(
                f"{self.path}: the run has no line {name!r}; its lines are {', '.join(run.lines)}."
            )
        return pandas.DataFrame(run.lines[name].read_rows(METRICS))

    def report(self, output: str | Path | None = None) -> Path:
        """Write the run's page, one HTML file, and return where it is.

        Args:
            output: The file; by default report.html in the run directory.
        """
        return write_report([self.path], Path(output or self.path / REPORT))

    @cached_property
    def models(self) -> Mapping[str, Any]:
        """Each client's model by name, loaded when it is asked for: a PEFT model that generates.

        Where clients share one model, each has that.
        """
        return _Models(FinishedRun.at(self.path))

    def _repr_html_(self) -> str:
        """Return the clients' headline metric under each line, for a notebook."""
        main = next(iter(self.evaluations))
        if not self.evaluations[main]:
            return (
                "<p>Clients' figures are not told one by one; the page shows what is told.</p>"
                f"<p>run directory: <code>{escape(str(self.path))}</code></p>"
            )
        metric = headline(next(iter(self.evaluations[main].values())))
        shown, counts = HEADLINES[metric], sizes(self.path)
        names = sorted(self.evaluations[main], key=lambda name: (-counts[name]["train"], name))
        head = ["client", "training", "held out", *self.evaluations]
        rows = [
            [
                name,
                *map(str, _counts(counts[name]).values()),
                *(
                    shown.text(clients[name][metric]) if name in clients else ""
                    for clients in self.evaluations.values()
                ),
            ]
            for name in names
        ]
        means = [
            shown.text(sum(row[metric] for row in clients.values()) / len(clients))
            for clients in self.evaluations.values()
        ]
        said = "".join(f"<p>{escape(sentence)}.</p>" for sentence in sentences(self.path))
        return (
            f"<table><caption>held-out {escape(shown.caption)}</caption>"
            f"<thead>{_row('th', head)}</thead>"
            f"<tbody>{''.join(_row('td', row) for row in rows)}</tbody>"
            f"<tfoot>{_row('th', ['mean', '', '', *means])}</tfoot></table>"
            f"{said}<p>run directory: <code>{escape(str(self.path))}</code></p>"
        )


def _counts(about: Mapping[str, int]) -> dict[str, int]:
    return {side: about[side] for side in ("train", "test")}


def _row(cell: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in texts) + "</tr>"


class _Models(Mapping[str, Any]):
    def __init__(self, run: FinishedRun) -> None:
        self._run = run

    def __getitem__(self, client: str) -> Any:
        if client not in self._run.clients and client not in self._run.joined:
            raise KeyError(f"{client!r}; the clients are {list(self)[:12]}")
        return load_model(
            self._run.model_folder(client),
            trust_remote_code=self._run.experiment.task.runs_remote_code,
        )

    def __contains__(self, client: object) -> bool:  # without loading it
        return client in self._run.clients or client in self._run.joined

    def __iter__(self) -> Iterator[str]:
        return iter([*self._run.clients, *self._run.joined])

    def __len__(self) -> int:
        return len(self._run.clients) + len(self._run.joined)


def run(
    experiment: Experiment | str | Path | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    *,
    data: Any = None,
    model: Any = None,
    on_event: OnEvent | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Result:
    """Run an experiment from the beginning and return what came of it.

    Args:
        experiment: An `Experiment`, a YAML file, the name of a config that comes with fedpref, or
            keys and values as in a YAML file. Without it, all settings have their defaults.
        output: The new run directory; by default runs/NAME-TIME.
        data: The rows, in place of the experiment's: a list of dicts, a pandas DataFrame, a Dataset
            or DatasetDict of Hugging Face, which are written into the run directory; or the path of
            a file, a folder or a Hub dataset; or a source such as `fedpref.data.Files(...)`.
        model: The model, in place of the experiment's: a Hub id or folder, or a `Model`; keys and
            values change what the experiment says of its own.
        on_event: Called with each `Event`, as it happens.
        progress: Show how far it is; by default on terminals and in notebooks.
        **settings: Other keys of an experiment, as plain values or as fedpref's own objects:
            `algorithm=FedPDPO(...)`, `rounds=5`, `partition={"name": "iid", "clients": 4}`. Keys
            and values change what the experiment says, as those of the command line do; an object
            stands in its place.

    Raises:
        UserError: The directory is there already, or the experiment does not fit its data or model.
    """
    if output is not None and not isinstance(output, str | Path):
        raise UserError(f"output: expected a path, found {output!r:.60}.")
    spec = _with(_read(experiment), model, settings)
    # what its config could not say again could not be resumed, compared or reported
    spec = config.parse(Experiment, config.dump(spec), "the experiment")
    folder = new_directory(spec, output)
    folder.refuse_existing()
    if data is None:
        return _followed(spec, folder, on_event, progress)
    if isinstance(data, str | Path):
        data = _files(spec.data, str(data))
    if hasattr(data, "read") and hasattr(data, "with_paths"):
        return _followed(replace(spec, data=data), folder, on_event, progress)
    text, columns = _lines(data)
    file = folder.path / ROWS
    try:
        file.parent.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder.path}: the folder cannot be made: {error}") from error
    try:
        file.write_text(text, encoding="utf-8")
        source = _files(spec.data, str(file.resolve()), SPLIT if SPLIT in columns else None)
        return _followed(replace(spec, data=source), folder, on_event, progress)
    finally:
        # nothing has begun: the rows are the caller's still
        if not folder.has_begun:
            shutil.rmtree(folder.path, ignore_errors=True)


def _files(source: Any, path: str, split_column: str | None = None) -> Files:
    """Return a file or folder as a source, with what an experiment says of how files are read."""
    if not isinstance(source, Files):
        return Files(path=path, split_column=split_column)
    return replace(source.at(path), split_column=split_column or source.split_column)


def resume(
    path: str | Path, *, on_event: OnEvent | None = None, progress: bool | None = None
) -> Result:
    """Resume a run where it was left; it ends with the bits it would have ended with.

    Args:
        path: The run directory.
        on_event: Called with each `Event`, as it happens.
        progress: Show how far it is; by default on terminals and in notebooks.

    Raises:
        UserError: There is no run, or one that cannot go on.
    """
    run = FinishedRun.at(path)
    return _followed(run.experiment, run.folder, on_event, progress)


def report(runs: Sequence[Result | str | Path], output: str | Path) -> Path:
    """Write one page about several runs, or a sweep, and return where it is.

    Args:
        runs: Results, run directories, or folders of sweeps.
        output: The HTML file.

    Raises:
        UserError: There is nothing to show.
    """
    paths = [run.path if isinstance(run, Result) else Path(run) for run in runs]
    return write_report(paths, Path(output))


def _followed(
    experiment: Experiment, folder: RunDirectory, on_event: OnEvent | None, progress: bool | None
) -> Result:
    console = Console(markup=False, emoji=False)
    # whoever keeps the error of a callback, as notebooks do, does not keep the run's lock
    with closing(happenings(experiment, folder)) as events:
        told = _told(events, on_event)
        if console.is_terminal or console.is_jupyter if progress is None else progress:
            show(told, console)
        else:
            for _ in told:
                pass
    return Result.at(folder.path)


def _told(events: Iterator[Event], on_event: OnEvent | None) -> Iterator[Event]:
    for event in events:
        if on_event:
            on_event(event)
        yield event


def _read(experiment: Experiment | str | Path | Mapping[str, Any] | None) -> Experiment:
    if isinstance(experiment, Experiment):
        return experiment
    if isinstance(experiment, str | Path):
        return Experiment.load(experiment)
    return Experiment.of(experiment or {})


def _with(spec: Experiment, model: Any, settings: Mapping[str, Any]) -> Experiment:
    """Return an experiment with other settings, as plain values or as objects."""
    spec = _with_settings(spec, settings)
    if isinstance(model, Mapping):
        known_so_far = config.dump(spec)
        task = known_so_far["task"]
        model = {**task["model"], **model}
        return Experiment.of({**known_so_far, "task": {**task, "model": model}})
    if model is not None and "task" in settings and _says_model(settings["task"]):
        raise UserError("model: task says a model too. Give one of the two.")
    if model is not None:
        path = str(model) if isinstance(model, str | Path) else None
        kinds: Any = spec.task
        chosen = model if path is None else replace(kinds.model, path=path)
        spec = replace(spec, task=replace(kinds, model=chosen))
    return spec


def _says_model(task: Any) -> bool:
    return isinstance(task, Mapping) and "model" in task


def _with_settings(spec: Experiment, settings: Mapping[str, Any]) -> Experiment:
    if not settings:
        return spec
    known = {field.name for field in fields(Experiment)}
    objects = {
        name: value
        for name, value in settings.items()
        if name in known and not isinstance(value, str | Mapping) and hasattr(value, "name")
    }
    plain = {name: value for name, value in settings.items() if name not in objects}
    return replace(Experiment.of(config.merged(Experiment, config.dump(spec), plain)), **objects)


def _lines(data: Any) -> tuple[str, set[str]]:
    """Return rows in memory as JSON Lines, and their columns.

    Raises:
        UserError: They are none, are too many, or one cannot be written.
    """
    rows: list[Any] = []
    if isinstance(data, Mapping):  # splits, such as those of a DatasetDict
        for split, part in data.items():
            for row in _records(part):
                if not isinstance(row, Mapping):
                    raise UserError(
                        f"data, split {split!r}: expected dicts by column, found {row!r:.60}. A "
                        "dict of columns becomes rows by datasets.Dataset.from_dict."
                    )
                rows.append({**row, SPLIT: split})
    else:
        rows = _records(data)
    written, columns, size = [], set[str](), 0
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UserError(f"data, row {number}: expected a dict by column, found {row!r:.60}.")
        try:
            written.append(json.dumps(dict(row), ensure_ascii=False, default=_plain))
            written[-1].encode()  # half a character could be written nowhere
        except (TypeError, ValueError) as error:
            raise UserError(f"data, row {number}: cannot be written as JSON: {error}.") from error
        columns |= row.keys()
        size += len(written[-1])
        if size > MOST_MB * 10**6:
            raise UserError(
                f"data: rows of more than {MOST_MB} MB are not copied into a run directory. Write "
                "them to a file, as with Dataset.to_parquet, and give its path."
            )
    if not written:
        raise UserError("data: there is no row.")
    return "\n".join(written) + "\n", columns


def _plain(value: Any) -> Any:
    """Return a number of numpy, or a date, as JSON has them; raises TypeError for anything else."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, date):  # also a time
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__}")


def _records(data: Any) -> list[Any]:
    if hasattr(data, "to_json") and hasattr(data, "columns"):  # a DataFrame
        try:
            text = data.to_json(orient="records", date_format="iso", double_precision=15)
            return list(json.loads(text))
        except (ValueError, OverflowError) as error:
            raise UserError(f"data: the DataFrame cannot be written: {error}") from error
    if hasattr(data, "with_format"):  # a Dataset, which may give arrays
        data = data.with_format(None)
    try:
        return list(data)
    except TypeError:
        raise UserError(
            "data: expected a list of dicts, a DataFrame, a Dataset, a path or a source of "
            f"fedpref, found {type(data).__name__}."
        ) from None
