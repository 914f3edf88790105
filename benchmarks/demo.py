"""What the demo shows: a personal model against each client alone and one model for all.

    python benchmarks/demo.py --json figures.json
    python benchmarks/demo.py --quick

`--quick` is `configs/demo.yaml` as it is, one seed; otherwise several seeds, whose gains are
averaged. Gains are of the policy's held-out accuracy, in points over all twelve clients; standard
errors are of a bootstrap over prompts, which pairs and clients share. It needs SmolLM2 (`fedpref
model smollm2-q4`); without it, or with `--offline`, the shipped model is taken.

Figures: `demo_seconds`, `accuracy_LINE`, `policy_gain_over_LINE_points` and
`policy_gain_over_LINE_in_standard_errors` (alone, feddpo, pooled),
`accuracy_fedpdpo_with_reward_heads`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from fedpref import Experiment, UserError, run
from fedpref.models.named import located
from fedpref.numerics.metrics import ACCURACY, COMBINED
from fedpref.reports.paired import Gain, gains, sentences

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def measured(config: Path, seed: int, folder: Path) -> tuple[dict[str, float], dict[str, Gain]]:
    """Seconds and mean accuracies of one run, and its gains over its baselines."""
    begun = time.perf_counter()
    outcome = run(Experiment.load(config, [f"seed={seed}"]), folder)
    figures = {"demo_seconds": time.perf_counter() - begun}
    for line, clients in outcome.evaluations.items():
        figures[f"accuracy_{line}"] = statistics.mean(row[ACCURACY] for row in clients.values())
    combined = [row[COMBINED] for row in outcome.evaluations["fedpdpo"].values()]
    figures["accuracy_fedpdpo_with_reward_heads"] = statistics.mean(combined)
    for sentence in sentences(folder):
        print(f"seed {seed}: {sentence}")
    return figures, gains(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed: the demo itself")
    parser.add_argument("--seeds", type=int, default=3, help="how many, without --quick")
    parser.add_argument("--offline", action="store_true", help="on the shipped model")
    parser.add_argument("--output", type=Path, help="keep the runs in this folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    is_offline = arguments.offline
    try:
        located("smollm2-q4")
    except UserError as error:
        print(f"{error} The shipped model is taken.")
        is_offline = True
    config = CONFIGS / ("demo-offline.yaml" if is_offline else "demo.yaml")
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.output or Path(place)
        seeds = range(1 if arguments.quick else arguments.seeds)
        rows = [measured(config, seed, folder / f"seed-{seed}") for seed in seeds]
    figures = {name: statistics.mean(one[name] for one, _ in rows) for name in rows[0][0]}
    for baseline in ("alone", "feddpo", "pooled"):
        mean = statistics.mean(found[baseline].mean for _, found in rows)
        error = statistics.mean(found[baseline].error for _, found in rows)
        figures[f"policy_gain_over_{baseline}_points"] = mean
        figures[f"policy_gain_over_{baseline}_in_standard_errors"] = mean / error
    for name, value in figures.items():
        print(f"{name:50s} {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
