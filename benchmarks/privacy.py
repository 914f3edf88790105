"""What a promise of privacy is worth, and what it costs.

    python benchmarks/privacy.py --quick
    python benchmarks/privacy.py --data FOLDER --json privacy.json

The accountant beside another one; the audit of the whole way of a sum, and of ways with a mistake
in them; SIGKILLs of a private run, whose ledger must never say less than was spent and whose model
must be that of a run that nobody killed; what a private local step costs beside an ordinary one,
and how far units' gradients are from those of batches of one; and the held-out accuracy of FedDPO
for several epsilons and ranks, with 95 % intervals over seeds and clients: privacy of each pair
and, of the shipped clients, which are twelve, of whole clients. With --data also of the workers of
the set `metaphor` who have most. Learning rates were chosen on validation rows of the shipped
clients, at epsilon 8 and without.

Figures: `epsilon_largest_difference_percent`, `audit_bound_over_epsilon`, `mutants_tried` and
`mutants_convicted`, `kills_tried`, `kills_undercharged` and `kills_unequal`,
`private_step_cost_ratio`, `per_example_error`, `accuracy_eps8_shipped_r1` and others by epsilon,
set and rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ending import end_with_children
from fedpref import Experiment, config, resume, run
from fedpref.channel.noise import RoundedGaussian
from fedpref.engines.private_sums import PrivateSums
from fedpref.engines.workers import keep_freed_memory
from fedpref.experiments.experiment import encoded
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.private_steps import PrivateSteps
from fedpref.federation.verbs import Client
from fedpref.numerics import seeds, trees
from fedpref.numerics.intervals import interval
from fedpref.numerics.metrics import ACCURACY
from fedpref.numerics.trees import Tree
from fedpref.privacy import FixedClip, Guarantee, Ledger, Secret
from fedpref.privacy.audit import audit_sums, lower_bound

# noise multiplier, chance, sums, delta
SETTINGS = (
    (1.0, 0.1, 100, 1e-3),
    (1.0, 0.05, 100, 1e-4),
    (0.8, 0.01, 1000, 1e-5),
    (1.0, 0.02, 300, 1e-3),
    (2.0, 0.2, 300, 1e-2),
    (5.0, 1.0, 30, 1e-3),
)
AUDITED = Guarantee(6.6, 1.0, 1e-5)
CANARIES, DIMENSIONS, SUMS, COHORT = 400, 6000, 10, 200
REUSED = "the same noise in every round"
MUTANTS = (
    "noise divided by the cohort's root",
    "no clip",
    "clip of the share",
    REUSED,
    "noise from the seed",
)
EPSILONS: tuple[float | None, ...] = (1.0, 3.0, 8.0, None)
RANKS = (1, 4)
FEW = ("bank", "school", "clinic")  # clients of a quick look
PAIRS = 8  # of a step whose cost is measured


def accountants() -> dict[str, float]:
    """The largest difference from prv-accountant, and from a closed form where all take part."""
    import prv_accountant  # type: ignore[import-untyped]

    worst = 0.0
    for multiplier, chance, sums, delta in SETTINGS:
        ours = Guarantee(multiplier, chance, delta).epsilon(sums)
        if chance < 1:
            mechanism = prv_accountant.PoissonSubsampledGaussianMechanism(
                noise_multiplier=multiplier, sampling_probability=chance
            )
            accountant = prv_accountant.PRVAccountant(
                prvs=mechanism, max_self_compositions=sums, eps_error=0.01, delta_error=delta / 1000
            )
            theirs = accountant.compute_epsilon(delta=delta, num_self_compositions=[sums])[1]
        else:
            theirs = closed(math.sqrt(sums) / multiplier, delta)
        worst = max(worst, abs(100 * (ours / float(theirs) - 1)))
        print(f"z {multiplier}, q {chance}, {sums} sums: {ours:.4f}, other {float(theirs):.4f}")
    return {"epsilon_largest_difference_percent": worst}


def closed(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism of that many standard deviations (Balle and Wang 2018)."""

    def cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        spent = cdf(-middle / mu + mu / 2) - math.exp(middle) * cdf(-middle / mu - mu / 2)
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


