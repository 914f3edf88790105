"""PluralLLM: federated against pooled under the paper's settings and at equal steps, on other
opinions, and its speed.

    python benchmarks/pluralllm.py --data FOLDER
    python benchmarks/pluralllm.py --parts countries --seeds 3
    python benchmarks/pluralllm.py --parts splits --model smollm2-q4 --rounds 30

`countries`: the paper's 14, of which six never train. Its settings (six local steps a round with a
cosine that goes up again, weights by points, evaluation on all questions; one step an epoch in the
pooled line), then equal numbers of steps, one cosine, and questions that nobody trained on.
`splits`: these last two lines where the six that never train are drawn, five times; the learning
rate of each is chosen for each split by two of its eight countries, while it trains on six.
`others`: opinion groups on Polis, workers of ukpconvarg. `speed`: rounds a second against the
released program's way of working (plural_program.py), and a thousand groups. Runs are kept under
--output and not done again.

Figures: `rounds_saved_percent`, `alignment_gain_percent`, `fairness_gap` and `min_gap_points`, also
with `_equal_steps`, `splits_...` of random splits, `speed_ratio`, `seconds_a_round`, `peak_mb`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from scipy import stats

import plural_program
from fedpref import Experiment
from fedpref.algorithms import PluralLLM
from fedpref.data.opinions import TRAINING_COUNTRIES, UNSEEN_COUNTRIES
from fedpref.engines import Simulation
from fedpref.engines.workers import one_thread
from fedpref.experiments.evaluations import evaluate
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import EVALUATION
from fedpref.federation.local_training import LocalTraining
from fedpref.numerics import seeds
from fedpref.reports.progress import show
from fedpref.runs.sweep import plan, sweep
from fedpref.tasks.alignment import alignment

CONFIG = Path(__file__).resolve().parent.parent / "configs/pluralllm.yaml"
SPILL = 100  # MB of clients' values in memory, where groups are many
EVERY = 2  # rounds between two evaluations
# configs/pluralllm-published.yaml
PUBLISHED = (
    "task.evaluate_on=all data.test_fraction=0.1 algorithm.local.max_grad_norm=1e9 "
    "task.predictor.normalize=false"
)
WEIGHTS = "algorithm.weights=points federation.weighting=equal"
LINES = {
    "federated, as published": f"{WEIGHTS} algorithm.local.num_cycles={{cycles}} {PUBLISHED}",
    "pooled, as published": "algorithm.name=pooled algorithm.local.steps=1 "
    f"algorithm.local.batch_size=8 {PUBLISHED}",
    "federated": "",
    "pooled, equal steps": "algorithm.name=pooled algorithm.local.batch_size=8",
}
PAIRS = {
    "": ("federated, as published", "pooled, as published"),
    "_equal_steps": ("federated", "pooled, equal steps"),
}
STEPS = {"pooled, as published": 1}  # a round; six in the other lines
EQUAL = PAIRS["_equal_steps"]
RATES, VALIDATING = ("1e-4", "3e-4", "1e-3"), 2
WAY = 0.9  # from the first evaluation to the common level, after which a line counts as there
OTHERS = {
    "polis": ("data={{name: polis, path: {data}}}", "partition.min_rows=40"),
    "ukpconvarg": (
        "data={{name: ukpconvarg, path: {data}}}",
        "partition={{name: natural, column: worker, max_clients: 8, max_rows: 600}}",
    ),
}


@dataclass(frozen=True)
class Line:
    """A line's runs, one for each seed."""

    name: str
    rows: Sequence[Sequence[Mapping[str, Any]]]  # of evaluations

    def converged(self) -> list[float]:
        """Of each seed, the round from which the smoothed alignment of training groups stays within
        5 % of its end.
        """
        return [
            convergence(
                [row["round"] for row in rows],
                [row["summary"]["alignment"]["mean"] for row in rows],
            )
            for rows in self.rows
        ]

    def training(self, metric: str = "alignment") -> list[float]:
        return [rows[-1]["summary"][metric]["mean"] for rows in self.rows]

    def unseen(self) -> list[float]:
        """Of each seed, the mean alignment of groups that never trained."""
        return [
            statistics.fmean(group["alignment"] for group in rows[-1]["newcomers_before"].values())
            for rows in self.rows
        ]

    def least(self) -> list[float]:
        """Of each seed, the alignment of the group that never trained and has the least."""
        return [
            min(group["alignment"] for group in rows[-1]["newcomers_before"].values())
            for rows in self.rows
        ]

    def fairness(self) -> list[float]:
        """Of each seed, 1 / (1 + CoV^2) of all groups' alignments."""
        found = []
        for rows in self.rows:
            groups = {**rows[-1]["clients"], **rows[-1].get("newcomers_before", {})}
            values = [group["alignment"] for group in groups.values()]
            found.append(1 / (1 + (np.std(values) / np.mean(values)) ** 2))
        return found


