"""What a run of 100,000 clients costs beside one of 1,000, and that it resumes to the same bits.

    python benchmarks/scale.py --quick
    python benchmarks/scale.py --json scale.json

Clients of ten pairs each, eight to train on, drawn from the shipped population, each with a taste
of its own; cohorts of fifty, one local step of two pairs, the shipped model, one process. Every run
is a process of its own, whose peak memory is the run's. `begin_` is until the first round begins,
with the rows read and shared out; a round's seconds are the median over rounds, which runs of few
and of many clients make in turn; what is resumed is a run's folder as it lay halfway, which is read
while the other figures are measured; `loop_share_` is the share of a round that is not its clients'
work: training, and what the method adds to it; the page is one with a figure of every client.
`fedbuff_time_ratio` is the simulated time of FedBuff to an accuracy over that of cohorts that wait;
`bytes_to_accuracy_ratio_8bit` that of bytes, with changes in eight bits, `_bfloat16` in bfloat16,
and `_top_k` with the largest tenth of their entries and what is left out later;
`sweep_parallel_ratio` the seconds of two runs at a time over those of one after the other;
`cost_model_largest_error_percent` how far what three runs cost is from what two others say;
`round_seconds_N_sites` those of a round without training, in which an adapter of 1.25 MB goes to
eight clients at N simulated sites and back as a mean (`_0_sites`: in one process). Figures are the
worst over algorithms, and each as `<name>_<algorithm>`; `--quick` is SCAFFOLD alone, `loop_share_`
with a twentieth of the clients, and four sites.

Figures: `begin_seconds_100k`, `begin_mb_100k`, `memory_ratio_100k_over_1k`,
`round_seconds_50_of_100k`, `round_ratio_100k_over_1k`, `resume_equal_100k`, `page_seconds_100k`,
`page_mb_100k`, `loop_share_1000_clients`, `bytes_to_accuracy_ratio_8bit`, `fedbuff_time_ratio`,
`sweep_parallel_ratio`, `cost_model_largest_error_percent`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ending import end_with_children
from engines import CONFIG, small_clients, timed
from fedpref import Experiment, config
from fedpref.algorithms import FedBuff
from fedpref.channel.chain import Sender
from fedpref.channel.compression import Bfloat16, Compression, Quantize, TopK
from fedpref.data import Builtin
from fedpref.data.preferences import Preference, key
from fedpref.experiments.rounds import events, new_directory
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation.participation import Participation
from fedpref.federation.verbs import WORK, Work
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.numerics import trees
from fedpref.numerics.metrics import ACCURACY
from fedpref.reports.page import write_report
from fedpref.runs.sweep import plan, side_by_side, sweep
from robust import FEATURES, Population

EVALUATED = 10  # clients, of each run
WAITED = 40  # rounds of clients that wait for one another
FEW, LOTS, COHORT, ROUNDS = 1000, 100_000, 50, 6
COMPRESSIONS = {"8bit": Quantize(bits=8), "bfloat16": Bfloat16(), "top_k": TopK(fraction=0.1)}
SITE_CLIENTS, ADAPTER_MB = 8, 0.625  # the shipped model's adapter
WAITING = "waiting\n"
ROWS = {"train": 8, "test": 2}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "scaffold": {},
    "feddpo": {},
    "fedpdpo": {
        "phases": "joint",
        "parts": {"head": None, "bottleneck": 0, "reward": True, "adapter": True},
    },
}


def write_clients(path: Path, count: int) -> None:
    """Write rows of so many clients, who turn as many of their comparisons as they differ."""
    # of each comparison the line's beginning as it is, and turned round
    known: dict[str, list[tuple[str, str]]] = {side: [] for side in ROWS}
    for row in Builtin().read():
        assert isinstance(row, Preference)
        texts = [key(text) for text in (row.prompt, row.chosen, row.rejected)]
        names = (("prompt", "chosen", "rejected"), ("prompt", "rejected", "chosen"))
        as_is, turned = (
            json.dumps(dict(zip(some, texts, strict=True))).removesuffix("}") for some in names
        )
        known[str(row.side)].append((as_is, turned))
    draw = random.Random(0)
    with path.open("w") as file:
        for client in range(count):
            turns = 0.5 * draw.random()
            for side, number in ROWS.items():
                for both in draw.sample(known[side], number):
                    text = both[draw.random() < turns]
                    file.write(f'{text}, "client": "c{client:06d}", "split": "{side}"}}\n')


def experiment(path: Path, algorithm: str, cohort: int, rounds: int) -> Experiment:
    content: dict[str, Any] = {
        "data": {"name": "files", "path": str(path), "split_column": "split"},
        "partition": {"name": "natural", "column": "client"},
        "algorithm": {
            "name": algorithm,
            **ALGORITHMS[algorithm],
            "local": {"steps": 1, "batch_size": 2},
        },
        "task": {"samples": 0},
        "federation": {"clients_per_round": cohort, "weighting": "equal"},
        "rounds": rounds,
        "evaluate_clients": EVALUATED,
        "workers": 1,
    }
    return config.parse(Experiment, content, "scale")


# ---- a run, in a process of its own


class Apart:
    """A run in a process of its own, which waits before each round until it is told to go on.

    It begins by itself; `heard` waits until it has.
    """

    def __init__(self, path: Path, algorithm: str, folder: Path, rounds: int, **more: Any) -> None:
        asked = {
            "path": str(path),
            "algorithm": algorithm,
            "folder": str(folder),
            "rounds": rounds,
            **more,
        }
        command = [sys.executable, __file__, "--run", json.dumps(asked)]
        pipes = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipes, stdout=pipes, text=True)

    def heard(self) -> str:
        """Wait until the run has begun, has made a round, or has ended, and return its line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == WAITING or line.startswith("{"):
                return line
        raise RuntimeError("the run failed")

    def go(self) -> str:
        """Let it make a round, or end after the last, and return its line."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.heard()

    def end(self) -> dict[str, Any]:
        """Let it make what rounds are left, and return what it measured."""
        line = WAITING
        while line == WAITING:
            line = self.go()
        self.process.communicate()
        found: dict[str, Any] = json.loads(line)
        return found


def run_here(asked: Mapping[str, Any]) -> None:
    """Run, or go on, when told to before each round, and print what was measured."""
    torch.set_num_threads(1)
    cohort, rounds_wanted = asked.get("cohort", COHORT), asked["rounds"]
    spec = experiment(Path(asked["path"]), asked["algorithm"], cohort, rounds_wanted)
    spec = replace(spec, spill_above_mb=asked.get("spill_above_mb", spec.spill_above_mb))
    folder = Path(asked["folder"])
    directory = RunDirectory(folder) if folder.exists() else new_directory(spec, folder)
    begun, begin, before, rounds, sent = time.perf_counter(), 0.0, 0.0, [], 0.0
    for event in events(spec, directory):
        now = time.perf_counter()
        if event.kind == "begin":
            begin = now - begun
        if event.kind == "round":
            rounds.append(now - before)
            sent = event.metrics["bytes_up"] + event.metrics["bytes_down"]
        if event.kind in ("begin", "round"):
            print(WAITING, end="", flush=True)
            sys.stdin.readline()
        before = time.perf_counter()
    # not getrusage's, which is also that of the process this one was made by
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1e3
    # the first round makes what the others find
    seconds = statistics.median(rounds[1:] or rounds)
    print(json.dumps({"begin": begin, "round": seconds, "mb": peak, "bytes": sent}))


def models(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that a run has left, and what its clients keep."""
    last = max((folder / "checkpoints").glob("round-*"))
    index = json.loads((last / "values.json").read_text())
    files = {f"{field} {i}": one[0] for field, some in index.items() for i, one in some.items()}
    values = {
        name: folder / "checkpoints" / "values" / file for name, file in files.items() if file
    }
    values["adapter"] = folder / "adapter" / "adapter_model.safetensors"
    return {
        f"{where} {name}": tensor
        for where, file in values.items()
        for name, tensor in trees.load(file).items()
    }