def audited(mutant: str, seed: int, folder: Path) -> float:
    """The lower bound of the whole way of a sum, or of one with a mistake."""
    private = PrivateSums(
        Secret((seed + 1).to_bytes(32, "big")),
        Ledger.at(folder),
        AUDITED,
        None,
        FixedClip(norm=1.0),
        COHORT,
        {"change": torch.zeros(DIMENSIONS)},
    )
    unit = private.lattice.unit
    if mutant == "no clip":
        private.lattice = dataclasses.replace(private.lattice, clip=1e9, most=1e12)

    def noise(round: int) -> torch.Tensor:
        words = private.secret.words(2 * DIMENSIONS, "noise", round=round, call=1)
        return torch.from_numpy(RoundedGaussian(private.lattice.deviation).draw(words)) * unit

    def release(round: int, present: Sequence[tuple[int, Tree]]) -> Tree:
        messages = [private.encode(tree, i, round, 1) for i, tree in present]
        plain = torch.stack([tree["change"] for _, tree in present]).sum(0)
        if mutant == "clip of the share":  # x / n is short enough, and n times too much comes back
            return {"change": plain + noise(round) / COHORT}
        if mutant == "noise divided by the cohort's root":
            return {"change": plain + noise(round) / math.sqrt(COHORT)}
        released = private.release(messages, round, 1)["change"] * COHORT
        if mutant == "noise from the seed":  # which an attacker has
            released = released - noise(round)
        return {"change": released}

    if mutant == REUSED:
        return by_differences(private, noise(0), seed)
    longer = 5.0 if mutant == "no clip" else 1.0
    return audit_sums(
        release,
        canaries=CANARIES,
        dimensions=DIMENSIONS,
        rounds=SUMS,
        clip=1.0,
        delta=AUDITED.delta,
        seed=seed,
        length=longer,
    ).epsilon


def by_differences(private: PrivateSums, noise: torch.Tensor, seed: int) -> float:
    """The lower bound where every sum has one noise, which differences of rounds do not have.

    Which canaries could come in which round the attacker knows, as a coordinator does.
    """
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(CANARIES, DIMENSIONS)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    was_in = rng.random(CANARIES) < 0.5
    scores = np.zeros(CANARIES)
    for round in range(0, SUMS, 2):
        turns = rng.random((2, CANARIES)) < 0.5
        released = []
        for k in (0, 1):
            present = np.flatnonzero(was_in & turns[k]).tolist()
            trees_sent = [{"change": torch.from_numpy(directions[i])} for i in present]
            pairs = zip(present, trees_sent, strict=True)
            messages = [private.encode(tree, i, round + k, 1) for i, tree in pairs]
            total = torch.stack([m["change"].long() for m in messages]).sum(0)
            released.append((total * private.lattice.unit + noise).numpy())
        apart = directions @ (released[0] - released[1])
        scores += apart * (turns[0].astype(float) - turns[1])
    return lower_bound(scores, was_in, AUDITED.delta).epsilon


def audit(scratch: Path, seeds: int) -> dict[str, float]:
    """The bound of the real way beside the accountant's epsilon, and mistakes it convicts."""
    epsilon = AUDITED.epsilon(SUMS)
    bounds = [audited("", seed, scratch / f"right-{seed}") for seed in range(seeds)]
    print(f"accountant {epsilon:.2f}, bounds {', '.join(f'{one:.2f}' for one in bounds)}")
    convicted = 0
    for mutant in MUTANTS:
        found = audited(mutant, 0, scratch / mutant.replace(" ", "-"))
        convicted += found > epsilon
        print(f"{mutant}: {found:.2f}")
    return {
        "audit_bound_over_epsilon": max(bounds) / epsilon,
        "mutants_tried": len(MUTANTS),
        "mutants_convicted": convicted,
    }