def convergence(rounds: Sequence[int], values: Sequence[float], width: int = 3) -> float:
    """The first round after which the moving average stays within 5 % of its last value."""
    smooth = np.convolve(values, np.ones(width) / width, "valid")
    outside = np.flatnonzero(abs(smooth - smooth[-1]) > 0.05 * abs(smooth[-1]))
    first = int(outside[-1]) + 1 if len(outside) else 0
    return float(rounds[first + width - 1 if first else 0])


def countries(
    data: str,
    numbers: Sequence[int],
    rounds: int,
    settings: Sequence[str],
    output: Path,
    progress: Console,
) -> dict[str, Line]:
    """All lines; settings are of those of equal steps."""
    common = [f"data.path={data}", f"rounds={rounds}", f"evaluate_every={EVERY}", "baselines=[]"]
    variants = [
        f"{name}: {overrides.format(cycles=rounds * 6 / 200)} "
        f"{' '.join(settings) if name in EQUAL else ''}"
        for name, overrides in LINES.items()
    ]
    return trained(variants, numbers, common, output / "countries", progress)


def splits(
    data: str,
    numbers: Sequence[int],
    rounds: int,
    settings: Sequence[str],
    count: int,
    output: Path,
    progress: Console,
) -> dict[str, float]:
    """Federated against pooled, on questions that nobody trained on, where those who never train
    are drawn; means over splits of means over seeds.
    """
    common = [f"data.path={data}", f"rounds={rounds}", "baselines=[]", *settings]
    found: dict[str, list[float]] = {}
    for split in range(count):
        names = sorted(TRAINING_COUNTRIES + UNSEEN_COUNTRIES)
        random.Random(split).shuffle(names)
        unseen, training = names[: len(UNSEEN_COUNTRIES)], names[len(UNSEEN_COUNTRIES) :]
        folder = output / f"split-{split}"
        lines = {}
        for line in EQUAL:
            rate = best_rate(
                line, training, common, folder / "trials" / line, progress, output / "cache"
            )
            chosen = [*common, f"evaluate_every={EVERY}", newcomers(unseen)]
            text = f"{line}: {LINES[line]} algorithm.local.learning_rate={rate}"
            lines |= trained([text], numbers, chosen, folder / line, progress, output / "cache")
        for name, value in between(*(lines[line] for line in EQUAL)).items():
            found.setdefault(name, []).append(value)
        for name, value in baselines(data, *settings, newcomers(unseen)).items():
            found.setdefault(name, []).append(100 * value)
        progress.print(json.dumps({name: values[-1] for name, values in found.items()}))
    return {
        f"{name}{suffix}": value
        for name, values in found.items()
        for suffix, value in zip(("", "_low", "_high"), student(values), strict=False)
    }


def best_rate(
    line: str,
    training: Sequence[str],
    settings: Sequence[str],
    output: Path,
    progress: Console,
    cache: Path,
) -> str:
    """Return the rate with which a line that trains on all but two of these countries is best
    aligned with the two.
    """
    groups = f"data.groups={json.dumps(list(training))}"
    chosen = [*settings, groups, newcomers(training[:VALIDATING])]
    texts = [f"{rate}: {LINES[line]} algorithm.local.learning_rate={rate}" for rate in RATES]
    tried = trained(texts, [0], chosen, output, progress, cache)
    return max(tried, key=lambda rate: tried[rate].unseen()[0])


def newcomers(names: Sequence[str]) -> str:
    return f"federation.newcomers={json.dumps(list(names))}"