def of_algorithm(
    algorithm: str, few: Path, lots: Path, scratch: Path, rounds: int, cohort: int
) -> dict[str, float]:
    """Return the figures of an algorithm, `loop_share_` with a cohort of so many."""
    run_of_lots = Apart(lots, algorithm, scratch / f"{algorithm}-lots", rounds)
    run_of_few = Apart(few, algorithm, scratch / f"{algorithm}-few", rounds)
    for run in (run_of_few, run_of_lots):
        run.heard()
    again = scratch / f"{algorithm}-again"
    for done in range(1, rounds + 1):
        run_of_few.go()
        run_of_lots.go()
        if done == rounds - rounds // 2:
            shutil.copytree(scratch / f"{algorithm}-lots", again)
    run_resumed = Apart(lots, algorithm, again, rounds)  # begins while the others end
    small, large = run_of_few.end(), run_of_lots.end()
    page = page_of(scratch / f"{algorithm}-lots")
    share = loop_share(few, algorithm, cohort, scratch)
    run_resumed.end()
    whole, resumed = models(scratch / f"{algorithm}-lots"), models(again)
    is_equal = whole.keys() == resumed.keys() and all(
        torch.equal(tensor, resumed[name]) for name, tensor in whole.items()
    )
    return {
        "begin_seconds_100k": large["begin"],
        "begin_mb_100k": large["mb"],
        "round_seconds_50_of_1k": small["round"],
        "round_seconds_50_of_100k": large["round"],
        "round_ratio_100k_over_1k": large["round"] / small["round"],
        "memory_ratio_100k_over_1k": large["mb"] / small["mb"],
        "resume_equal_100k": float(is_equal),
        "loop_share_1000_clients": share,
        **page,
    }


