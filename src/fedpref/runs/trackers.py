"""Experiment trackers, which are told a run's metrics as they come.

None is required, and none is asked to leave this machine.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedpref.errors import UserError
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import Event, evaluated
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import EVALUATION, METRICS

# what trackers would tell their makers
SILENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}


class Tracker(Protocol):
    """Who is told metrics."""

    def log(self, round: int, figures: Mapping[str, float]) -> None:
        """Take the metrics of a round."""
        ...

    def close(self, done: bool) -> None:
        """End: the run is done, or has failed or was stopped."""
        ...


def tracked(
    happenings: Iterator[Event],
    names: tuple[str, ...],
    project: str,
    content: Mapping[str, Any],
    folder: Path,
) -> Generator[Event, None, None]:
    """Yield the same events, and tell trackers what they say.

    Metrics go under LINE/METRIC, an evaluation's under LINE/held_out/METRIC, or
    LINE/validation/METRIC where it is of rows that are set aside to choose by.
    """
    require_trackers(names)
    trackers: list[Tracker] = []
    done = False
    try:
        for event in happenings:
            if not trackers:  # now that the run has a directory
                trackers = [TRACKERS[name](project, folder, content) for name in names]
                for earlier in _last_told(folder, event) if names else ():
                    _log(trackers, earlier)
            _log(trackers, event)
            yield event
        done = True
    finally:
        for tracker in trackers:
            tracker.close(done)


def _log(trackers: Iterable[Tracker], event: Event) -> None:
    if event.kind not in ("round", "evaluate"):
        return
    where = "validation" if event.chooses else "held_out"
    prefix = event.line if event.kind == "round" else f"{event.line}/{where}"
    figures = {f"{prefix}/{name}": value for name, value in event.metrics.items()}
    for tracker in trackers:
        tracker.log(event.done, figures)


def _last_told(folder: Path, first: Event) -> Iterator[Event]:
    """Yield the last round of each line that a run which goes on has behind it.

    It is in a checkpoint, and whoever was killed then may not have told it.
    """
    if not RunDirectory(folder).has_begun:
        return
    for name, line in FinishedRun.at(folder).lines.items():
        rows = line.read_rows(METRICS) if line.path.exists() else []
        is_told = first.kind in ("round", "evaluate") and name == first.line
        if not rows or (is_told and rows[-1]["round"] >= first.done):
            continue
        last, total = rows[-1], first.total
        figures = {k: v for k, v in last.items() if k not in ("round", "clients", "late")}
        yield Event(name, "round", last["round"], total, figures)
        for row in line.read_rows(EVALUATION):
            if row["round"] == last["round"]:
                yield evaluated(name, total, row)


def require_trackers(names: Iterable[str]) -> None:
    """Raise UserError where a tracker is not installed."""
    for name in names:
        _module(name)


def _module(name: str) -> Any:
    for key, value in SILENT.items():
        os.environ.setdefault(key, value)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"report_to: {name} is not installed ({error}). `pip install {name}`, or leave it out."
        ) from error


class TensorBoard:
    """Event files in RUN/tensorboard, a folder for each line, so that lines lie over one another.

    What a resumed run does again replaces what stood there.
    """

    def __init__(self, project: str, folder: Path, content: Mapping[str, Any]) -> None:
        self._folder = folder / "tensorboard"
        self._writers: dict[str, Any] = {}

    def log(self, round: int, figures: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for name, value in figures.items():
            line, metric = name.split("/", 1)
            if line not in self._writers:
                self._writers[line] = SummaryWriter(str(self._folder / line), purge_step=round)
            self._writers[line].add_scalar(metric, value, round)

    def close(self, done: bool) -> None:
        for writer in self._writers.values():
            writer.close()


class WandB:
    """Weights & Biases, offline unless WANDB_MODE says otherwise; its files are in RUN/wandb."""

    def __init__(self, project: str, folder: Path, content: Mapping[str, Any]) -> None:
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = _module("wandb").init(
            project=project, name=folder.name, dir=str(folder), config=dict(content), mode=mode
        )
        # wandb's own steps only go up, and each line begins at round 1
        self._run.define_metric("*", step_metric="round")

    def log(self, round: int, figures: Mapping[str, float]) -> None:
        self._run.log({"round": round, **figures})

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class MLflow:
    """MLflow, in RUN/mlflow.db and RUN/mlruns unless MLFLOW_TRACKING_URI says otherwise."""

    def __init__(self, project: str, folder: Path, content: Mapping[str, Any]) -> None:
        self._mlflow = _module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._mlflow.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
            if self._mlflow.get_experiment_by_name(project) is None:
                self._mlflow.create_experiment(
                    project, artifact_location=(folder.resolve() / "mlruns").as_uri()
                )
        self._mlflow.set_experiment(project)
        self._mlflow.start_run(run_name=folder.name)
        self._mlflow.log_dict(dict(content), "config.json")

    def log(self, round: int, figures: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(figures), step=round)

    def close(self, done: bool) -> None:
        self._mlflow.end_run("FINISHED" if done else "FAILED")


class Trackio:
    """Trackio's local store."""

    def __init__(self, project: str, folder: Path, content: Mapping[str, Any]) -> None:
        self._trackio = _module("trackio")
        self._trackio.init(project=project, name=folder.name, config=dict(content))

    def log(self, round: int, figures: Mapping[str, float]) -> None:
        self._trackio.log(dict(figures), step=round)

    def close(self, done: bool) -> None:
        self._trackio.finish()


TRACKERS: Mapping[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