def between(federated: Line, pooled: Line) -> dict[str, float]:
    """Compare lines: on groups that never trained, and the rounds, of equal steps and samples,
    until the training groups are aligned as both are at some time.
    """
    ours, theirs = (100 * np.array(line.unseen()) for line in (federated, pooled))
    saved = []
    for pair in zip(federated.rows, pooled.rows, strict=True):
        courses = [[row["summary"]["alignment"]["mean"] for row in rows] for rows in pair]
        first = courses[0][0]
        level = first + WAY * (min(max(course) for course in courses) - first)
        reached = [
            next(row["round"] for row, value in zip(rows, course, strict=True) if value >= level)
            for rows, course in zip(pair, courses, strict=True)
        ]
        saved.append(100 * (1 - max(reached[0], 1) / max(reached[1], 1)))
    return {
        "splits_steps_saved_percent": statistics.fmean(saved),
        "splits_alignment_gain_percent": float(100 * (ours / theirs - 1).mean()),
        "splits_min_gap_points": 100
        * statistics.fmean(a - b for a, b in zip(federated.least(), pooled.least(), strict=True)),
        "splits_fairness_gap": statistics.fmean(
            a - b for a, b in zip(federated.fairness(), pooled.fairness(), strict=True)
        ),
        "splits_federated": float(ours.mean()),
        "splits_pooled": float(theirs.mean()),
    }


def others(
    data: str,
    numbers: Sequence[int],
    rounds: int,
    settings: Sequence[str],
    output: Path,
    progress: Console,
) -> dict[str, dict[str, Line]]:
    """Federated, pooled and alone on other opinions."""
    found = {}
    for name, of_set in OTHERS.items():
        common = [setting.format(data=data) for setting in of_set] + [
            f"rounds={rounds}",
            "baselines=[]",
            "federation.newcomers=0",
            *settings,
        ]
        spec = Experiment.load(CONFIG, common)
        # as many tasks a step as all groups' together
        size = len(spec.clients()[0]) * spec.algorithm.local.batch_size
        variants = [
            "federated: ",
            f"pooled: algorithm.name=pooled algorithm.local.batch_size={size}",
            "alone: algorithm.name=alone",
        ]
        found[name] = trained(variants, numbers, common, output / name, progress)
    return found


def trained(
    variants: Sequence[str],
    numbers: Sequence[int],
    settings: Sequence[str],
    output: Path,
    progress: Console,
    cache: Path | None = None,
) -> dict[str, Line]:
    """These variants' runs, done or found; embeddings lie in `cache`."""
    runs = plan(CONFIG, variants, numbers, settings, output)
    for path, happenings in sweep(runs, cache or output / "cache"):
        progress.print(str(path), highlight=False)
        show(happenings, progress)
    names = [variant.split(":", 1)[0] for variant in variants]
    return {
        name: Line(
            name,
            [RunDirectory(path).read_rows(EVALUATION) for path in runs if path.parent.name == name],
        )
        for name in names
    }


def baselines(data: str, *settings: str) -> dict[str, float]:
    """Of the groups that never train: equal shares, and the mean of the training groups' answers to
    the question (else equal shares).

    Of their answers the mean has those that the predictor trains on, and another those too that it
    does not.
    """
    spec = Experiment.load(CONFIG, [f"data.path={data}", *settings])
    task = spec.build_task()
    shards = [task.encode(client) for client in spec.clients()[0]]
    late = spec.federation.joining([shard.name for shard in shards], spec.seed)
    unseen = {shards[i].name for i in late}
    trained, all_answers = (
        "mean of the training groups' training answers",
        "mean of all their answers",
    )
    known: dict[str, dict[str, list[torch.Tensor]]] = {trained: {}, all_answers: {}}
    for shard in shards:
        for name, answers in known.items() if shard.name not in unseen else ():
            for question in (*shard.train, *(shard.test if name == all_answers else ())):
                answers.setdefault(question.digest, []).append(torch.tensor(question.shares))
    found: dict[str, list[float]] = {"equal shares": [], **{name: [] for name in known}}
    for shard in shards:
        if shard.name in unseen:
            truths = [torch.tensor(question.shares) for question in shard.asked]
            equal = [torch.full_like(y, 1 / len(y)) for y in truths]
            for name, values in found.items():
                means = known.get(name, {})
                guesses = [
                    torch.stack(means[q.digest]).mean(0) if q.digest in means else e
                    for q, e in zip(shard.asked, equal, strict=True)
                ]
                values.append(
                    statistics.fmean(
                        alignment(guess, y) for guess, y in zip(guesses, truths, strict=True)
                    )
                )
    return {name: statistics.fmean(values) for name, values in found.items()}


