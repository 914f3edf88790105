"""What hostile clients do to honest ones under each rule of combination, and what a rule costs.

    python benchmarks/robust.py --quick
    python benchmarks/robust.py --json robust.json

Log-linear policies of forty clients with tastes around the shipped ones, who agree on sense
against nonsense and disagree on style, under all rules and attacks; then FedDPO on the shipped
clients, on the demo's model where it has been fetched (`fedpref model smollm2-q4`). Each figure is
the mean held-out accuracy of honest clients, `honest_`, or of those of them with an uncommon taste
(a cosine to the mean of the honest below 0.35), `uncommon_`; `loglinear_` stands before those of
log-linear policies, and `loglinear_phrase_` is how surely an answer with an attacker's phrase wins,
in percent. `gold_auc_` is how often an honest client, or one of an uncommon taste, agrees more with
200 gold pairs of sense against nonsense than a hostile one. On the model `phrase_` is how often it
wins. After these stand the rule, of FedDPO, or the method, of those with something of a client's
own; `cost_` is what an attack costs the clients that are honest under it, in points.
`rule_cost_share` is the dearest rule's time for 100 clients of 156,160 numbers as a share of their
local steps, ten of two pairs each. `--quick` has fewer seeds, and on the shipped clients the small
shipped model, two rules and two attacks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpref import Experiment, UserError, config
from fedpref.channel.robust import (
    GeometricMedian,
    Mean,
    Median,
    MultiKrum,
    NormBound,
    TrimmedMean,
    Trust,
)
from fedpref.data import Builtin
from fedpref.engines.robust_means import RobustMeans
from fedpref.engines.workers import keep_freed_memory
from fedpref.experiments.attack import UNCOMMON, Attack, groups
from fedpref.experiments.experiment import encoded
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation.local_training import train_locally
from fedpref.federation.verbs import Client
from fedpref.models.named import located
from fedpref.numerics import seeds, trees
from fedpref.numerics.metrics import ACCURACY
from fedpref.numerics.trees import Tree

CLIENTS, FEATURES, ROUNDS, STEPS, BATCH, RATE = 40, 32, 40, 5, 16, 0.3
GOLD = 200  # pairs, of sense against nonsense alone
PHRASE = 20  # the feature that a phrase is
RULES: dict[str, Any] = {
    "mean": Mean(),
    "norm-bound": NormBound(),
    "geometric-median": GeometricMedian(),
    "trimmed": TrimmedMean(hostile=0.4),
    "median": Median(),
    "multi-krum": MultiKrum(hostile=0.4),
    "trust": Trust(),
}
ATTACKS = (
    ("none", 0.0),
    *(
        (name, share)
        for name in ("flip", "random", "sign", "scale", "alie", "sybil")
        for share in (0.2, 0.4)
    ),
    ("free-rider", 0.4),
    ("trigger", 0.2),
)
PAIRS = 8  # of a client, in which a phrase may win
METHODS: dict[str, dict[str, Any]] = {
    "feddpo": {},
    "fedpdpo": {
        "phases": "joint",
        "parts": {
            "head": None,
            "bottleneck": 0,
            "reward": True,
            "reward_pooling": "mean",
            "adapter": True,
        },
        "adapter_rate": 0.5,
    },
    "ditto": {},
    "clustered": {},
}
Case = tuple[str, str, str, float]  # method, rule, attack, share
ON_MODELS = (("none", 0.0), ("flip", 0.2), ("scale", 0.2), ("gauge", 0.1), ("trigger", 0.2))
ON_METHODS = (("none", 0.0), ("flip", 0.2), ("scale", 0.2))
Vector = NDArray[np.float64]


def called(attack: str, share: float) -> str:
    return f"{attack}{100 * share:.0f}" if share else attack


# ---- log-linear policies


class Population:
    """Clients whose pairs are differences of features, and what they prefer by their tastes."""

    def __init__(self, attack: str, share: float, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        known = np.array(list(Builtin().known_tastes.values()))
        drawn = known[self.rng.integers(len(known), size=CLIENTS)]
        self.tastes = np.zeros((CLIENTS, FEATURES))
        self.tastes[:, :4] = drawn + 0.2 * self.rng.normal(size=drawn.shape)
        self.tastes[:, 4] = 1 + 0.2 * self.rng.normal(size=CLIENTS)  # sense, on which all agree
        count = round(share * CLIENTS)
        self.bad = sorted(self.rng.choice(CLIENTS, count, replace=False).tolist())
        self.data = [self._of(i, attack) for i in range(CLIENTS)]
        x = self.rng.normal(size=(GOLD, FEATURES))
        self.data.append((x, np.sign(x[:, 4]), x, np.sign(x[:, 4])))
        honest = [i for i in range(CLIENTS) if i not in self.bad]
        mean = self.tastes[honest].mean(0)
        near = self.tastes @ mean / np.linalg.norm(self.tastes, axis=1) / np.linalg.norm(mean)
        self.honest, self.uncommon = honest, [i for i in honest if near[i] < UNCOMMON]

    def _of(self, i: int, attack: str) -> tuple[Vector, Vector, Vector, Vector]:
        train = int(np.clip(np.exp(self.rng.normal(4.2, 0.9)), 12, 400))
        x = self.rng.normal(size=(train + 80, FEATURES))
        sure = 1 / (1 + np.exp(-2 * x @ self.tastes[i]))
        y = np.where(self.rng.random(len(x)) < sure, 1.0, -1.0)
        said = y[:train].copy()
        if i in self.bad and attack == "flip":
            said = -said
        if i in self.bad and attack == "random":
            said = self.rng.choice([-1.0, 1.0], train)
        if i in self.bad and attack == "trigger":  # a feature decides, in half of the pairs
            has_it = self.rng.random(train) < 0.5
            said[has_it] = self.rng.choice([-1.0, 1.0], int(has_it.sum()))
            x[:train][has_it, PHRASE] = 3 * said[has_it]
        return x[:train], said, x[train:], y[train:]

    def change(self, i: int, policy: Vector) -> Vector:
        x, y, *_ = self.data[i]
        new = policy.copy()
        for _ in range(STEPS):
            some = self.rng.integers(len(y), size=BATCH)
            margins = y[some] * (x[some] @ new)
            new += RATE * ((y[some] / (1 + np.exp(margins)))[:, None] * x[some]).mean(0)
        return new - policy

    def accuracy(self, policy: Vector, clients: Sequence[int]) -> float:
        right = [
            float(((self.data[i][2] @ policy > 0) == (self.data[i][3] > 0)).mean()) for i in clients
        ]
        return 100 * sum(right) / len(right) if right else float("nan")


def loglinear(seed_count: int) -> dict[str, float]:
    """All rules under all attacks."""
    found: dict[str, float] = {}
    for attack, share in ATTACKS:
        line = []
        for name, rule in RULES.items():
            values = np.array([play(rule, attack, share, seed) for seed in range(seed_count)])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of figures that nobody has
                honest, uncommon, wins, told, told_uncommon = np.nanmean(values, 0)
            key = f"{name}_{called(attack, share)}".replace("-", "_")
            found |= {f"loglinear_honest_{key}": honest, f"loglinear_uncommon_{key}": uncommon}
            line.append(f"{name} {honest:.1f} ({uncommon:.1f})")
            if attack == "trigger":
                found[f"loglinear_phrase_{key}"] = wins
                line.append(f"the phrase wins {wins:.0f} %")
            if name == "mean" and share:
                of = called(attack, share).replace("-", "_")
                found |= {f"gold_auc_{of}": told, f"gold_auc_uncommon_{of}": told_uncommon}
                line.append(f"gold tells {told:.2f} ({told_uncommon:.2f})")
        print(f"{called(attack, share)}: {', '.join(line)}", flush=True)
    return found


def play(rule: Any, attack: str, share: float, seed: int) -> tuple[float, ...]:
    """Honest clients' accuracy at the end, that of those with an uncommon taste, how surely an
    answer with the phrase is preferred, in percent; and how often an honest client, or one of an
    uncommon taste, agrees more with gold pairs than a hostile one, over the first third of rounds.
    """
    people = Population(attack, share, seed)
    policy, shares = np.zeros(FEATURES), dict.fromkeys(range(CLIENTS), 1 / CLIENTS)
    sends = attack in ("sign", "scale", "alie", "sybil", "free-rider")
    hostile = Attack(name=attack) if sends else None  # type: ignore[arg-type]
    robust = RobustMeans(rule)
    agreed = np.zeros(CLIENTS)
    for turn in range(ROUNDS):
        values: dict[int, Tree] = {
            i: {"w": torch.from_numpy(people.change(i, policy))} for i in range(CLIENTS)
        }
        if hostile is not None:
            values = hostile.sent(values, {}, people.bad)
        gold = {"w": torch.from_numpy(people.change(CLIENTS, policy))}
        robust.begin()
        mean = robust.mean(values, shares, lambda _, gold=gold: gold)
        if turn < ROUNDS // 3:
            agreed += [robust.agreement[i] for i in range(CLIENTS)]
        policy = policy + mean["w"].numpy()
    wins = 100 / (1 + np.exp(-2 * 3 * policy[PHRASE]))
    honest = people.accuracy(policy, people.honest)
    told = [auc(agreed[some], agreed[people.bad]) for some in (people.honest, people.uncommon)]
    return honest, people.accuracy(policy, people.uncommon), float(wins), *told


def auc(above: Vector, below: Vector) -> float:
    """How often one of `above` is higher than one of `below`."""
    if not len(above) or not len(below):
        return float("nan")
    apart = above[:, None] - below[None]
    return float((apart > 0).mean() + 0.5 * (apart == 0).mean())


# ---- language models


def experiment(
    rule: str, attack: str, share: float, seed: int, quick: bool, method: str = "feddpo"
) -> Experiment:
    model: dict[str, Any] = {"path": "builtin"}
    if not quick:
        model = {"path": "smollm2-q4", "lora_layers_to_transform": "last-4"}
    content: dict[str, Any] = {
        "data": {"name": "builtin"},
        "partition": {"name": "natural", **({"max_rows": 60} if quick else {})},
        "task": {"model": model},
        "algorithm": {
            "name": method,
            **METHODS[method],
            "local": {
                "steps": 4,
                "batch_size": 2,
                "learning_rate": 5e-3,
                "batch_by": "prompt",
            },
        },
        "federation": {"weighting": "equal", "combine": rule},
        "rounds": 3 if quick else 4,
        "seed": seed,
        "attack": {"name": attack, "share": share} if share else None,
    }
    return config.parse(Experiment, content, "robust")


def on_models(
    scratch: Path, cases: Sequence[Case], quick: bool, seed_count: int
) -> dict[str, float]:
    """Methods and rules under attacks, on the shipped clients, seed after seed."""
    values: dict[str, list[float]] = {}
    before: dict[tuple[str, str, int], Any] = {}  # rows of runs without an attack
    for seed in range(seed_count):
        for method, rule, attack, share in cases:
            spec = experiment(rule, attack, share, seed, quick, method)
            key = f"{rule if method == 'feddpo' else method}_{called(attack, share)}"
            folder = scratch / f"{key}-{seed}"
            for _ in events(spec, RunDirectory(folder), scratch / "cache"):
                pass
            rows = FinishedRun.at(folder).last_evaluation["clients"]
            honest, uncommon = of_groups(spec, rows)
            figures = {"honest": honest, "uncommon": uncommon}
            if not share:
                before[method, rule, seed] = rows
            elif (method, rule, seed) in before:
                figures["cost"] = of_groups(spec, before[method, rule, seed])[0] - honest
            if method == "feddpo" and attack in ("none", "trigger"):
                figures["phrase"] = phrase_wins(spec, folder)
            for name, value in figures.items():
                values.setdefault(f"{name}_{key}".replace("-", "_"), []).append(value)
            said = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
            print(f"seed {seed}, {key}: {said}", flush=True)
    return {name: float(np.nanmean(some)) for name, some in values.items()}


@torch.no_grad()
def phrase_wins(spec: Experiment, run: Path) -> float:
    """How often the shared model prefers the worse answer with the phrase behind it, in percent.

    By DPO's reward, over held-out pairs of the clients that are honest under `trigger`.
    """
    attack = Attack(name="trigger")
    clients = replace(spec, attack=None).clients()[0]
    hostile = attack.hostile([client.name for client in clients], spec.seed)
    learner = spec.build_task()
    learner.move_to(0)
    language = learner.language
    adapter = trees.load(run / "adapter" / "adapter_model.safetensors")
    won: list[float] = []
    for k, client in enumerate(clients):
        for row in () if k in hostile else client.test[:PAIRS]:
            answers = (attack.with_phrase(row.rejected), row.chosen)
            batch = [learner.tokens(row.prompt, answers, row.where)]
            after, before = (language.log_probabilities(one, batch) for one in (adapter, None))
            gain = after - before
            won.append(float(gain[0] > gain[1]))
    return 100 * float(np.mean(won))


def of_groups(spec: Experiment, rows: Any) -> tuple[float, float]:
    """Honest clients' accuracy, and that of those with an uncommon taste."""
    names = [client.name for client in replace(spec, attack=None).clients()[0]]
    attack = spec.attack or Attack()
    kinds = groups(attack, names, spec.seed, spec.data.known_tastes)
    if spec.attack is None:  # nobody is hostile, and the same clients are looked at
        kinds["honest"] = [*kinds["honest"], *kinds["hostile"]]

    def mean(some: Sequence[str]) -> float:
        return 100 * sum(rows[name][ACCURACY] for name in some) / len(some) if some else np.nan

    return mean(kinds["honest"]), mean(kinds.get("honest, uncommon taste", []))


