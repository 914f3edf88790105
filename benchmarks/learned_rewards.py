"""FIRM on rewards that are learned: models of helpful and of harmless, fitted to hh-rlhf's pairs.

    python benchmarks/learned_rewards.py --data FOLDER --model smollm2-q4 --json figures.json
    python benchmarks/learned_rewards.py --data FOLDER --quick

A reward model is a Bradley-Terry regression on the untrained model's last state behind prompt and
answer, fitted to training pairs of one objective and written as a sequence-classification model of
transformers; its penalty is chosen by folds of these pairs' prompts, and its unit is the standard
deviation over their answers. `helpful_accuracy` and `harmless_accuracy` are of held-out pairs, in
per cent. Two clients, of whom one has the prompts of one objective and one those of the other, are
then trained for both rewards by FIRM and by linear scalarisation, with the same steps and rate:
`firm_helpful_gain` and the like are the rise of the mean reward of answers to held-out prompts, in
that unit, `firm_kl` the distance from the untrained model, in nats an answer; means over seeds.
Without --data the pairs are fetched from the Hub. Runs are kept under --output and not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from fedpref import Experiment
from fedpref.data import ClientData
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import EVALUATION
from fedpref.models.named import located
from fedpref.numerics.bradley_terry import FOLDS, PENALTIES, fit, folds
from fedpref.runs.sweep import plan, sweep

OBJECTIVES = ("helpful", "harmless")
METHODS = ("firm", "scalarized")
LONGEST = 160  # tokens of a text that are read, the last ones
AT_ONCE = 8


class RewardModel:
    """A classifier whose only layer that is fitted is its last one.

    Args:
        path: The model below it.
    """

    def __init__(self, path: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, truncation_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32
        ).eval()
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """Return the last state of each text, [n, D]."""
        found = []
        for first in range(0, len(texts), AT_ONCE):
            batch = self.tokenizer(
                list(texts[first : first + AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=LONGEST,
                padding_side="right",
                return_tensors="pt",
            )
            states = self.model.base_model(**batch).last_hidden_state
            last = batch["attention_mask"].sum(1) - 1
            found.append(states[torch.arange(len(last)), last])
        return torch.cat(found)

    def learn(self, client: ClientData, count: int) -> float:
        """Fit the last layer to pairs of a client; return the share of held-out ones ranked right.

        Args:
            client: Who has the pairs.
            count: How many are taken of the training ones; of held-out ones half as many.
        """
        sides = {"train": client.train[:count], "test": client.test[: count // 2]}
        chosen, rejected = (
            {
                side: self.states([f"{row.prompt}{getattr(row, answer)}" for row in rows])
                for side, rows in sides.items()
            }
            for answer in ("chosen", "rejected")
        )
        apart = {side: (chosen[side] - rejected[side]).double() for side in sides}
        fold = folds([str(row.prompt) for row in sides["train"]])
        lost = torch.zeros(len(PENALTIES), dtype=torch.float64)
        for number in range(FOLDS):
            weights = fit(apart["train"][fold != number], PENALTIES)
            margins = apart["train"][fold == number] @ weights
            lost += torch.nn.functional.softplus(-margins).sum(0)
        weight = fit(apart["train"], [PENALTIES[int(lost.argmin())]])[:, 0]
        every = torch.cat([chosen["train"], rejected["train"]]).double() @ weight
        with torch.no_grad():
            self.model.score.weight.copy_((weight / every.std()).float()[None])
        return 100 * float((apart["test"] @ weight > 0).double().mean())

    def save(self, folder: Path) -> None:
        """Write a folder that `rewards: {NAME: {name: classifier, path: FOLDER}}` takes."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def source(folder: Path | None) -> str:
    """The override that says where hh-rlhf is read from."""
    return f"data={{name: hh, path: {folder}}}" if folder else "data={name: hh}"


def settings(arguments: argparse.Namespace) -> list[str]:
    """Overrides of configs/firm.yaml: whose prompts, which model, how much."""
    sizes = {
        "rounds": 1 if arguments.quick else 4,
        "evaluate_every": 0,
        "algorithm.local.steps": 2 if arguments.quick else 4,
        "algorithm.local.batch_size": 4,
        "algorithm.local.learning_rate": arguments.rate,
        "partition.max_rows": 60 if arguments.quick else 200,
        "task.evaluation_prompts": 8 if arguments.quick else 32,
        "task.max_length": 160,
        "task.truncation_mode": "keep_end",
        "task.model.path": arguments.model,
        "task.model.lora_layers_to_transform": "last-4",
    }
    return [
        source(arguments.data),
        "partition={name: natural, column: objective}",
        "task.rewards={}",
        *(f"{key}={value}" for key, value in sizes.items()),
    ]


def trained(
    arguments: argparse.Namespace, rewards: dict[str, Path], output: Path
) -> dict[str, float]:
    """Train by each method for each seed; return means of what rewards rose by."""
    wanted = [
        *settings(arguments),
        *(f"task.rewards.{name}={{name: classifier, path: {at}}}" for name, at in rewards.items()),
    ]
    seeds = range(1 if arguments.quick else arguments.seeds)
    runs = plan(Path("firm"), list(METHODS), seeds, wanted, output)
    for path, happenings in sweep(runs, output / "cache"):
        for _ in happenings:
            pass
        print(path, flush=True)
    found: dict[str, list[float]] = {}
    for path in runs:
        before, *_, after = RunDirectory(path).read_rows(EVALUATION)
        for name in OBJECTIVES:
            means = [row["summary"][f"rewards/{name}"]["mean"] for row in (before, after)]
            found.setdefault(f"{path.parent.name}_{name}_gain", []).append(means[1] - means[0])
        found.setdefault(f"{path.parent.name}_kl", []).append(after["summary"]["kl"]["mean"])
    print(json.dumps(found))
    return {name: statistics.fmean(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder with hh-rlhf's tables")
    parser.add_argument("--model", default="builtin", help="the policy, and what reads answers")
    parser.add_argument("--pairs", type=int, default=400, help="of an objective, to fit to")
    parser.add_argument("--rate", type=float, default=1e-2, help="the learning rate")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="keep reward models and runs in this folder")
    parser.add_argument("--quick", action="store_true", help="one seed, few pairs and steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        output = (arguments.output or Path(scratch)).resolve()
        spec = Experiment.load(Path("hh"), [source(arguments.data)])
        clients = {client.name: client for client in spec.clients()[0]}
        figures: dict[str, float] = {}
        rewards = {name: output / f"reward-{name}" for name in OBJECTIVES}
        for name, folder in rewards.items():
            if not (folder / "accuracy.json").is_file():
                model = RewardModel(located(arguments.model))
                right = model.learn(clients[name], 60 if arguments.quick else arguments.pairs)
                model.save(folder)
                (folder / "accuracy.json").write_text(json.dumps(right))
            figures[f"{name}_accuracy"] = json.loads((folder / "accuracy.json").read_text())
            print(f"{name}: {figures[f'{name}_accuracy']:.1f} % of held-out pairs", flush=True)
        figures |= trained(arguments, rewards, output / "runs")
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
