"""How many layers need an adapter: FedDPO of SmolLM2 in its last 4, 8, 16 and in all 30.

    python benchmarks/layers.py --data FOLDER --json figures.json
    python benchmarks/layers.py --quick

Held-out accuracy and seconds a pair, with the layers below computed once, on the shipped clients
and, where `--data` says where they lie, on persona and movie-reviews (docs/data.md). The rate is
0.02 over the number of layers: it was chosen for 4 and 8 on validation prompts of the shipped
clients, the others follow the rule. One seed. It needs SmolLM2 (`fedpref model smollm2-q4`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from fedpref import Experiment, run
from fedpref.experiments.run_directory import METRICS
from fedpref.experiments.run_files import read_rows
from fedpref.numerics.metrics import ACCURACY

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LAYERS = {"4": 4, "8": 8, "16": 16, "all": 30}
RATE = 0.02  # times one over the number of layers
STEPS, BATCH = 4, 2
CONFIG = {"shipped": "feddpo", "persona": "persona", "movie-reviews": "movie-reviews"}
ROUNDS = {"shipped": 4, "persona": 8, "movie-reviews": 12}  # 384 pairs of all clients together


def measured(name: str, layers: str, rounds: int, overrides: list[str]) -> dict[str, float]:
    """Accuracy and seconds a pair of one run."""
    placed = "null" if layers == "all" else f"last-{layers}"
    spec = Experiment.load(
        CONFIGS / f"{CONFIG[name]}.yaml",
        [
            "task.model.path=smollm2-q4",
            f"task.model.lora_layers_to_transform={placed}",
            "algorithm=feddpo",
            "algorithm.local.batch_by=prompt",
            f"algorithm.local.steps={STEPS}",
            f"algorithm.local.batch_size={BATCH}",
            f"algorithm.local.learning_rate={RATE / LAYERS[layers]}",
            f"rounds={rounds}",
            "baselines=[]",
            *overrides,
        ],
    )
    with tempfile.TemporaryDirectory() as place:
        outcome = run(spec, Path(place) / "run")
        rows = read_rows(outcome.path / METRICS)
    clients = outcome.evaluations["feddpo"].values()
    pairs = STEPS * BATCH * sum(row["clients"] for row in rows)
    return {
        f"accuracy_{name}_{layers}": statistics.mean(row[ACCURACY] for row in clients),
        f"seconds_a_pair_{name}_{layers}": sum(row["seconds"] for row in rows) / pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three shipped clients, 4 and all")
    parser.add_argument("--data", type=Path, help="the folder of persona and movie-reviews")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    sets = {"shipped": ["partition.max_clients=3"] if arguments.quick else []}
    if arguments.data and not arguments.quick:
        sets |= {name: [f"data.path={arguments.data}"] for name in ("persona", "movie-reviews")}
    figures: dict[str, float] = {}
    for name, overrides in sets.items():
        for layers in ("4", "all") if arguments.quick else LAYERS:
            found = measured(name, layers, 2 if arguments.quick else ROUNDS[name], overrides)
            for figure, value in found.items():
                print(f"{figure:40s} {value:.4g}", flush=True)
            figures |= found
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
