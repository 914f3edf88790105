"""Beginning and resuming runs, wherever their clients are."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from fedpref import config
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.rounds import Event, events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.runs.trackers import tracked


def happenings(
    experiment: Experiment,
    folder: RunDirectory,
    cache: Path | None = None,
    admin: Path | None = None,
) -> Generator[Event, None, None]:
    """Run an experiment into its directory, or what is left of it, and yield what happens.

    Its trackers are told.

    Args:
        experiment: The experiment, which names its engine.
        folder: The run directory.
        cache: Where reference scores are kept; by default a folder of the run's own.
        admin: The kit of who submits to sites that have been started; a run that was submitted
            remembers it.

    Raises:
        UserError: Bad input, before anything is written.
    """
    told = _happenings(experiment, folder, cache, admin)
    return (
        tracked(told, experiment.report_to, experiment.name, config.dump(experiment), folder.path)
        if experiment.report_to
        else told
    )


def _happenings(
    experiment: Experiment, folder: RunDirectory, cache: Path | None, admin: Path | None
) -> Generator[Event, None, None]:
    if experiment.engine == "simulation":
        return events(experiment, folder, cache)
    try:
        from fedpref.sites.simulated import simulated
        from fedpref.sites.submitted import admin_of, submitted
    except ImportError as error:
        raise UserError(
            f"engine: flare needs NVIDIA FLARE ({error}). Install fedpref[flare]."
        ) from error
    if kit := admin or admin_of(folder):
        return submitted(experiment, kit, folder)
    return simulated(experiment, folder)
