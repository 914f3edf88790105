"""What regressions on words rank with as many pairs as a language model is trained on.

    python benchmarks/equal_pairs.py
    python benchmarks/equal_pairs.py runs/bench-opposed/shipped/fedpdpo/seed-*

`words` among the baselines is fitted on all of a client's training rows, of which the benchmark's
policies see some. Here each client's regression is given as many of its pairs as its policy is
trained on at most (rounds x steps x pairs of a step), drawn as they are: by prompts where
`batch_by` says so, and at random; then all. Held-out accuracies in per cent, means over clients and
runs with intervals over both, of each client's regression alone and of the pooled one with own
slopes; of runs also what their policies gain over these, pair by pair. Without runs it is the
shipped set with the benchmark's larger budget and three seeds; `--quick`: one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from fedpref import Experiment
from fedpref.data import words
from fedpref.data.preferences import Preference
from fedpref.data.words import Pair
from fedpref.experiments.finished import FinishedRun
from fedpref.numerics.bradley_terry import Differences, margins
from fedpref.numerics.intervals import interval
from fedpref.numerics.metrics import ACCURACY

CONFIG = Path(__file__).resolve().parent.parent / "configs/feddpo.yaml"
SHIPPED = (
    "data.validation_fraction=0.2",
    "rounds=5",
    "algorithm.local.steps=4",
    "algorithm.local.batch_size=4",
    "algorithm.local.batch_by=prompt",
)
KINDS = {"alone": "words, each alone", "personal": "words, pooled with own slopes"}


def drawn(pairs: Sequence[Pair], count: int, by_prompt: bool, draw: random.Random) -> list[Pair]:
    """So many of a client's pairs at most, by prompts or at random."""
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    draw.shuffle(prompts)
    place = {prompt: k for k, prompt in enumerate(prompts)}
    mixed = draw.sample(pairs, len(pairs))
    return (sorted(mixed, key=lambda pair: place[pair.prompt]) if by_prompt else mixed)[:count]


def accuracies(spec: Experiment) -> dict[tuple[str, str], dict[str, float]]:
    """Held-out accuracy by client, of each number of pairs and kind of regression."""
    local = spec.algorithm.local
    seen = spec.rounds * local.steps * local.batch_size * local.gradient_accumulation_steps
    sides: list[dict[str, list[Pair]]] = [{}, {}]
    for client in spec.clients()[0]:
        for side, rows in zip(sides, (client.train, client.test), strict=True):
            side[client.name] = [Pair.of(row) for row in rows if isinstance(row, Preference)]
    train, test = sides
    draw, by_prompt, found = random.Random(spec.seed), local.batch_by == "prompt", {}
    few = {name: drawn(pairs, seen, by_prompt, draw) for name, pairs in train.items()}
    for count, some in ((str(seen), few), ("all", train)):
        features = words.differences(some, test)
        ranked = margins(
            {
                name: Differences(x, [pair.prompt for pair in some[name]], y)
                for name, (x, y) in features.items()
            }
        )
        for kind in KINDS:
            found[count, kind] = {
                name: float(((margin > 0).double() + (margin == 0).double() / 2).mean())
                for name, margin in ranked[kind].items()
            }
    return found


def policies(path: Path) -> dict[str, float]:
    """Held-out accuracy of a run's policies by client."""
    run = FinishedRun.at(path)
    clients = run.result().evaluations[run.experiment.algorithm.name]
    return {name: metrics[ACCURACY] for name, metrics in clients.items()}


def shown(
    runs: Sequence[Mapping[str, float]], less: Sequence[Mapping[str, float]] | None = None
) -> tuple[float, float, float]:
    """A mean over clients and runs in per cent, less another line's, and its interval."""
    values = 100 * np.array([[by[name] for name in sorted(by)] for by in runs])
    if less:
        values -= 100 * np.array([[by[name] for name in sorted(by)] for by in less])
    return float(values.mean()), *interval(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run directories of one set")
    parser.add_argument(
        "--settings", nargs="*", default=[], help="of the shipped set, such as rounds=4"
    )
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.runs:
        specs = [Experiment.load(run / "config.yaml") for run in arguments.runs]
    else:
        seeds = range(1 if arguments.quick else 3)
        settings = [*SHIPPED, *arguments.settings]
        specs = [
            Experiment.load(CONFIG, [*settings, f"seed={k}", f"data.split_seed={k}"]) for k in seeds
        ]
    all_runs = [accuracies(spec) for spec in specs]
    policy = [policies(run) for run in arguments.runs]
    beside = ["policy's gain"] if policy else []
    titles = [title for kind in KINDS.values() for title in (kind, *beside)]
    table, figures = Table("pairs of a client, at most", *titles, box=MARKDOWN), {}
    for count in dict.fromkeys(count for count, _ in all_runs[0]):
        row = []
        for kind in KINDS:
            mean, low, high = shown([run[count, kind] for run in all_runs])
            row.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
            figures[f"words_{kind}_{count}_pairs"] = mean
            if policy:
                mean, low, high = shown(policy, [run[count, kind] for run in all_runs])
                row.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
                key = f"policy_gain_words_{kind}_{count}_pairs"
                figures |= {key: mean, f"{key}_low": low, f"{key}_high": high}
        table.add_row(count, *row)
    Console(width=140).print(table)
    figures = {name: value for name, value in figures.items() if math.isfinite(value)}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
