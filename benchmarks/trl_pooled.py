"""All pairs in one place: fedpref's `pooled` beside TRL's DPOTrainer, at equal pairs and rates.

    python benchmarks/trl_pooled.py [--model smollm2-q4] [--seeds 3] [--quick] [--json F]

Both train one adapter (rank 8, all linear layers) on the shipped clients' training pairs, in
batches of eight by AdamW at each of three rates along a cosine, as many steps, in float32; TRL as
it comes but for these (its AdamW forgets squared gradients more slowly, it counts a tie as wrong,
and cuts no text, as none of these is cut). The rate is chosen for each on validation prompts, the
test's pairs are read with what was chosen. `trl_accuracy` and `fedpref_pooled_accuracy` are means
over clients, in percent, `pooled_gain_over_trl` is their paired difference with its interval's ends
`_low` and `_high`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpref import Experiment
from fedpref.data import ClientData
from fedpref.engines.workers import keep_freed_memory
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import events, new_directory
from fedpref.models.named import located
from fedpref.numerics.intervals import interval
from fedpref.numerics.metrics import ACCURACY

BATCH, RATES = 8, (2e-3, 5e-3, 1e-2)
ASIDE = ("data.validation_fraction=0.2", "evaluate_on=validation")


def experiment(
    model: str, seed: int, steps: int, rate: float, settings: Sequence[str]
) -> Experiment:
    return Experiment.load(
        Path("feddpo"),
        [
            f"task.model.path={model}",
            "task.model.dtype=float32",
            f"seed={seed}",
            f"data.split_seed={seed}",
            "task.samples=0",
            "baselines=[]",
            "evaluate_every=0",
            "rounds=1",
            f"algorithm={{name: pooled, local: {{steps: {steps}, batch_size: {BATCH}, "
            f"learning_rate: {rate}}}}}",
            *settings,
        ],
    )


def of_fedpref(spec: Experiment) -> dict[str, float]:
    """Train as fedpref does, and return each client's accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        directory = new_directory(spec, Path(folder) / "run")
        for _ in events(spec, directory):
            pass
        clients = FinishedRun.at(directory.path).last_evaluation["clients"]
    return {name: row[ACCURACY] for name, row in clients.items()}


def of_trl(spec: Experiment, seed: int) -> dict[str, float]:
    """Train by DPOTrainer on the same pairs, and return each client's accuracy."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(seed)  # of the adapter, which is drawn before the trainer's own seed counts
    clients, local = spec.clients()[0], spec.algorithm.local
    folder = located(spec.task.model.path)

    def rows(some: Sequence[ClientData], side: str) -> Any:
        return datasets.Dataset.from_list(
            [
                {name: list(getattr(row, name)) for name in ("prompt", "chosen", "rejected")}
                for client in some
                for row in getattr(client, side)
            ]
        )

    with tempfile.TemporaryDirectory() as scratch:
        arguments = DPOConfig(
            output_dir=scratch,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=1,  # it averages batches, whatever their size
            learning_rate=local.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(local.warmup_ratio * local.steps),
            beta=0.1,
            max_length=None,
            max_steps=local.steps,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=arguments,
            train_dataset=rows(clients, "train"),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"
            ),
        )
        trainer.train()
        # one at a time, for it names what it measures on several sets alike
        return {
            client.name: trainer.evaluate(rows([client], "test"))["eval_rewards/accuracies"]
            for client in clients
        }


def mean(values: dict[str, float]) -> float:
    return 100 * float(np.mean(list(values.values())))


@dataclass(frozen=True)
class Line:
    """A trainer on the pairs of a seed.

    Attributes:
        name: fedpref or TRL.
        model: What is trained.
        seed: Of split and draws.
        steps: Updates.
        settings: Overrides of the experiment.
    """

    name: str
    model: str
    seed: int
    steps: int
    settings: Sequence[str]

    def trained(self, rate: float, more: Sequence[str] = ()) -> dict[str, float]:
        """Train, and return each client's accuracy."""
        spec = experiment(self.model, self.seed, self.steps, rate, [*self.settings, *more])
        found = of_fedpref(spec) if self.name == "fedpref" else of_trl(spec, self.seed)
        print(f"seed {self.seed}, {self.name}, {rate:g}: {mean(found):.1f} {more}", flush=True)
        return found

    def chosen(self, rates: Sequence[float]) -> dict[str, float]:
        """Return what the rate that is best on validation prompts comes to on the test's."""
        best = rates[0]
        if len(rates) > 1:
            best = max(rates, key=lambda rate: mean(self.trained(rate, ASIDE)))
        return self.trained(best)


def measure(
    model: str, seeds: int, steps: int, rates: Sequence[float], settings: Sequence[str]
) -> dict[str, float]:
    table: list[list[list[float]]] = []
    for seed in range(seeds):
        ends = [
            Line(name, model, seed, steps, settings).chosen(rates) for name in ("fedpref", "TRL")
        ]
        assert ends[0].keys() == ends[1].keys()
        table.append([[100 * values[client] for client in sorted(values)] for values in ends])
    ours, theirs = np.array(table).transpose(1, 0, 2)
    low, high = interval(ours - theirs)
    return {
        "fedpref_pooled_accuracy": float(ours.mean()),
        "trl_accuracy": float(theirs.mean()),
        "pooled_gain_over_trl": float((ours - theirs).mean()),
        "pooled_gain_over_trl_low": low,
        "pooled_gain_over_trl_high": high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin", help="builtin, smollm2-q4 or another")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--quick", action="store_true", help="one seed and rate, few steps, pairs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    keep_freed_memory()
    if arguments.quick:
        few = ["partition.max_rows=30", "partition.max_clients=6"]
        figures = measure(arguments.model, 1, 8, RATES[1:2], few)
    else:
        figures = measure(arguments.model, arguments.seeds, arguments.steps, RATES, ())
    # of two seeds there is no interval
    figures = {name: value for name, value in figures.items() if math.isfinite(value)}
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