def speed(data: str, rounds: int) -> dict[str, float]:
    """Rounds a second, of which each tenth ends with an evaluation of all groups: the program's and
    ours, in turns.
    """
    spec = Experiment.load(CONFIG, [f"data.path={data}", "task.evaluate_on=all"])
    task, method, threads = spec.build_task(), spec.algorithm, torch.get_num_threads()
    seconds = dict.fromkeys(("theirs", "ours", "their evaluation", "our evaluation"), 0.0)
    # processes that are forked must find no threads
    with (
        one_thread(),
        tempfile.TemporaryDirectory() as cache,
    ):
        shards = [task.prepare(task.encode(client), Path(cache)) for client in spec.clients()[0]]
        training = [i for i, shard in enumerate(shards) if shard.name in TRAINING_COUNTRIES]
        questions = [
            [
                (task.known[q.digest].numpy(), np.array(q.shares, np.float32))
                for q in (*s.context, *s.asked)
            ]
            for s in shards
        ]
        with closing(
            Simulation(task, shards, seed=0, rounds=rounds, workers=task.devices)
        ) as engine:
            state: Any = method.init(engine, task.init(seeds.generator(0, "init")))
            torch.manual_seed(0)
            program, draw = (
                plural_program.Program.begin([questions[i] for i in training]),
                random.Random(0),
            )
            for number in range(rounds):
                with timed(seconds, "theirs", threads):
                    program.round(draw)
                with timed(seconds, "ours", 1):
                    engine.begin(number, training)
                    state, _ = method.step(engine, state)
            with timed(seconds, "our evaluation", 1):
                engine.begin(rounds - 1, engine.clients, "evaluate")
                engine.disclose(engine.each(evaluate, *method.model(state)))
            with timed(seconds, "their evaluation", threads):
                for group in questions:
                    program.evaluate(group)
    theirs, ours = (
        seconds[who] / rounds + seconds[f"{whose} evaluation"] / 10
        for who, whose in (("theirs", "their"), ("ours", "our"))
    )
    return {
        "speed_ratio": theirs / ours,
        "speed_ratio_without_evaluation": seconds["theirs"] / seconds["ours"],
        **{f"seconds_{name.replace(' ', '_')}": value for name, value in seconds.items()},
    }


