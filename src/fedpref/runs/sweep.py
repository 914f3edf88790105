"""Variants of one experiment by seeds, each run in a directory of its own.

What is done already is not done again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fedpref import config
from fedpref.algorithms import AnyAlgorithm
from fedpref.engines.workers import can_fork
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment, with_whole_paths
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import Event
from fedpref.experiments.run_directory import CONFIG, RunDirectory
from fedpref.numerics import files
from fedpref.numerics.metrics import COMBINED, HEADLINES, low_is_good
from fedpref.runs.launch import happenings

FORK: Any = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
SWEEP = "sweep.json"  # in a sweep's folder: the experiment of each of its runs
SELECTED = "selected"  # in a sweep's folder: the variant that was chosen, on the test's rows
SELECTABLE = (*HEADLINES, COMBINED, "rewards/margins", "loss")
OWN = frozenset({SWEEP, SELECTED, "cache", "trials"})  # what else lies in a sweep's folder
ALGORITHMS = frozenset(kind.name for kind in config.kinds(AnyAlgorithm))
VALIDATION = 0.2  # of training prompts, by which a variant is chosen where nothing else is said


def members(path: Path) -> list[Path]:
    """Return the runs of a sweep's folder, or the path itself if it is none.

    What was chosen among them is no member: it is a variant once more, on other rows.
    """
    if not (path / SWEEP).is_file():
        return [path]
    return [path / name for name in _written(path)]


def is_sweep(path: Path) -> bool:
    """Return whether a folder is a sweep's."""
    return (path / SWEEP).is_file()


def _written(folder: Path) -> Mapping[str, Any]:
    """Return the settings of a sweep's runs, by folder."""
    runs: Mapping[str, Any] = _content(folder)["runs"]
    return runs