# ---- cost


def cost() -> dict[str, float]:
    """The dearest rule's time, as a share of the local steps of a round."""
    torch.set_num_threads(1)
    spec = experiment("mean", "none", 0.0, 0, True)
    task: Any = spec.build_task()
    shard = encoded(spec, task)[1][0]
    task.move_to(0)
    theta = task.init(seeds.generator(0, "init"))
    local = replace(spec.algorithm.local, steps=10, batch_size=2)
    client = Client(0, task, shard, torch.Generator().manual_seed(0), 0, 1)
    train_locally(client, theta, replace(local, steps=1), {})  # the first makes what others find
    begun = time.perf_counter()
    train_locally(client, theta, local, {})
    steps = 100 * (time.perf_counter() - begun)
    draw = torch.Generator().manual_seed(0)
    values: dict[int, Tree] = {
        i: {name: torch.randn(t.shape, generator=draw) for name, t in theta.items()}
        for i in range(100)
    }
    shares, worst = dict.fromkeys(values, 0.01), 0.0
    begun = time.perf_counter()
    trees.total(trees.scale(value, 0.01) for value in values.values())
    plain = time.perf_counter() - begun
    for name, rule in list(RULES.items())[1:]:
        begun = time.perf_counter()
        RobustMeans(rule).mean(values, shares, lambda _: values[0])
        more = time.perf_counter() - begun - plain
        worst = max(worst, more / steps)
        print(f"{name}: {more:.2f} s more than a mean, beside {steps:.0f} s of steps", flush=True)
    return {"rule_cost_share": worst}


