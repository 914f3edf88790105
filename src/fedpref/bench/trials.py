"""Carrying a suite out: trials on validation prompts, then each method once on the test's."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedpref.bench.costs import Cost, duration, expected, processor_seconds
from fedpref.bench.suites import DataSet, Suite
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.lines import batches_of_pooled
from fedpref.numerics import files
from fedpref.runs.sweep import (
    Variant,
    chosen,
    is_done,
    parse_variant,
    plan,
    planned,
    selecting,
    side_by_side,
    sweep,
    unfinished,
    with_grid,
    write_plan,
)

TRIALS = "trials"
COSTS = "costs.json"  # in a set's folder
RATE = "algorithm.local.learning_rate"
ACCUMULATED = "algorithm.local.gradient_accumulation_steps"


@dataclass(frozen=True)
class Study:
    """A suite in a folder of its own, which goes on where it was.

    Attributes:
        suite: What is carried out.
        output: The folder.
        data: Where local tables lie; None reads sets by their Hub ids.
        overrides: Settings of everything, as of the model.
    """

    suite: Suite
    output: Path
    data: Path | None = None
    overrides: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        """The methods' names, in the order of the suite."""
        return [parse_variant(text)[0] for text in self.suite.methods]

    def trials(self, data: DataSet, method: str, seed: int) -> Mapping[Path, Experiment]:
        """Return the trials of a method: every rate, on the seed's validation prompts."""
        spec = self._experiment(data, method)
        variants = with_grid([self._variant(data, method)], [self._grid])
        where = [*self._settings(data), *selecting(spec, self.suite.metric)]
        return plan(Path(data.config), variants, [seed], where, self._trials(data, method, seed))

    def _experiment(self, data: DataSet, method: str) -> Experiment:
        _, own = self._variant(data, method)
        return Experiment.load(Path(data.config), [*self._settings(data), *own])

    def _variant(self, data: DataSet, method: str) -> Variant:
        """Return a method with its overrides; one that pools data sees as much as all clients."""
        name, own = parse_variant(self.suite.methods[self.methods.index(method)])
        spec = Experiment.load(Path(data.config), [*self._settings(data), *own])
        if spec.algorithm.pools_data and not any(text.startswith(ACCUMULATED) for text in own):
            batches = batches_of_pooled(spec, len(spec.clients()[0]))
            own = [*own, f"{ACCUMULATED}={batches}"]
        return name, own

    def _settings(self, data: DataSet) -> list[str]:
        return [*data.overrides(self.data), *self.overrides]

    @property
    def _grid(self) -> str:
        return f"{RATE}={','.join(self.suite.rates)}"

    def _trials(self, data: DataSet, method: str, seed: int) -> Path:
        return self.output / data.name / TRIALS / method / f"seed-{seed}"

    def run(self, data: DataSet, method: str, seed: int) -> tuple[Path, Experiment]:
        """Return the run of a method on the test's prompts, with what its trials have chosen."""
        _, runs = chosen(self._trials(data, method, seed), self.suite.metric)
        (experiment,) = runs.values()
        path = self.output / data.name / method / f"seed-{seed}"
        is_first = method == self.methods[0]
        baselines = self.suite.free if is_first else ()
        return path, replace(experiment, name=method, baselines=baselines)

    def planned(self) -> int:
        """Return how many runs there are in all, trials too."""
        each = len(self.suite.rates) + 1
        return len(self.suite.sets) * len(self.suite.methods) * self.suite.seeds * each

    def check(self) -> None:
        """Read the settings of all methods, before hours are spent on the first.

        Raises:
            UserError: Some do not fit.
        """
        for data in self.suite.sets:
            for method in self.methods:
                self._experiment(data, method)

    def carry_out(self, parallel: int = 1, hours: float | None = None) -> Iterator[str]:
        """Do what is left, and yield what happens, in sentences.

        Seeds come one after the other, so that what is cut short has all methods of some seeds.

        Args:
            parallel: Runs at a time.
            hours: Begin nothing new after so many.

        Raises:
            UserError: A run failed, or settings do not fit.
        """
        self.check()
        begun, made, total = time.monotonic(), 0, self.planned()
        for seed in range(self.suite.seeds):
            for data in self.suite.sets:
                for method in self.methods:
                    if hours is not None and time.monotonic() - begun > 3600 * hours:
                        yield f"{hours:g} hours are over; the same command goes on."
                        return
                    trials = self.trials(data, method, seed)
                    unfinished(trials)  # another study's are refused before anything is written
                    write_plan(trials, self._trials(data, method, seed), self.suite.metric)
                    new = self._do(trials, data, parallel)
                    path, experiment = self.run(data, method, seed)
                    new += self._do({path: experiment}, data)
                    made, total = made + new, total - (len(trials) + 1 - new)
                    self.keep(data)
                    if new:
                        left = (time.monotonic() - begun) / made * (total - made)
                        rate = experiment.algorithm.local.learning_rate
                        yield (
                            f"{data.name}, {method}, seed {seed}: rate {rate:g} chosen of "
                            f"{len(trials)}; about {duration(left)} left"
                        )

    def _do(self, runs: Mapping[Path, Experiment], data: DataSet, parallel: int = 1) -> int:
        """Carry out what is not done of some runs, and return how many these were.

        What each takes is kept over sessions, unless one of these is killed.

        Raises:
            UserError: A run failed, or one of other settings is in its place.
        """
        cache = self.output / data.name / "cache"
        left = unfinished(runs)
        costs = self.costs(data)
        before = {path: costs.get(self._place(path, data)) for path in left}
        # what a session took that was killed nobody knows
        before |= {path: 0.0 for path in left if not path.exists()}
        self._write_costs(data, dict.fromkeys(left))
        if parallel > 1 and len(left) > 1:
            ended = side_by_side(left, cache, parallel)
            for _ in left:
                with processor_seconds() as took:
                    path, why = next(ended)
                self._write_costs(data, {path: _sum(before[path], took[0])})
                if why:
                    raise UserError(f"{path}: {why}")
        else:
            for path, events in sweep(left, cache):
                try:
                    with processor_seconds() as took:
                        for _ in events:
                            pass
                finally:
                    self._write_costs(data, {path: _sum(before[path], took[0])})
        return len(left)

    def _write_costs(self, data: DataSet, costs: Mapping[Path, float | None]) -> None:
        """Write what runs have taken, beside what is there."""
        named = {self._place(path, data): seconds for path, seconds in costs.items()}
        whole = {**self.costs(data), **named}
        files.write(self.output / data.name / COSTS, json.dumps(whole, indent=1) + "\n")

    def _place(self, path: Path, data: DataSet) -> str:
        """Return a run's folder within that of its set."""
        return path.relative_to(self.output / data.name).as_posix()

    def costs(self, data: DataSet) -> dict[str, float | None]:
        """Return processor seconds of runs and trials, by their folder within the set's.

        None is of one of which a part is not known.
        """
        file = self.output / data.name / COSTS
        found: dict[str, float | None] = json.loads(file.read_text()) if file.is_file() else {}
        return found

    @property
    def has_begun(self) -> bool:
        """Whether anything was done."""
        return any(self.costs(data) for data in self.suite.sets)

    def expected(self) -> Cost:
        """Return what all runs together would cost, were all methods as cheap as plain averaging.

        Raises:
            UserError: A set or the model cannot be read.
        """
        runs = len(self.suite.methods) * self.suite.seeds * (len(self.suite.rates) + 1)
        total = Cost()
        for data in self.suite.sets:
            total += expected(Experiment.load(Path(data.config), self._settings(data)), runs)
        return total

    def keep(self, data: DataSet) -> bool:
        """Write which of a set's runs are there, so that they are looked at as a sweep.

        Returns:
            Whether there are any: all methods of one seed.
        """
        done: dict[Path, Experiment] = {}
        for seed in range(self.suite.seeds):
            runs = {
                method: self.output / data.name / method / f"seed-{seed}" for method in self.methods
            }
            # of a seed all methods or none: gains are of pairs
            if all(is_done(path) for path in runs.values()):
                done |= {path: self.run(data, method, seed)[1] for method, path in runs.items()}
        if done:
            write_plan(done, self.output / data.name)
        return bool(done)

    def refuse_others(self, data: DataSet) -> None:
        """Raise UserError where a run or a trial of other settings is in the place of one here."""
        for seed in range(self.suite.seeds):
            for method in self.methods:
                unfinished(self.trials(data, method, seed))
                if is_done(self.output / data.name / method / f"seed-{seed}"):
                    unfinished(dict([self.run(data, method, seed)]))

    def chosen_rates(self, data: DataSet) -> dict[str, list[float]]:
        """Return the rates that were chosen for each method, by seed, of what is done."""
        rates: dict[str, list[float]] = {}
        for path, experiment in planned(self.output / data.name).items():
            rates.setdefault(path.parent.name, []).append(experiment.algorithm.local.learning_rate)
        return rates


def _sum(before: float | None, seconds: float) -> float | None:
    return None if before is None else before + seconds