def steps(rounds: int) -> dict[str, float]:
    """The ratio of processor seconds of private local steps, and the error of units' gradients.

    Eight pairs, the shipped model in float32, both factors of rank 8: the most numbers that have
    noise here. Steps are taken in turn, and the ratio is the median over pairs of them.
    """
    content = {
        "data": {"name": "builtin"},
        "partition": {"name": "natural", "only": ["bank"], "max_rows": 60},
        "task": {"model": {"dtype": "float32"}},
    }
    keep_freed_memory()  # as a run does
    torch.set_num_threads(1)
    spec = config.parse(Experiment, content, "steps")
    task: Any = spec.build_task()
    shard = encoded(spec, task)[1][0]
    shard = dataclasses.replace(shard, train=shard.train[:PAIRS])
    task.move_to(0)
    theta = task.init(seeds.generator(0, "init"))
    local = LocalTraining(steps=2, batch_size=PAIRS, learning_rate=1e-3)
    with tempfile.TemporaryDirectory() as folder:

        def seconds(number: int, is_private: bool) -> float:
            private = PrivateSteps(
                0,
                number,
                1,
                secret=Secret(bytes(32)),
                ledger=Ledger.at(Path(folder)),
                guarantee=Guarantee(1.0, 1.0, 1e-3),
                batch=PAIRS,
                unit="example",
                clip=1.0,
            )
            draws = torch.Generator().manual_seed(number)
            made = private if is_private else None
            client = Client(0, task, shard, draws, 0, 1, private=made)
            begun = time.process_time()
            train_locally(client, theta, local, {})
            if is_private:
                private.settle()
            return time.process_time() - begun

        pairs = [(seconds(k, False), seconds(k, True)) for k in range(rounds + 1)][1:]
    ratio = statistics.median(private / plain for plain, private in pairs)
    rng = torch.Generator().manual_seed(1)
    moved = {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in theta.items()}
    units = [[i] for i in range(PAIRS)]
    draws = partial(seeds.generator, 1)
    (together,) = task.gradients_apart(moved, moved, shard, units, PAIRS, list(moved), draws)
    worst = 0.0
    for i in range(PAIRS):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in moved.items()}
        one = dataclasses.replace(shard, train=shard.train[i : i + 1])
        losses, _ = task.losses(leaves, next(iter(task.batches(one)))[0])
        losses.sum().backward()
        alone = torch.cat([tensor.grad.flatten() for tensor in leaves.values()])
        apart = torch.cat([together.gradients[name][i].flatten() for name in moved])
        worst = max(worst, float((apart - alone).norm() / alone.norm()))
    print(f"private steps cost {ratio:.3f} of ordinary ones; gradients differ by {worst:.1e}")
    return {"private_step_cost_ratio": ratio, "per_example_error": worst}


def private(epsilon: float | None, rank: int, seed: int, **changes: Any) -> Experiment:
    """FedDPO with client-level privacy, or the same without."""
    content: dict[str, Any] = {
        "name": "privacy",
        "seed": seed,
        "data": {"name": "builtin"},
        "task": {"model": {"lora_r": rank}, "loss": {"name": "dpo", "beta": 0.1}},
        "algorithm": {
            "name": "feddpo",
            "aggregate": {"name": "frozen-a"},
            "local": {"steps": 6, "batch_size": 4, "learning_rate": 5e-3},
        },
        "federation": {"weighting": "equal"},
        "rounds": 8,
        "privacy": None
        if epsilon is None
        else {"epsilon": epsilon, "delta": 1e-2, "clip": {"name": "fixed", "norm": 0.2}},
    }
    return config.parse(Experiment, {**content, **changes}, "privacy")


