"""Variants of one experiment by seeds, each run in a directory of its own.

What is done already is not done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedpref import config
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment, with_whole_paths
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import Event
from fedpref.experiments.run_directory import CONFIG, RunDirectory
from fedpref.runs.launch import happenings


def parse_variant(text: str) -> tuple[str, list[str]]:
    """Return a variant's name and overrides, from `NAME` or `NAME: key=value key=value`.

    A name alone is that of an algorithm; one of your own, `module:Class`, goes by its class.
    """
    name, colon, rest = text.partition(":")
    if config.CLASS.fullmatch(text):
        return rest, [f"algorithm={text}"]
    name = name.strip()
    if not name or "/" in name or "=" in name:
        raise UserError(f"--variant {text!r}: expected NAME, or NAME: key=value key=value.")
    return name, rest.split() if colon else [f"algorithm.name={name}"]


def plan(
    file: Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str],
    output: Path,
) -> Mapping[Path, Experiment]:
    """Return the experiment of each run directory, OUTPUT/VARIANT/seed-SEED.

    Raises:
        UserError: One does not fit; before the first begins.
    """
    experiments: dict[Path, Experiment] = {}
    for name, own in map(parse_variant, variants):
        for seed in seeds:
            experiment = Experiment.load(
                file, [*overrides, *own, f"seed={seed}", f"name={name}", "baselines=[]"]
            )
            path = output / name / f"seed-{seed}"
            if path in experiments:
                raise UserError(f"--variant {name!r} is there twice.")
            experiments[path] = experiment
    return experiments


def sweep(runs: Mapping[Path, Experiment], cache: Path) -> Iterator[tuple[Path, Iterator[Event]]]:
    """Yield each run that is not done yet, with its events; all share a cache.

    Events are to be consumed before the next run is asked for.

    Raises:
        UserError: A directory holds a run of other settings.
    """
    for path, experiment in runs.items():
        folder = RunDirectory(path)
        if (path / CONFIG).exists() and FinishedRun.at(path).experiment != with_whole_paths(
            experiment
        ):
            raise UserError(
                f"{path}: there is a run of other settings here. Choose another "
                "--output, or remove it."
            )
        if not folder.done:
            yield path, happenings(experiment, folder, cache)