def _content(folder: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((folder / SWEEP).read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("runs"), dict):
        raise UserError(
            f"{folder / SWEEP}: this file is damaged; the sweep's own command writes it anew."
        )
    return content


def planned(folder: Path) -> Mapping[Path, Experiment]:
    """Return the experiments of a sweep that was begun, by run directory."""
    return {
        folder / name: config.parse(Experiment, content, f"{folder / SWEEP}: {name}")
        for name, content in _written(folder).items()
    }


def write_plan(runs: Mapping[Path, Experiment], folder: Path, select: str | None = None) -> None:
    """Write what a sweep consists of into its folder, so that it can be resumed and looked at.

    Args:
        runs: The experiment of each run directory.
        folder: The sweep's.
        select: The metric by which a variant is chosen, if one is.
    """
    content = {
        str(path.relative_to(folder)): config.dump(with_whole_paths(experiment))
        for path, experiment in runs.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / SWEEP, json.dumps({"select": select, "runs": content}, indent=1) + "\n")


def with_former(
    runs: Mapping[Path, Experiment], folder: Path, select: str | None
) -> Mapping[Path, Experiment]:
    """Return runs behind those of a sweep's folder that are done, which stay members of it.

    Args:
        runs: The experiment of each run directory.
        folder: The sweep's.
        select: The metric by which a variant is chosen, if one is.

    Raises:
        UserError: What is there is chosen by something else.
    """
    former = planned(folder) if is_sweep(folder) else {}
    kept = {path: one for path, one in former.items() if path not in runs and is_done(path)}
    if kept and selection(folder) != select:
        said = selection(folder)
        raise UserError(
            f"{folder}: its runs go by {f'--select {said}' if said else 'no --select'}. Say the "
            "same, or give another --output."
        )
    return {**kept, **runs}


def selecting(spec: Experiment, metric: str) -> list[str]:
    """Return the settings by which variants are measured on validation prompts.

    Raises:
        UserError: The metric is none by which a variant could be chosen.
    """
    if metric not in SELECTABLE:
        raise UserError(f"--select {metric!r}: expected one of {', '.join(SELECTABLE)}.")
    fraction = spec.data.validation_fraction or VALIDATION
    return ["evaluate_on=validation", f"data.validation_fraction={fraction}"]


def selection(folder: Path) -> str | None:
    """Return the metric by which a sweep's variant is chosen; None where none is."""
    metric = _content(folder).get("select")
    return None if metric is None else str(metric)


def chosen(folder: Path, metric: str) -> tuple[str, Mapping[Path, Experiment]]:
    """Return the best variant of a finished sweep, and its runs on the test's rows.

    The best has the best mean over clients and seeds. Its runs go into `selected`, in a
    folder of its name: another may be the best once there are more.

    Raises:
        UserError: The runs do not measure the metric.
    """
    means: dict[str, list[float]] = {}
    for path in members(folder):
        run = FinishedRun.at(path).require_done()
        summary = run.last_evaluation["summary"]
        if metric not in summary:
            raise UserError(f"--select {metric}: {path} does not measure it.")
        means.setdefault(run.experiment.name, []).append(summary[metric]["mean"])
    averages = {name: sum(values) / len(values) for name, values in means.items()}
    best = (min if low_is_good(metric) else max)(averages, key=averages.__getitem__)
    runs = {
        folder / SELECTED / path.relative_to(folder): replace(experiment, evaluate_on="test")
        for path, experiment in planned(folder).items()
        if experiment.name == best
    }
    return best, runs


Variant = tuple[str, Sequence[str]]  # a name, and overrides


def _apart(text: str, is_between: Callable[[str], bool]) -> list[str]:
    """Return the parts of a text between some letters; those within brackets belong to a part."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if depth <= 0 and is_between(letter):
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def with_grid(variants: Sequence[str | Variant], grid: Sequence[str]) -> list[Variant]:
    """Return each variant with each combination of a grid's values, as variants.

    Args:
        variants: See `plan`; none of them is the experiment as it is.
        grid: `key=a,b,c` each.

    Raises:
        UserError: A grid is none.
    """
    axes = []
    for text in grid:
        key, equals, values = text.partition("=")
        parts = _apart(values, lambda letter: letter == ",")
        if not equals or not key or len(parts) < 2:
            raise UserError(f"--grid {text!r}: expected KEY=VALUE,VALUE, two values at least.")
        axes.append([(key, value) for value in parts])
    made: list[Variant] = []
    for name, own in map(_variant, variants or [("", [])]):
        for chosen in product(*axes):
            said = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen)
            title = " ".join(filter(None, (name, said.replace("/", "-"))))
            made.append((title, [*own, *(f"{key}={value}" for key, value in chosen)]))
    return made


def _variant(one: str | Variant) -> Variant:
    return parse_variant(one) if isinstance(one, str) else one


def parse_variant(text: str) -> Variant:
    """Return a variant's name and overrides, from `NAME` or `NAME: key=value key=value`.

    A name alone is that of an algorithm; one of your own, `module:Class`, goes by its class. An
    algorithm's name before settings is that algorithm too, unless they name one.
    """
    name, colon, rest = text.partition(":")
    if config.CLASS.fullmatch(text):
        return rest, [f"algorithm={text}"]
    name = name.strip()
    if not name or ("=" in name and not colon):
        raise UserError(f"--variant {text!r}: expected NAME, or NAME: key=value key=value.")
    if "/" in name:
        raise UserError(f"--variant {text!r}: {name!r} is to be a folder's name. Leave out the /.")
    if name.startswith(".") or name.casefold() in OWN:
        raise UserError(
            f"--variant {text!r}: a sweep's folder has something else of that name. Call it "
            "otherwise."
        )
    settings = _apart(rest, str.isspace)
    is_named = any(re.match(r"algorithm(\.name)?=", one) for one in settings)
    is_one = not colon or (name in ALGORITHMS and not is_named)
    return name, [*([f"algorithm.name={name}"] if is_one else []), *settings]


def plan(
    file: Path,
    variants: Sequence[str | Variant],
    seeds: Sequence[int],
    overrides: Sequence[str],
    output: Path,
    *,
    redraws: bool = True,
) -> Mapping[Path, Experiment]:
    """Return the experiment of each run directory, OUTPUT/VARIANT/seed-SEED.

    Args:
        file: The experiment that all are variants of, as `Experiment.load` takes it.
        variants: Names with overrides, or texts as `parse_variant` reads them.
        seeds: Of each variant.
        overrides: Settings of all of them.
        output: Where they go.
        redraws: Each seed has a split of its own, the same for all variants, unless settings say
            which (`data.split_seed`).

    Raises:
        UserError: One does not fit; before the first begins.
    """
    experiments: dict[Path, Experiment] = {}
    # of data that grow, all variants have the same, and those of a sweep that was begun
    states = [one.data for one in planned(output).values()] if is_sweep(output) else []
    for name, own in map(_variant, variants):
        is_said = any(text.startswith("data.split_seed=") for text in (*overrides, *own))
        if seeded := [text for text in (*overrides, *own) if text.startswith("seed=")]:
            raise UserError(
                f"{seeded[0]}: a sweep's seeds are those from 0 on, and --seeds says how many. "
                "Leave it out."
            )
        if fixed := [text for text in own if text.startswith(("name=", "baselines="))]:
            raise UserError(
                f"{fixed[0]}: variants have names of their own, and no baselines. Leave it out."
            )
        for seed in seeds:
            split = [f"data.split_seed={seed}"] if redraws and not is_said else []
            # text, were it 1e-4 or null
            called = f"name={json.dumps(name, ensure_ascii=False)}"
            experiment = Experiment.load(
                file, [*split, *overrides, *own, f"seed={seed}", called, "baselines=[]"]
            )
            path = output / name / f"seed-{seed}"
            if path in experiments:
                raise UserError(f"--variant {name!r} is there twice.")
            data = experiment.data
            state = next((one for one in states if data.is_later_than(one)), data.at_its_state())
            if state != data:
                states.append(state)
                experiment = replace(experiment, data=state)
            experiments[path] = experiment
    return experiments


def sweep(runs: Mapping[Path, Experiment], cache: Path) -> Iterator[tuple[Path, Iterator[Event]]]:
    """Yield each run that is not done yet, with its events; all share a cache.

    Events are to be consumed before the next run is asked for.

    Raises:
        UserError: A directory holds a run of other settings.
    """
    for path, experiment, folder in _left(runs):
        yield path, happenings(experiment, folder, cache)


def side_by_side(
    runs: Mapping[Path, Experiment], cache: Path, parallel: int
) -> Iterator[tuple[Path, str]]:
    """Do what is left of a sweep, some runs at a time; yield each that is over, and why it failed.

    Each is a process of its own, with its share of the machine's processors; what is computed once
    is shared by all. One that fails ends with a sentence, or empty for none, and the others go on.

    Args:
        runs: The experiment of each run directory.
        cache: Where what is computed once is kept.
        parallel: How many at a time.

    Raises:
        UserError: A directory holds a run of other settings, or processes cannot be forked here.
    """
    if not can_fork():
        raise UserError("--parallel: runs side by side need processes that fork, as on Linux.")
    waiting = _left(runs)
    places = list(range(parallel))
    running: dict[Any, tuple[Path, Any, int]] = {}
    try:
        while waiting or running:
            while waiting and places:
                path, experiment, folder = waiting.pop(0)
                place, (mine, theirs) = places.pop(0), FORK.Pipe(duplex=False)
                process = FORK.Process(
                    target=_member, args=(experiment, folder, cache, (place, parallel), theirs)
                )
                process.start()
                theirs.close()
                running[mine] = path, process, place
            ready: Any = wait(list(running))
            for ended in ready:
                path, process, place = running.pop(ended)
                try:
                    said = str(ended.recv())
                except EOFError:
                    said = "its process has died, perhaps for want of memory"
                process.join()
                places.append(place)
                yield path, said
    finally:
        for _, process, _ in running.values():
            process.terminate()


def _member(
    experiment: Experiment, folder: RunDirectory, cache: Path, share: tuple[int, int], end: Any
) -> None:
    """Run one of a sweep's in this process, and send what it has to say."""
    place, parallel = share
    if hasattr(os, "sched_setaffinity"):
        all_of_them = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(
            0, all_of_them[place::parallel] or [all_of_them[place % len(all_of_them)]]
        )
    try:
        for _ in happenings(experiment, folder, cache):
            pass
    except KeyboardInterrupt:
        pass  # who began it says how to go on
    except UserError as error:
        end.send(str(error))
    except Exception:
        end.send(traceback.format_exc())
    else:
        end.send("")


def unfinished(runs: Mapping[Path, Experiment]) -> dict[Path, Experiment]:
    """Return what of a sweep is not done; raises UserError where other runs are in the way."""
    return {path: experiment for path, experiment, _ in _left(runs)}


def _left(runs: Mapping[Path, Experiment]) -> list[tuple[Path, Experiment, RunDirectory]]:
    """Return what is not done yet; raises UserError where other runs are in the way."""
    left = []
    for path, experiment in runs.items():
        found = FinishedRun.at(path) if (path / CONFIG).exists() else None
        if found and found.experiment != with_whole_paths(experiment):
            raise UserError(
                f"{path}: there is a run of other settings here. Choose another "
                "--output, or remove it; a sweep goes on by `fedpref resume`."
            )
        if not found or not found.is_finished:
            left.append((path, experiment, RunDirectory(path)))
    return left


def is_done(path: Path) -> bool:
    """Return whether a run has ended, with the baselines that stand beside it."""
    return (path / CONFIG).exists() and FinishedRun.at(path).is_finished