def kills(scratch: Path, count: int) -> dict[str, float]:
    """SIGKILLs of a private run at moments spread over it; each is resumed to its end."""
    few = {"name": "natural", "only": ["bank", "school", "clinic"], "max_rows": 40}
    spec = private(8.0, 1, 0, rounds=5, partition=few, workers=1)
    context = multiprocessing.get_context("spawn")
    begun = time.perf_counter()
    key = os.urandom(32)
    whole = started(scratch / "whole", key)
    process = context.Process(target=run_into, args=(spec, whole))
    process.start()
    process.join()
    took = time.perf_counter() - begun
    wanted = trees.load(whole / "adapter/adapter_model.safetensors")
    undercharged = unequal = 0
    for number in range(count):
        folder = started(scratch / f"kill-{number}", key)
        process = context.Process(target=run_into, args=(spec, folder))
        process.start()
        process.join(took * (number + 1) / (count + 1))
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        before = Ledger.at(folder / "privacy").charged
        process = context.Process(target=run_into, args=(spec, folder))
        process.start()
        process.join()
        after = Ledger.at(folder / "privacy").charged
        rounds = len(RunDirectory(folder).read_rows("metrics.jsonl"))
        undercharged += after < before or after < rounds
        made = trees.load(folder / "adapter/adapter_model.safetensors")
        unequal += not all(torch.equal(made[name], wanted[name]) for name in wanted)
        shutil.rmtree(folder)
    print(f"{count} kills: {undercharged} undercharged, {unequal} ended with other bits")
    return {"kills_tried": count, "kills_undercharged": undercharged, "kills_unequal": unequal}


def started(folder: Path, key: bytes) -> Path:
    """A folder whose run will have a given secret."""
    folder.mkdir(parents=True)
    (folder.parent / f"{folder.name}.key").write_bytes(key)
    return folder


def run_into(spec: Experiment, folder: Path) -> None:
    """Begin a run, or go on with it; its secret is the one beside the folder."""
    key = (folder.parent / f"{folder.name}.key").read_bytes()
    setattr(Secret, "of", staticmethod(lambda _: Secret(key)))  # noqa: B010
    if RunDirectory(folder).has_begun:
        resume(folder)
    else:
        if folder.exists():
            folder.rmdir()
        run(spec, folder)


def of_pairs(epsilon: float | None, rank: int, seed: int, **changes: Any) -> Experiment:
    """FedDPO with privacy of each pair, or the same without."""
    clip = {"name": "fixed", "norm": 1.0}
    content: dict[str, Any] = {
        "name": "privacy",
        "seed": seed,
        "data": {"name": "builtin"},
        "task": {"model": {"lora_r": rank}, "loss": {"name": "dpo", "beta": 0.1}},
        "algorithm": {
            "name": "feddpo",
            "aggregate": {"name": "frozen-a"},
            "local": {
                "steps": 1,
                "batch_size": 32,
                "learning_rate": 1e-2 if epsilon is None else 3e-3,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
            },
        },
        "rounds": 8,
        "privacy": None
        if epsilon is None
        else {"unit": "example", "epsilon": epsilon, "delta": 1e-3, "clip": clip},
    }
    return config.parse(Experiment, {**content, **changes}, "privacy")