def page_of(folder: Path) -> dict[str, float]:
    """Size and time of the page of a run, as if every client had been evaluated."""
    file = folder / "evaluation.jsonl"
    row = json.loads(file.read_text().splitlines()[-1])
    some, draw = next(iter(row["clients"].values())), random.Random(0)
    names = json.loads((folder / "clients.json").read_text())
    row["clients"] = {name: {**some, ACCURACY: draw.choice([0, 0.5, 0.5, 1])} for name in names}
    file.write_text(json.dumps(row) + "\n")
    begun = time.perf_counter()
    page = write_report([folder], folder / "report.html")
    return {
        "page_seconds_100k": time.perf_counter() - begun,
        "page_mb_100k": page.stat().st_size / 1e6,
    }


# ---- what a round adds


def loop_share(path: Path, algorithm: str, cohort: int, scratch: Path) -> float:
    """The share of a round that is not its clients' work: training, and what the method adds to it.

    It is the second round, as the first makes what the others find.
    """
    torch.set_num_threads(1)
    spec = experiment(path, algorithm, cohort, 2)
    spec = replace(spec, partition=replace(spec.partition, max_clients=cohort))
    directory = new_directory(spec, scratch / f"{algorithm}-loop")
    rounds, worked = [], []
    with timed_work(spec.algorithm.works) as seconds:
        for event in events(spec, directory):
            if event.kind == "round":
                rounds.append(event.metrics["seconds"])
                worked.append(sum(seconds) - sum(worked))
    print(f"{algorithm}: {cohort} clients, rounds of {rounds} s, {worked} s of work", flush=True)
    return 1 - worked[1] / rounds[1]


