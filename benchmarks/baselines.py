"""What baselines that cost nothing reach on sets of real preferences, and `alone` and `pooled`.

    python benchmarks/baselines.py --data FOLDER
    python benchmarks/baselines.py --data FOLDER --quick --json figures.json

Each file `NAME.jsonl.gz` of the folder with rows of prompt, chosen and rejected is a set, its
clients those of the column `client` (`aspect` of ASSET) with 20 rows or more. Held-out accuracies
in per cent, means over clients, by five folds of prompts (`--quick`: one fold, at most twenty
clients of at most 100 rows): Bradley-Terry regressions on word counts and lengths and on the
untrained shipped model's mean hidden states, one for each client alone, one for all pooled, and
pooled with personal slopes; and the longer answer. With each an interval over clients. `--models`
adds language models that train the shipped model's adapter, each client alone and pooled, on one
fold.

Figures: `words_pooled_SET`, `words_alone_SET`, `words_personal_SET`, `probe_pooled_SET`,
`probe_alone_SET`, `probe_personal_SET`, `length_SET`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpref import Experiment, config, run
from fedpref.data import words
from fedpref.data.words import Pair
from fedpref.models.language import LanguageModel
from fedpref.models.model_settings import Model
from fedpref.numerics.bradley_terry import Differences, folds, margins
from fedpref.numerics.intervals import interval
from fedpref.numerics.metrics import ACCURACY

TABLES = Path(__file__).resolve().parent.parent.parent / "shared/data"
FOLDS, FEWEST = 5, 20  # rows of a client that is measured
MOST_CLIENTS, MOST_ROWS = 20, 100  # of the quick form
BATCH, CONTEXT = 16, 384  # answers at a time, and tokens of a prompt with its answer
CLIENT = {"asset_simplification_pairs": "aspect"}  # the column, where it is not `client`
Clients = dict[str, list[Pair]]


def sets(folder: Path, quick: bool) -> dict[str, Clients]:
    """The sets of a folder, by name; rows without a client are those of one called `all`."""
    found: dict[str, Clients] = {}
    for file in sorted(folder.glob("*.jsonl.gz")):
        clients: Clients = defaultdict(list)
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if not {"prompt", "chosen", "rejected"} <= row.keys():
                    break
                sides = (str(row[name]) for name in ("prompt", "chosen", "rejected"))
                client = row.get(CLIENT.get(file.name.split(".")[0], "client"), "all")
                clients[str(client)].append(Pair(*sides))
        many = {name: pairs for name, pairs in clients.items() if len(pairs) >= FEWEST}
        if quick:
            many = {name: many[name][:MOST_ROWS] for name in sorted(many)[:MOST_CLIENTS]}
        if many:
            found[file.name.removesuffix(".jsonl.gz")] = many
    return found


class States:
    """Mean hidden states of the shipped model, each answer's once."""

    def __init__(self) -> None:
        self.model = LanguageModel(Model(path="builtin", dtype="float32"))
        self.found: dict[tuple[str, str], torch.Tensor] = {}

    @torch.no_grad()
    def of(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Differences of states [n, D]."""
        wanted = {(p.prompt, a): None for p in pairs for a in (p.chosen, p.rejected)}
        new = sorted(
            (key for key in wanted if key not in self.found), key=lambda k: len("".join(k))
        )
        for first in range(0, len(new), BATCH):
            some, rows = new[first : first + BATCH], []
            for prompt, answer in some:
                opening, said = self.model.encode(prompt if prompt.strip() else ".", answer)
                said = said[: CONTEXT // 2]
                rows.append((tuple(opening[-(CONTEXT - len(said)) :]), [tuple(said)]))
            states = self.model.mean_states(rows).float()
            self.found.update(zip(some, states, strict=True))
        return torch.stack(
            [self.found[p.prompt, p.chosen] - self.found[p.prompt, p.rejected] for p in pairs]
        )


def accuracies(clients: Clients, states: States | None, rounds: int) -> dict[str, dict[str, float]]:
    """Held-out accuracy by kind of baseline and client."""
    right: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    every = sorted({pair.prompt for pairs in clients.values() for pair in pairs})
    fold = dict(zip(every, folds(every).tolist(), strict=True))
    for k in range(rounds):
        train = {c: [p for p in pairs if fold[p.prompt] != k] for c, pairs in clients.items()}
        test = {c: [p for p in pairs if fold[p.prompt] == k] for c, pairs in clients.items()}
        kept = [c for c in clients if train[c] and test[c]]
        train, test = {c: train[c] for c in kept}, {c: test[c] for c in kept}
        features = {"words": words.differences(train, test)}
        if states:
            features["probe"] = {c: (states.of(train[c]), states.of(test[c])) for c in kept}
        for name, found in features.items():
            ranked = margins(
                {c: Differences(x, [p.prompt for p in train[c]], y) for c, (x, y) in found.items()}
            )
            for kind, by in ranked.items():
                for c, margin in by.items():
                    right[f"{name}_{kind}"][c] += rightly(margin.tolist())
        for c in kept:
            right["length"][c] += rightly([words.longer(p) for p in test[c]])
    return {
        kind: {c: sum(some) / len(some) for c, some in by.items()} for kind, by in right.items()
    }


def rightly(margin: Sequence[float]) -> list[float]:
    return [(value > 0) + (value == 0) / 2 for value in margin]


def trained(clients: Clients, steps: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Held-out accuracy of language models, alone and pooled, by client."""
    file = scratch / "rows.jsonl"
    with file.open("w") as rows:
        for client, pairs in clients.items():
            for pair in pairs:
                rows.write(json.dumps({**pair._asdict(), "client": client}) + "\n")
    content = {
        "data": {"name": "files", "path": str(file), "test_fraction": 0.2},
        "partition": {"name": "natural", "min_test_rows": 1},
        "task": {
            "name": "preference",
            "max_length": CONTEXT,
            "truncation_mode": "keep_end",
            "model": {"path": "builtin", "lora_r": 8},
        },
        # a step of the baseline sees as many pairs as all clients' together
        "algorithm": {"name": "alone", "local": {"steps": steps, "batch_size": 8}},
        "baselines": ["pooled"],
        "rounds": 5,
        "evaluate_every": 0,
    }
    outcome = run(config.parse(Experiment, content, "baselines"), scratch / "run")
    return {
        line: {c: row[ACCURACY] for c, row in outcome.metrics(line).items()}
        for line in ("alone", "pooled")
    }


def shown(by: Mapping[str, float]) -> tuple[float, float, float]:
    """A mean over clients in per cent, and its interval."""
    values = 100 * np.array([list(by.values())])
    return float(values.mean()), *interval(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=TABLES, help="a folder of NAME.jsonl.gz")
    parser.add_argument("--only", nargs="+", help="these sets")
    parser.add_argument("--no-probe", action="store_true", help="leave the model's states out")
    parser.add_argument("--models", action="store_true", help="train language models too")
    parser.add_argument("--quick", action="store_true", help="one fold, fewer clients and rows")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    states = None if arguments.no_probe else States()
    figures: dict[str, Any] = {}
    known = sets(arguments.data, arguments.quick)
    if not known:
        parser.error(f"--data: there are no sets in {arguments.data}")
    if unknown := [name for name in arguments.only or () if name not in known]:
        parser.error(f"--only: {unknown[0]} is none of {' '.join(known)}")
    for name in arguments.only or known:
        clients = known[name]
        begun = time.perf_counter()
        found = accuracies(clients, states, 1 if arguments.quick else FOLDS)
        if arguments.models:
            with tempfile.TemporaryDirectory() as scratch:
                found |= trained(clients, 4 if arguments.quick else 20, Path(scratch))
        print(f"{name}: {len(clients)} clients, {time.perf_counter() - begun:.0f} s", flush=True)
        for kind, by in found.items():
            mean, low, high = shown(by)
            figures[f"{kind}_{name}"] = mean
            if not math.isnan(low):
                figures |= {f"{kind}_{name}_low": low, f"{kind}_{name}_high": high}
            print(f"  {kind:15s} {mean:5.1f} [{low:.1f}, {high:.1f}]", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