def accuracy(
    scratch: Path, data: str | None, quick: bool, wanted: Sequence[str] | None
) -> dict[str, float]:
    """Held-out accuracy by epsilon and rank, a mean over clients and seeds with its interval."""
    found: dict[str, float] = {}
    few: dict[str, Any] = {"partition": {"name": "natural", "only": list(FEW), "max_rows": 60}}
    sets: dict[str, tuple[Any, dict[str, Any]]] = {"shipped": (of_pairs, few if quick else {})}
    if data:
        workers = {
            "data": {"name": "files", "path": f"{data}/metaphor_literal_choices.jsonl.gz"},
            "partition": {"name": "natural", "column": "client", "min_rows": 200},
        }
        sets["metaphor"] = of_pairs, workers
    if not quick:
        sets["clients_shipped"] = private, {}
    for name in wanted or sets:
        if name not in sets:
            why = "clients are measured without --quick" if data else "it needs --data"
            print(f"{name}: left out; {why}")
            continue
        made, changes = sets[name]
        for rank in RANKS[:1] if quick else RANKS:
            for epsilon in (8.0, None) if quick else EPSILONS:
                values = []
                for seed in range(1 if quick else 3):
                    spec = made(epsilon, rank, seed, **changes)
                    folder = scratch / f"{name}-{rank}-{epsilon}-{seed}"
                    for _ in events(spec, RunDirectory(folder), scratch / "cache"):
                        pass
                    last = FinishedRun.at(folder).last_evaluation["clients"]
                    values.append([100 * last[client][ACCURACY] for client in sorted(last)])
                    shutil.rmtree(folder)
                table = np.array(values)
                low, high = interval(table)
                said = f"eps{epsilon:g}" if epsilon else "none"
                key = f"accuracy_{said}_{name}_r{rank}"
                found |= {key: float(table.mean()), f"{key}_low": low, f"{key}_high": high}
                print(f"{key}: {table.mean():.1f} [{low:.1f}, {high:.1f}]", flush=True)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def draw(figures: dict[str, float], file: Path) -> None:
    """A picture of accuracy against epsilon, with intervals."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fedpref"
    axes = plt.figure(figsize=(6.4, 3.6)).gca()
    marks = ["eps1", "eps3", "eps8", "none"]
    titles = {"shipped": "shipped clients", "metaphor": "metaphor's workers"}
    for number, (name, title) in enumerate(titles.items()):
        for rank in RANKS:
            keys = [f"accuracy_{mark}_{name}_r{rank}" for mark in marks]
            if not all(key in figures for key in keys):
                continue
            means = np.array([figures[key] for key in keys])
            low, high = (
                np.array([figures[f"{key}_{end}"] for key in keys]) for end in ("low", "high")
            )
            places = np.arange(4) + 0.06 * (2 * number + RANKS.index(rank) - 1.5)
            style = {"color": f"C{number}", "linestyle": "-" if rank == RANKS[0] else "--"}
            spread = [means - low, high - means]
            axes.errorbar(places, means, spread, label=f"{title}, rank {rank}", capsize=2, **style)
    axes.axhline(50, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(4), ["epsilon 1", "3", "8", "no noise"])
    axes.set_ylabel("held-out pair accuracy, %")
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    axes.set_ylim(44, 66)
    axes.figure.savefig(file, bbox_inches="tight", metadata={"Date": None})


SETS = ("shipped", "metaphor", "clients_shipped")
PARTS = ("accountants", "audit", "kills", "steps", "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a folder with metaphor_literal_choices.jsonl.gz")
    parser.add_argument("--quick", action="store_true", help="one seed, rank 1, few kills")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="*", choices=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--sets", nargs="*", choices=SETS, metavar="SET", help=" ".join(SETS))
    parser.add_argument("--draw", type=Path, help="draw accuracies of a run of all into this file")
    arguments = parser.parse_args()
    end_with_children()
    parts = arguments.only or PARTS
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "accountants" in parts:
            figures |= accountants()
        if "audit" in parts:
            figures |= audit(scratch / "audit", 2 if arguments.quick else 4)
        if "kills" in parts:
            figures |= kills(scratch / "kills", 3 if arguments.quick else 20)
        if "steps" in parts:
            figures |= steps(5 if arguments.quick else 15)
        if "accuracy" in parts:
            figures |= accuracy(scratch / "runs", arguments.data, arguments.quick, arguments.sets)
    print(json.dumps(figures, indent=1))
    if arguments.draw:
        draw(figures, arguments.draw)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