@contextmanager
def timed_work(works: Sequence[Work[Any, Any]]) -> Iterator[list[float]]:
    """Within a `with`, note the seconds of each of these that a client of this process does."""
    seconds: list[float] = []

    def timed(work: Work[Any, Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            begun = time.perf_counter()
            result = work.function(*args)
            seconds.append(time.perf_counter() - begun)
            return result

        return function

    known = {work.name: work for work in works}
    WORK.update({name: replace(work, function=timed(work)) for name, work in known.items()})
    try:
        yield seconds
    finally:
        WORK.update(known)


# ---- runs side by side


def sweep_ratio(scratch: Path, seed_count: int) -> float:
    """Seconds of a sweep of two runs at a time over those of one after the other."""
    seconds = []
    for parallel in (1, 2):
        folder = scratch / f"sweep-{parallel}"
        fewer = ["rounds=2", "partition.max_rows=24", "task.samples=0", "algorithm.local.steps=2"]
        runs = plan(Path("feddpo"), ["feddpo", "fedprox"], range(seed_count), fewer, folder)
        begun = time.perf_counter()
        if parallel == 1:
            for _, happenings in sweep(runs, folder / "cache"):
                for _ in happenings:
                    pass
        else:
            for path, why in side_by_side(runs, folder / "cache", parallel):
                assert not why, f"{path}: {why}"
        seconds.append(time.perf_counter() - begun)
    return seconds[1] / seconds[0]


# ---- a model of what a run costs


@dataclass(frozen=True)
class Costs:
    """What a run costs by its numbers of clients and of those in a round: two lines and a product.

    Attributes:
        begin: Seconds until the first round: a fixed part, and that of a client.
        round: Seconds of a round: a fixed part, and that of a client in it.
        memory: Peak MB: a fixed part, and that of a client.
        sent: Bytes that a client of a round sends and is sent.
    """

    begin: tuple[float, float]
    round: tuple[float, float]
    memory: tuple[float, float]
    sent: float

    @staticmethod
    def fitted(points: Sequence[tuple[int, int, Mapping[str, float]]]) -> Costs:
        """Return the costs that go through two measured runs: clients, cohort, figures."""
        (n0, k0, one), (n1, k1, other) = points

        def line(x0: int, x1: int, name: str) -> tuple[float, float]:
            slope = (other[name] - one[name]) / (x1 - x0)
            return one[name] - slope * x0, slope

        return Costs(
            line(n0, n1, "begin"), line(k0, k1, "round"), line(n0, n1, "mb"), one["bytes"] / k0
        )

    def of(self, clients: int, cohort: int) -> dict[str, float]:
        """Return what a run of such numbers is expected to cost."""
        return {
            "begin": self.begin[0] + self.begin[1] * clients,
            "round": self.round[0] + self.round[1] * cohort,
            "mb": self.memory[0] + self.memory[1] * clients,
            "bytes": self.sent * cohort,
        }


def cost_error(scratch: Path, quick: bool) -> float:
    """The largest error of the model, in percent, on three runs that it was not fitted to.

    Rows of all runs lie in a file, as those of many clients do.
    """
    known, others = ((2_000, 10), (40_000, 50)), ((10_000, 30), (20_000, 100), (80_000, 20))
    if quick:
        known, others = ((2_000, 5), (12_000, 20)), ((6_000, 10),)
    measured = {}
    for clients, cohort in (*known, *others):
        path = scratch / f"cost-{clients}.jsonl"
        write_clients(path, clients)
        folder = scratch / f"cost-{clients}-{cohort}"
        rounds = 3 if quick else 4
        run = Apart(path, "feddpo", folder, rounds, cohort=cohort, spill_above_mb=1)
        measured[clients, cohort] = run.end()
    points = [(*point, figures) for point, figures in measured.items()]
    costs, worst = Costs.fitted(points[:2]), 0.0
    print(f"costs: {costs}")
    for clients, cohort, found in points[2:]:
        expected = costs.of(clients, cohort)
        errors = {name: 100 * abs(value / found[name] - 1) for name, value in expected.items()}
        print(f"{clients} clients, {cohort} in a round: off by {errors} percent", flush=True)
        worst = max(worst, *errors.values())
    return worst


# ---- fewer bytes


def bytes_ratio(seed_count: int, compression: Compression) -> float:
    """Bytes, up and down, to a common accuracy with compressed changes over those in full.

    What sparse changes leave out is sent later, as `fed-ef` does.

    The rounds that log-linear policies of forty clients (`robust.Population`) take to the accuracy
    of forty rounds in full, less a point, times the bytes of a round of the shipped model's
    adapter.
    """
    stage, logs = compression.stage(), []
    for seed in range(seed_count):
        needed, goal = [], 0.0
        for is_short in (False, True):
            people, draw = Population("none", 0.0, seed), torch.Generator().manual_seed(seed)
            clients, policy, means = range(len(people.tastes)), np.zeros(FEATURES), []
            unsent = {i: torch.zeros(FEATURES) for i in clients}
            for turn in range(2 * WAITED):
                changes = []
                for i in clients:
                    change = {"w": torch.from_numpy(people.change(i, policy)).float()}
                    if is_short:
                        due = {"w": change["w"] + unsent[i]}
                        change = dict(stage.decode(stage.encode(due, Sender(i, turn, draw)), 1))
                        if isinstance(compression, TopK):
                            unsent[i] = due["w"] - change["w"]
                    changes.append(change["w"].numpy())
                policy = policy + np.mean(changes, 0)
                means.append(people.accuracy(policy, clients))
            goal = goal if needed else means[WAITED - 1] - 1
            needed.append(next(k for k, mean in enumerate(means, 1) if mean >= goal))
        logs.append(np.log(needed[1] / needed[0]))
    adapter = LanguageModel(Model()).init(torch.Generator().manual_seed(0))
    full = trees.size(adapter)
    short = trees.size(stage.encode(adapter, Sender(0, 0, torch.Generator())))
    return float(np.exp(np.mean(logs)) * (full + short) / (2 * full))


# ---- waiting for nobody


def fedbuff_time(seed_count: int) -> float:
    """Simulated time until log-linear policies are as good under FedBuff as under cohorts that wait
    for their slowest, as a ratio of geometric means; below one is sooner.

    Forty clients of `robust.Population`, of whom thirty are at work at any time; times are
    log-normal, of the spread that fedpref draws by itself. FedBuff makes a step of ten changes, a
    cohort that waits one of thirty, of the same local steps. To reach is the accuracy of forty
    rounds that wait, less a point.
    """
    how = Participation(clients_per_round=10, concurrency=30)
    together = Participation(clients_per_round=30)
    logs = []
    for seed in range(seed_count):
        people = Population("none", 0.0, seed)
        clients = range(len(people.tastes))
        waiting, clock = [(0.0, 0.0)], 0.0
        policy = np.zeros(people.tastes.shape[1])
        for turn in range(WAITED):
            cohort = together.cohort([1.0] * len(clients), seed, turn)[0]
            policy = policy + np.mean([people.change(i, policy) for i in cohort], 0)
            clock += max(together.time(seed, i, turn) for i in cohort)
            waiting.append((clock, people.accuracy(policy, clients)))
        goal = waiting[-1][1] - 1
        made = how.arrivals([1.0] * len(clients), seed)
        people = Population("none", 0.0, seed)
        history, method, step = [np.zeros(people.tastes.shape[1])], FedBuff(), 0
        while people.accuracy(history[0], clients) < goal and step < 20 * WAITED:
            changes = [
                method.weight(age) * people.change(i, history[age])
                for i, age in made.ages_of(step).items()
                if age <= method.staleness
            ]
            moved = np.sum(changes, 0) / len(made.ages_of(step)) if changes else 0.0
            history = [history[0] + moved, *history[: method.staleness]]
            step += 1
        soon = next(time for time, accuracy in waiting if accuracy >= goal)
        logs.append(np.log(made.time_of(max(0, step - 1)) / soon))
    return float(np.exp(np.mean(logs)))


# ---- several sites


def site_rounds(folder: Path, counts: Sequence[int], megabytes: float) -> dict[str, float]:
    """Seconds of a round without training over so many simulated sites; 0 is in one process."""
    figures = {}
    with small_clients(SITE_CLIENTS) as settings:
        spec = config.dump(Experiment.load(CONFIG, settings))
        for sites in (0, *counts):
            cells = [{"mb": megabytes, "rounds": 6, "gossip": False}]
            content = {"experiment": spec, "cells": cells, "sites": sites}
            results = timed("flare-simulated" if sites else "simulation", content, folder)
            figures[f"round_seconds_{sites}_sites"] = statistics.median(results[0][1:])
            print(f"{sites} sites: rounds of {results[0]} s", flush=True)
    return figures


PARTS = ("clients", "sweep", "bytes", "costs", "fedbuff", "sites")


def of_clients(scratch: Path, quick: bool) -> dict[str, float]:
    """What 100,000 clients cost, the worst over algorithms and by algorithm."""
    figures: dict[str, float] = {}
    few, lots = scratch / "few.jsonl", scratch / "lots.jsonl"
    write_clients(few, FEW)
    write_clients(lots, LOTS)
    for algorithm in list(ALGORITHMS)[: 1 if quick else None]:
        rounds, cohort = (3, FEW // 20) if quick else (ROUNDS, FEW)
        found = of_algorithm(algorithm, few, lots, scratch, rounds, cohort)
        for figure, value in found.items():
            print(f"{algorithm}: {figure} {value:.3g}", flush=True)
            worse = min if figure.startswith("resume") else max
            figures[figure] = worse(figures.get(figure, value), value)
            figures[f"{figure}_{algorithm}"] = value
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one algorithm")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="*", choices=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    end_with_children()
    if arguments.run:
        run_here(arguments.run)
        return
    figures: dict[str, float] = {}
    quick, parts = arguments.quick, arguments.only or PARTS
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if "clients" in parts:
            figures |= of_clients(scratch, quick)
        if "sweep" in parts:
            figures["sweep_parallel_ratio"] = sweep_ratio(scratch, 1 if quick else 3)
        if "bytes" in parts:
            for name, how in COMPRESSIONS.items():
                figures[f"bytes_to_accuracy_ratio_{name}"] = bytes_ratio(3 if quick else 8, how)
        if "costs" in parts:
            figures["cost_model_largest_error_percent"] = cost_error(scratch, quick)
        if "fedbuff" in parts:
            figures["fedbuff_time_ratio"] = fedbuff_time(3 if quick else 8)
        if "sites" in parts:
            figures |= site_rounds(scratch, (4,) if quick else (1, 2, 4, 8), ADAPTER_MB)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
