r"""What personal parts gain: FedPDPO against one model for all, its ablations, and other ways to
personalise.

    python benchmarks/fedpdpo.py --data FOLDER
    python benchmarks/fedpdpo.py --data FOLDER --datasets shipped persona \\
        --lines global ablations personal --seeds 5

Every line takes equally many local steps a round on one split, over both phases or adapters where
there are two. Runs are kept under --output and not done again. Without --data, the shipped clients
alone are measured. Gains are paired differences of held-out pair accuracy, in points, with 95 %
intervals over seeds and clients, against the best of the lines that share one
model.

Figures: `gain_points_SET` and `gain_low_SET`, `iid_gap_points`, `bytes_ratio`, `round_cost_ratio`;
SET is one of those that --data has, and the shipped one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedpref import Experiment
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import METRICS
from fedpref.numerics import seeds
from fedpref.reports.comparison import Row, compare
from fedpref.reports.comparison_tables import markdown, table
from fedpref.reports.progress import show
from fedpref.runs.sweep import plan, sweep

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Dataset:
    """A config, its number of clients, the local steps of a round, and what is set besides."""

    config: str
    clients: int
    steps: int = 6
    settings: tuple[str, ...] = ()
    is_local: bool = True  # needs --data


DATASETS = {
    "shipped": Dataset("demo", 12, settings=("rounds=6",), is_local=False),
    "movie-reviews-3": Dataset("movie-reviews", 3),
    "persona": Dataset("persona", 6, steps=8, settings=("rounds=12",)),
    "movie-reviews-10": Dataset("movie-reviews-10", 10),
    "ukpconvarg": Dataset(
        "ukpconvarg",
        16,
        settings=("rounds=8", "partition.max_clients=16", "federation.clients_per_round=null"),
    ),
    "iid": Dataset(
        "demo", 6, settings=("rounds=6", "partition={name: iid, clients: 6}"), is_local=False
    ),
}
QUICK = [
    "rounds=1",
    "algorithm.local.batch_size=2",
    "task.max_length=48",
    "task.truncation_mode=keep_start",
]
ONE_MODEL = ("feddpo", "fedprox", "ffa-lora")
LINES = {
    "quick": {"feddpo": "algorithm=feddpo", "fedpdpo": "algorithm=fedpdpo"},
    "global": {
        "feddpo": "algorithm=feddpo",
        "fedprox": "algorithm=fedprox",
        "ffa-lora": "algorithm=ffa-lora",
        "fedpdpo": "algorithm=fedpdpo",
    },
    "ablations": {
        "no own head": "algorithm=fedpdpo algorithm.parts.head=null",
        "no reward head": "algorithm=fedpdpo algorithm.parts.reward=false",
        "no bottleneck": "algorithm=fedpdpo algorithm.parts.bottleneck=0",
        "no own adapter": "algorithm=fedpdpo algorithm.parts.adapter=false",
        "joint": "algorithm=fedpdpo algorithm.phases=joint",
    },
    "personal": {
        "alone": "algorithm=alone",
        "pooled": "algorithm=pooled algorithm.local.gradient_accumulation_steps={clients}",
        "fedsa-lora": "algorithm=fedsa-lora",
        "fedper": "algorithm=fedper",
        "fedrep": "algorithm=fedper algorithm.phases=alternate",
        "ditto": "algorithm=ditto algorithm.local.steps={half}",
        "feddpa": "algorithm=feddpa",
        "clustered": "algorithm=clustered",
        "feddpo, product": "algorithm=feddpo algorithm.aggregate=product",
        "fedpdpo, product": "algorithm=fedpdpo algorithm.aggregate=product",
    },
}


def measure(
    name: str,
    groups: Sequence[str],
    seeds: int,
    data: str | None,
    output: Path,
    extra: Sequence[str],
    console: Console,
) -> tuple[list[Row], dict[str, float]]:
    """A dataset's table, gains over the best line of one model, and its figures."""
    dataset = DATASETS[name]
    settings = [
        *dataset.settings,
        f"algorithm.local.steps={dataset.steps}",
        *([f"data.path={data}"] if dataset.is_local else []),
        *extra,
    ]
    fill = {"half": dataset.steps // 2, "clients": dataset.clients}  # Ditto trains two adapters
    lines = {line: spec.format(**fill) for group in groups for line, spec in LINES[group].items()}
    place = output / name
    runs = plan(
        CONFIGS / f"{dataset.config}.yaml",
        [f"{k}: {v}" for k, v in lines.items()],
        range(seeds),
        settings,
        place,
    )
    for path, happenings in sweep(runs, place / "cache"):
        console.print(str(path), highlight=False)
        show(happenings, console)
    of = {line: [path for path in runs if path.parent.name == line] for line in lines}
    means = {
        row.name: row.mean
        for row in compare([path for line in ONE_MODEL if line in of for path in of[line]])
    }
    best = max(means, key=means.__getitem__)
    rows = compare(
        [path for line in (best, *(line for line in lines if line != best)) for path in of[line]]
    )
    gain = next(row.gain for row in rows if row.name == "fedpdpo")
    assert gain is not None, "the best of the lines with one model is none of FedPDPO's"
    figures = {f"gain_points_{name}": gain[0], f"gain_low_{name}": gain[1]}
    if name == "iid":
        figures = {"iid_gap_points": gain[0], "iid_gap_low": gain[1]}
    rounds = {
        line: [row for path in of[line] for row in RunDirectory(path).read_rows(METRICS)]
        for line in ("feddpo", "fedpdpo")
    }
    figures[f"bytes_ratio_{name}"] = statistics.fmean(
        own["bytes_up"] + own["bytes_down"] for own in rounds["fedpdpo"]
    ) / statistics.fmean(row["bytes_up"] + row["bytes_down"] for row in rounds["feddpo"])
    return rows, figures


def round_cost(clients: int, rounds: int) -> float:
    """FedPDPO's seconds a round over FedDPO's of as many local steps: medians over rounds that take
    turns, after a first one each.
    """
    names = ("feddpo", "fedpdpo")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    settings = ["algorithm.local.steps=6", f"partition.max_clients={clients}"]
    specs = {
        name: Experiment.load(CONFIGS / "feddpo.yaml", [f"algorithm={name}", *settings])
        for name in names
    }
    task = specs["feddpo"].build_task()
    keep_freed_memory()
    with one_thread(), tempfile.TemporaryDirectory() as cache, ExitStack() as stack:
        shards = [
            task.prepare(task.encode(client), Path(cache))
            for client in specs["feddpo"].clients()[0]
        ]
        engines = {
            name: Simulation(task, shards, seed=0, rounds=rounds, workers=task.devices)
            for name in names
        }
        for engine in engines.values():
            stack.callback(engine.close)
        algorithms: dict[str, Any] = {name: spec.algorithm for name, spec in specs.items()}
        states = {
            name: algorithms[name].init(engines[name], task.init(seeds.generator(0, "init")))
            for name in names
        }
        for number in range(rounds):
            for name in names:
                engines[name].begin(number, engines[name].clients)
                begun = time.perf_counter()
                states[name], _ = algorithms[name].step(engines[name], states[name])
                seconds[name].append(time.perf_counter() - begun)
    return statistics.median(seconds["fedpdpo"][1:]) / statistics.median(seconds["feddpo"][1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        help="a folder with the public sets (docs/data.md); without it the shipped clients are "
        "measured",
    )
    parser.add_argument(
        "--datasets", nargs="+", choices=DATASETS, help="by default all that the data allows"
    )
    parser.add_argument(
        "--lines", nargs="+", choices=["global", "ablations", "personal"], default=["global"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark-fedpdpo"), help="where runs are kept"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a round of FedDPO and FedPDPO on the shipped clients, cut short; the figures mean "
        "little",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    console, progress = Console(width=150), Console(stderr=True)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        extra = QUICK if arguments.quick else []
        output, seeds = (
            (Path(temporary), 1) if arguments.quick else (arguments.output, arguments.seeds)
        )
        usual = [
            name for name, dataset in DATASETS.items() if not dataset.is_local or arguments.data
        ]
        for name in arguments.datasets or usual:
            groups = (
                ["quick"] if arguments.quick else list(dict.fromkeys(["global", *arguments.lines]))
            )
            rows, found = measure(name, groups, seeds, arguments.data, output, extra, progress)
            console.print(f"[bold]{name}[/bold]")
            console.print(table(rows))
            print(markdown(rows))
            figures |= found
    figures["bytes_ratio"] = statistics.fmean(
        value for key, value in figures.items() if key.startswith("bytes_ratio_")
    )
    figures["round_cost_ratio"] = round_cost(2, 3) if arguments.quick else round_cost(12, 6)
    # of two seeds there is no interval
    figures = {name: value for name, value in figures.items() if math.isfinite(value)}
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