@contextmanager
def timed(seconds: dict[str, float], name: str, threads: int) -> Iterator[None]:
    """Add up what is done with so many threads."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - begun
    torch.set_num_threads(1)


def many(data: str, groups: int) -> dict[str, float]:
    """A round of so many groups on one processor, made of the countries by turns: seconds, and
    memory against a tenth of them.
    """
    spec = Experiment.load(CONFIG, [f"data.path={data}"])
    task = spec.build_task()
    method: Any = PluralLLM(local=LocalTraining(steps=1, batch_size=1, learning_rate=3e-4))
    memory, seconds = {}, 0.0
    with one_thread(), tempfile.TemporaryDirectory() as cache:
        shards = [task.prepare(task.encode(client), Path(cache)) for client in spec.clients()[0]]
        for count in (groups // 10, groups):
            named = [replace(shards[i % len(shards)], name=f"group-{i}") for i in range(count)]
            engine = Simulation(task, named, seed=0, rounds=2, spill_above_mb=SPILL)
            state = method.init(engine, task.init(seeds.generator(0, "init")))
            begun = time.perf_counter()
            engine.begin(0, engine.clients)
            method.step(engine, state)
            seconds = time.perf_counter() - begun
            memory[count] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {
        "groups": groups,
        "seconds_a_round": seconds,
        "peak_mb_of_a_tenth": memory[groups // 10],
        "peak_mb": memory[groups],
    }


def with_interval(values: Sequence[float], scale: float = 100.0) -> str:
    """The mean, and Student's 95 % interval over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{scale * mean:.1f}"
    mean, low, high = (scale * value for value in student(values))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def student(values: Sequence[float]) -> tuple[float, ...]:
    """Return a mean and the ends of its interval, where there is more than one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return (mean,)
    spread = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - spread, mean + spread


def line_table(title: str, lines: Mapping[str, Line]) -> Table:
    table = Table(
        "",
        "alignment",
        "unseen groups",
        "fairness",
        "converged, round",
        "steps a client",
        "tasks",
        title=title,
        box=MARKDOWN,
    )
    for name, line in lines.items():
        has_unseen = "newcomers_before" in line.rows[0][-1]
        rounds = line.converged()
        steps = [count * STEPS.get(name, 6) for count in rounds]
        fairness = with_interval(line.fairness())
        shown = [
            with_interval(rounds, 1),
            with_interval(steps, 1),
            with_interval([8 * count for count in steps], 1),
        ]
        table.add_row(
            name,
            with_interval(line.training()),
            with_interval(line.unseen()) if has_unseen else "",
            fairness,
            *shown,
        )
    return table


def other_table(name: str, lines: Mapping[str, Line]) -> Table:
    table = Table("", "alignment", "accuracy", "equal shares", title=name, box=MARKDOWN)
    for line, found in lines.items():
        table.add_row(
            line,
            *(
                with_interval(found.training(metric))
                for metric in ("alignment", "accuracy", "uniform")
            ),
        )
    return table


def figures(lines: Mapping[str, Line]) -> dict[str, float]:
    """Rounds saved, alignment gained on unseen groups, on the least aligned of them in points, and
    how much fairer the pooled line is.
    """
    found = {}
    for suffix, (federated, pooled) in PAIRS.items():
        ours, theirs = lines[federated], lines[pooled]
        # one that stands where it began has taken a round to show it
        rounds = [max(statistics.fmean(line.converged()), 1) for line in (ours, theirs)]
        found[f"rounds_saved_percent{suffix}"] = 100 * (1 - rounds[0] / rounds[1])
        found[f"alignment_gain_percent{suffix}"] = 100 * (
            statistics.fmean(ours.unseen()) / statistics.fmean(theirs.unseen()) - 1
        )
        found[f"fairness_gap{suffix}"] = statistics.fmean(theirs.fairness()) - statistics.fmean(
            ours.fairness()
        )
        found[f"min_gap_points{suffix}"] = 100 * (
            statistics.fmean(ours.least()) - statistics.fmean(theirs.least())
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        default=str(CONFIG.parent.parent.parent / "shared/data"),
        help="a folder with the public sets (docs/data.md)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["countries", "splits", "others", "speed"],
        help="by default all, with --quick countries and speed",
    )
    parser.add_argument(
        "--model", default="builtin", help="what embeds questions; by default the shipped model"
    )
    parser.add_argument(
        "--settings",
        nargs="*",
        default=[],
        help="of the lines that are not as published, such as task.predictor.normalize=false",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--splits", type=int, default=5, help="how many are drawn")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark-pluralllm"), help="where runs are kept"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, one split, a few rounds; the figures mean less",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if not Path(arguments.data).is_dir():
        parser.error(f"--data: there is no folder {arguments.data}")
    quick, whole = ["countries", "speed"], ["countries", "splits", "others", "speed"]
    parts = arguments.parts or (quick if arguments.quick else whole)
    rounds, numbers = (
        (min(arguments.rounds, 8), range(1))
        if arguments.quick
        else (arguments.rounds, range(arguments.seeds))
    )
    console, progress = Console(width=170), Console(stderr=True)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) if arguments.quick else arguments.output
        if "speed" in parts:
            found |= speed(arguments.data, 2 if arguments.quick else 10)
            found |= many(arguments.data, 100 if arguments.quick else 1000)
        if "countries" in parts:
            more = arguments.settings
            lines = countries(arguments.data, numbers, rounds, more, output, progress)
            console.print(line_table("countries", lines))
            found |= figures(lines)
            for line, settings in {
                "as published": PUBLISHED.split()[:2],
                "equal steps": [],
            }.items():
                found |= {
                    f"{name}, {line}": value
                    for name, value in baselines(arguments.data, *settings).items()
                }
        if "splits" in parts:
            model = [f"task.model.path={arguments.model}", *arguments.settings]
            folder = output / f"splits-{arguments.model.replace('/', '-')}"
            count = 1 if arguments.quick else arguments.splits
            of_splits = splits(arguments.data, numbers, rounds, model, count, folder, progress)
            console.print(json.dumps(of_splits, indent=1))
            found |= of_splits
        if "others" in parts:
            more = arguments.settings
            found_others = others(arguments.data, numbers, rounds, more, output, progress)
            for name, of_set in found_others.items():
                console.print(other_table(name, of_set))
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