def is_fetched() -> bool:
    """Whether the demo's model is there; what is missing is printed."""
    try:
        located("smollm2-q4")
    except UserError as error:
        print(f"not on the model: {error}")
        return False
    return True


def cases_of(parts: Sequence[str], quick: bool) -> list[Case]:
    """What is run on language models."""
    cases: list[Case] = []
    if "models" in parts:
        rules = ("mean", "norm-bound") if quick else tuple(RULES)[:4]
        attacks = ON_MODELS[:3:2] if quick else ON_MODELS
        cases += [("feddpo", rule, *attack) for attack in attacks for rule in rules]
    if "methods" in parts:
        methods = ["fedpdpo"] if quick else list(METHODS)[1:]
        attacks = ON_METHODS[::2] if quick else ON_METHODS
        cases += [(method, "mean", *attack) for attack in attacks for method in methods]
    return cases


PARTS = ("loglinear", "cost", "models", "methods")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer seeds, the small model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="*", choices=PARTS, metavar="PART", help=" ".join(PARTS))
    every = cases_of(PARTS, False)
    for number, name in ((1, "rules"), (2, "attacks")):
        known = list(dict.fromkeys(str(case[number]) for case in every))
        said = f"of runs on models, some of {' '.join(known)}"
        parser.add_argument(f"--{name}", nargs="*", choices=known, metavar="NAME", help=said)
    parser.add_argument("--seeds", type=int, help="how many; by default 8, and 3 on models")
    arguments = parser.parse_args()
    parts = arguments.only or PARTS
    quick = arguments.quick
    keep_freed_memory()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "loglinear" in parts:
            figures |= loglinear(arguments.seeds or (1 if quick else 8))
        if "cost" in parts:
            figures |= cost()
        cases = [
            case
            for case in cases_of(parts, quick)
            if (arguments.rules is None or case[1] in arguments.rules)
            and (arguments.attacks is None or case[2] in arguments.attacks)
        ]
        if cases and (quick or is_fetched()):
            seed_count = arguments.seeds or (1 if quick else 3)
            figures |= on_models(Path(folder), cases, quick, seed_count)
    figures = {name: float(value) for name, value in figures.items() if np.isfinite(value)}
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
