"""FIRM against its rivals: on a convex problem whose Pareto set is known, on drawn answers of the
shipped model, and its speed.

    python benchmarks/firm.py
    python benchmarks/firm.py --parts convex speed

`convex`: clients with quadratics and noisy gradients; distances to the Pareto set, drift as the
regulariser grows. `shipped`: configs/firm.yaml under every algorithm, with skewed and alike clients
and a third reward, and the front over preferences. `speed`: samples per second of the processor
against TRL's RLOO trainer, in turns, and what a second objective adds to a step. `pairs`, only
where it is asked for: the front on hh-rlhf's helpful and harmless pairs, without drawn answers.
Runs are kept under --output and not done again.

Figures: `drift_ratio_b0_convex`, `drift_falls_with_b`, `hypervolume_ratio_RIVAL` and
`hypervolume_ratio_RIVAL_equal_kl`, `smoothness_ratio_RIVAL`, `drift_ratio_b0`,
`upload_ratio_fedcmoo`, `preference_monotone`, `speed_ratio_trl`, `objective_cost_ratio`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from scipy import stats

from fedpref import Experiment
from fedpref.algorithms import FIRM, FSMGDA, FedCMOO, Scalarized
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import EVALUATION, METRICS
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.objectives import Objectives
from fedpref.federation.verbs import Client
from fedpref.numerics import seeds
from fedpref.numerics.metrics import of_objectives
from fedpref.numerics.min_norm import MinNorm
from fedpref.reports.equal_terms import at, course
from fedpref.reports.progress import show
from fedpref.runs.pareto import follows, hypervolume, interpolated, measured, plan_front
from fedpref.runs.sweep import plan, sweep

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CONFIG, PAIRS = CONFIGS / "firm.yaml", CONFIGS / "hh-objectives.yaml"
RIVALS = ("firm_b0", "scalarized", "fsmgda", "fedcmoo")
VARIANTS = [
    "firm",
    "firm_b0: algorithm.solver.b=0",
    *RIVALS[1:],
    "brief_alone: algorithm.name=scalarized algorithm.preference=[1,0]",
    "kind_alone: algorithm.name=scalarized algorithm.preference=[0,1]",
]
FEWER = [VARIANTS[0], VARIANTS[1], "scalarized", "fedcmoo"]
REWARDS = yaml.safe_load(CONFIG.read_text())["task"]["rewards"]
FLOOR = {"brief": -1.0, "kind": 0.0, "detailed": -1.0}  # the least that these rewards can be
PARTS = ["convex", "shipped", "speed", "pairs"]
STRENGTHS = (0.0, 0.01, 0.1, 1.0, 10.0)
NOISE, DIMENSIONS = 0.5, 20
UNMOVED = (
    1e-8  # a learning rate at which answers stay as long as they are, so that both draw the same
)


# ---- a convex problem


@dataclass(frozen=True)
class Corner:
    """A client's two quadratics: curvatures [2] and lowest points [2, D]."""

    name: str
    curvature: torch.Tensor
    centre: torch.Tensor

    def __len__(self) -> int:
        return 1


class Quadratics:
    """Two objectives, each a mean of clients' quadratics. The Pareto set is a curve between the
    objectives' lowest points.
    """

    objectives = ("first", "second")
    description, prepares, device, devices = "quadratics", "nothing", torch.device("cpu"), 1

    def move_to(self, worker: int) -> None:
        pass

    def init(self, rng: torch.Generator) -> dict[str, torch.Tensor]:
        return {"x": torch.full((DIMENSIONS,), 3.0)}

    def parts(self, settings: Any, rng: torch.Generator) -> dict[str, torch.Tensor]:
        return {}

    def draw(self, params: Any, start: Any, shard: Corner, size: Any, rng: torch.Generator) -> Any:
        return shard, NOISE * torch.randn(2, DIMENSIONS, generator=rng)

    def losses(
        self, params: Any, batch: tuple[Corner, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        shard, noise = batch
        apart = params["x"] - shard.centre
        return 0.5 * shard.curvature * apart.square().sum(1) + (noise * params["x"]).sum(1), {}


def corners(seed: int, clients: int = 8, spread: float = 1.0) -> list[Corner]:
    rng = torch.Generator().manual_seed(seed)
    aims = torch.randn(2, DIMENSIONS, generator=rng)
    found = []
    for i in range(clients):
        curvature = 0.5 + torch.rand(2, generator=rng)
        found.append(
            Corner(str(i), curvature, aims + spread * torch.randn(2, DIMENSIONS, generator=rng))
        )
    return found


def distance(x: torch.Tensor, clients: Sequence[Corner]) -> float:
    """From the Pareto set: the lowest points of all weighted sums of the two objectives."""
    weights = torch.linspace(0, 1, 1001)[:, None]
    curvature = torch.stack([client.curvature for client in clients]).mean(0)
    pulls = torch.stack([client.curvature[:, None] * client.centre for client in clients]).mean(0)
    points = (weights * pulls[0] + (1 - weights) * pulls[1]) / (
        weights * curvature[0] + (1 - weights) * curvature[1]
    )
    return float((points - x).norm(dim=1).min())


def convex(numbers: Sequence[int], rounds: int) -> tuple[dict[str, float], Table]:
    """Of each method, means over seeds: the distance to the Pareto set, drift of weights and of
    parameters.
    """
    local = LocalTraining(
        steps=5,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        max_grad_norm=1e9,
    )
    aggregate: Any = FIRM().aggregate
    methods: dict[str, Any] = {
        f"firm, b = {b:g}": FIRM(local=local, solver=MinNorm(b=b), aggregate=aggregate)
        for b in STRENGTHS
    }
    methods |= {
        "scalarized": Scalarized(local=local),
        "fsmgda": FSMGDA(local=local),
        "fedcmoo": FedCMOO(local=local),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    with one_thread():
        for seed in numbers:
            clients, task = corners(seed), Quadratics()
            for name, method in methods.items():
                engine = Simulation(task, clients, seed=seed, rounds=rounds)  # type: ignore[arg-type]
                state = method.init(engine, task.init(seeds.generator(0, "init")))
                reports = []
                for number in range(rounds):
                    engine.begin(number, engine.clients)
                    state, report = method.step(engine, state)
                    reports.append(report)
                late = reports[rounds // 2 :]
                row = {"distance": distance(state.adapter["x"], clients)}
                row |= {
                    key: statistics.fmean(r.get(f"drift/{key}", float("nan")) for r in late)
                    for key in ("weights", "theta")
                }
                found[name].append(row)
    table = Table(
        "",
        "distance to the Pareto set",
        "drift of weights",
        "drift of parameters",
        title="convex",
        box=MARKDOWN,
    )
    for name, rows in found.items():
        table.add_row(
            name,
            *(
                with_interval([row[key] for row in rows], 4)
                for key in ("distance", "weights", "theta")
            ),
        )
    drifts = {
        name: statistics.fmean(row["weights"] for row in rows)
        for name, rows in found.items()
        if name.startswith("firm")
    }
    falls = [drifts[f"firm, b = {b:g}"] for b in STRENGTHS]
    return {
        "drift_ratio_b0_convex": falls[2] / falls[0],
        "drift_falls_with_b": float(falls == sorted(falls, reverse=True)),
    }, table


# ---- drawn answers


def shipped(
    numbers: Sequence[int], settings: Sequence[str], is_quick: bool, output: Path, progress: Console
) -> tuple[dict[str, float], list[Table]]:
    """Every algorithm on the shipped prompts, dealt as clients wrote them and at random, with two
    rewards and three, and the front; quickly, what figures are of alone.
    """
    variants = VARIANTS[:5] if is_quick else VARIANTS
    skewed, table = compared(CONFIG, variants, numbers, settings, output / "skewed", progress)
    tables = [table]
    if not is_quick:
        iid = changed(output / "iid.yaml", partition={"name": "iid", "clients": 4})
        apart = [one for one in settings if "partition" not in one]
        tables.append(compared(iid, FEWER, numbers, apart, output / "iid", progress)[1])
        rewards = {**REWARDS, "detailed": {"name": "length", "target": 20}}
        three = changed(output / "three.yaml", rewards=rewards)
        tables.append(compared(three, FEWER, numbers, settings, output / "three", progress)[1])
    points = 2 if is_quick else 5
    names, front = plan_front(CONFIG, points, numbers, settings, output / "front")
    done(
        {path: one for some in front.values() for path, one in some.items()},
        output / "cache",
        progress,
    )
    trained = measured(names, {preference: list(some) for preference, some in front.items()})
    mixed = list(interpolated(names, front, 1, output / "cache"))
    table = Table("preference", *names, "kl", "trained", title="preferences", box=MARKDOWN)
    for point in sorted([*trained, *mixed], key=lambda point: point.preference):
        shares, values = (
            " ".join(f"{value:.3g}" for value in some) for some in (point.preference, point.values)
        )
        table.add_row(
            shares,
            *values.split(),
            f"{point.beside['kl']:.2f}",
            "yes" if point.is_trained else "no: mean of neighbours",
        )
    skewed["preference_monotone"] = follows(trained)
    skewed["preference_monotone_interpolated"] = follows([*trained, *mixed])
    return skewed, [*tables, table]


def changed(
    path: Path,
    *,
    partition: Mapping[str, Any] | None = None,
    rewards: Mapping[str, Any] | None = None,
) -> Path:
    """configs/firm.yaml with another partition or other rewards, in a file."""
    whole = yaml.safe_load(CONFIG.read_text())
    whole["partition"] = partition or whole["partition"]
    whole["task"]["rewards"] = rewards or whole["task"]["rewards"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def compared(
    config: Path,
    variants: Sequence[str],
    numbers: Sequence[int],
    settings: Sequence[str],
    output: Path,
    progress: Console,
) -> tuple[dict[str, float], Table]:
    """Every variant's held-out rewards, what stands beside them, and how evenly it trained; ratios
    of FIRM to its rivals.
    """
    runs = plan(config, variants, numbers, settings, output)
    done(runs, output / "cache", progress)
    by_name: dict[str, list[Path]] = {}
    for path in runs:
        by_name.setdefault(path.parent.name, []).append(path)
    ends = {name: [ended(path) for path in paths] for name, paths in by_name.items()}
    objectives = [f"rewards/{objective}" for objective in Experiment.load(config).task.objectives]
    floor = [FLOOR[name.removeprefix("rewards/")] for name in objectives]
    volumes = {
        name: [hypervolume(np.array([[row[key] for key in objectives]]), floor) for row in rows]
        for name, rows in ends.items()
    }
    measures = {name: [trained(path) for path in paths] for name, paths in by_name.items()}
    beside = [name for name in of_objectives(ends["firm"][0]) if name not in objectives]
    heads = [
        name.removeprefix("rewards/").removeprefix("completions/")
        for name in (*objectives, *beside)
    ]
    table = Table(
        "",
        *heads,
        "hypervolume",
        "roughness",
        "drift of weights",
        "drift of adapters",
        "bytes up",
        title=output.name,
        box=MARKDOWN,
    )
    for name, rows in ends.items():
        shown = [with_interval([row[key] for row in rows], 3) for key in (*objectives, *beside)]
        more = [
            [one[key] for one in measures[name]]
            for key in ("roughness", "drift/weights", "drift/theta")
        ]
        up = f"{statistics.fmean(one['bytes_up'] for one in measures[name]):,.0f}"
        table.add_row(
            name,
            *shown,
            with_interval(volumes[name], 3),
            *(with_interval(values, 5) for values in more),
            up,
        )
    mean = {
        key: {name: statistics.fmean(one[key] for one in rows) for name, rows in measures.items()}
        for key in measures["firm"][0]
    }
    rivals = [name for name in RIVALS if name in volumes]
    found = {
        f"hypervolume_ratio_{name}": statistics.fmean(volumes["firm"])
        / statistics.fmean(volumes[name])
        for name in rivals
        if any(volumes[name])  # of few answers none may be above where volumes begin
    }
    found |= {
        f"smoothness_ratio_{name}": mean["roughness"]["firm"] / mean["roughness"][name]
        for name in rivals
        if mean["roughness"][name] > 0  # of none that is not known
    }
    at_one_kl = equal_kl({name: by_name[name] for name in ("firm", *rivals)}, objectives, floor)
    ours = at_one_kl.pop("firm")
    for name, theirs in at_one_kl.items():
        if any(theirs):
            ratio = statistics.fmean(ours) / statistics.fmean(theirs)
            found[f"hypervolume_ratio_{name}_equal_kl"] = ratio
        gains = [own - other for own, other in zip(ours, theirs, strict=True)]
        key = f"hypervolume_gain_{name}_equal_kl"
        found |= dict(zip((key, f"{key}_low", f"{key}_high"), student(gains), strict=False))
    found["drift_ratio_b0"] = mean["drift/weights"]["firm"] / mean["drift/weights"]["firm_b0"]
    found["upload_ratio_fedcmoo"] = mean["bytes_up"]["fedcmoo"] / mean["bytes_up"]["firm"]
    return found, table


def equal_kl(
    runs: Mapping[str, Sequence[Path]], objectives: Sequence[str], floor: Sequence[float]
) -> dict[str, list[float]]:
    """Each line's hypervolume where its KL from the base was first that which all of a seed reach,
    by seed.
    """
    ways = {
        name: [
            course(folder.read_rows(EVALUATION), folder.read_rows(METRICS))
            for folder in map(RunDirectory, paths)
        ]
        for name, paths in runs.items()
    }
    volumes: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(len(ways["firm"])):
        most = min(
            max(some[seed].mean("kl", k) for k in range(len(some[seed].clients)))
            for some in ways.values()
        )
        for name, some in ways.items():
            values = [at(name, some[seed], "kl", most, key) for key in objectives]
            point = [statistics.fmean(clients.values()) for clients in values]
            volumes[name].append(hypervolume(np.array([point]), floor))
    return volumes


def done(runs: Mapping[Path, Experiment], cache: Path, progress: Console) -> None:
    for path, happenings in sweep(runs, cache):
        progress.print(str(path), highlight=False)
        show(happenings, progress)


def ended(path: Path) -> dict[str, float]:
    """A run's last held-out means over clients."""
    return {
        name: summary["mean"]
        for name, summary in RunDirectory(path).read_rows(EVALUATION)[-1]["summary"].items()
    }


def trained(path: Path) -> dict[str, float]:
    """How uneven a run's training was, drift, bytes.

    Roughness: the variance of an objective's mean reward over rounds around its quadratic trend, in
    squared ranges of the reward, averaged over objectives; none of fewer than five rounds, which
    such a trend fits, nor for FSMGDA, whose answers are drawn from policies that are trained apart
    and not used.
    """
    rows = RunDirectory(path).read_rows(METRICS)
    found = {
        key: statistics.fmean(row.get(key, float("nan")) for row in rows)
        for key in ("drift/weights", "drift/theta", "bytes_up")
    }
    rounds = np.arange(len(rows))
    rests = []
    for name in Experiment.load(path / "config.yaml").task.objectives:
        values = np.array([row[f"rewards/{name}"] for row in rows]) / (1 - FLOOR[name])
        rests.append(float(np.var(values - np.polyval(np.polyfit(rounds, values, 2), rounds))))
    return {
        **found,
        "roughness": statistics.fmean(rests)
        if len(rows) >= 5 and "weights/0" not in rows[0]
        else float("nan"),
    }


# ---- given pairs


def offline(
    numbers: Sequence[int], settings: Sequence[str], output: Path, progress: Console
) -> Table:
    """The front between helpful and harmless pair accuracy, and linear scalarisation with equal
    shares: training on the union.
    """
    names, front = plan_front(PAIRS, 3, numbers, settings, output)
    union = plan(PAIRS, ["union: algorithm.name=scalarized"], numbers, settings, output)
    done(
        {**{path: one for some in front.values() for path, one in some.items()}, **union},
        output / "cache",
        progress,
    )
    table = Table("preference", *names, title="pairs: held-out accuracy", box=MARKDOWN)
    rows = {
        " ".join(f"{share:g}" for share in preference): list(some)
        for preference, some in front.items()
    }
    for title, paths in {**rows, "union": list(union)}.items():
        ends = [ended(path) for path in paths]
        table.add_row(
            title,
            *(
                with_interval([row[f"rewards/accuracies/{name}"] for row in ends], 3)
                for name in names
            ),
        )
    return table


# ---- speed


def speed(steps: int, turns: int) -> dict[str, float]:
    """Samples per second of the processor, one thread, in turns: TRL's RLOO trainer on the sum of
    two rewards, ours on the same sum, FIRM with a gradient for each, and ours on one reward.
    """
    spec = Experiment.load(CONFIG, ["task.estimator={name: rloo}"])
    keep_freed_memory()
    with one_thread(), tempfile.TemporaryDirectory() as scratch:
        data = spec.clients()[0][0]
        one = replace(spec.task, rewards=dict(list(spec.task.rewards.items())[:1]))  # type: ignore[type-var]
        equal = torch.tensor([0.5, 0.5])
        both, first = spec.task.build(), one.build()
        lines = {
            "firm": (both, Objectives(lambda gram: MinNorm()(gram, equal))),
            "sum": (both, Objectives(equal)),
            "one": (first, None),
        }
        prompts = [
            str(row.prompt) if isinstance(row.prompt, str) else list(row.prompt)
            for row in data.train
        ]
        theirs = trl_trainer(prompts, both, spec, steps, Path(scratch))
        seconds: dict[str, list[float]] = {"trl": [], **{name: [] for name in lines}}
        for turn in range(turns + 1):
            for name, (learner, objectives) in lines.items():
                local = replace(spec.algorithm.local, steps=steps, learning_rate=UNMOVED)  # type: ignore[union-attr]
                client = Client(
                    0, learner, learner.encode(data), seeds.generator(turn, "speed"), 0, 1
                )
                adapter = learner.init(seeds.generator(0, "init"))
                step = partial(train_locally, client, adapter, local, {}, objectives=objectives)
                seconds[name].append(used(step))
            seconds["trl"].append(used(theirs))
    # the first turn warms up
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "speed_ratio_trl": medians["trl"] / medians["sum"],
        "speed_ratio_trl_firm": medians["trl"] / medians["firm"],
        "objective_cost_ratio": medians["firm"] / medians["one"],
        "samples_per_cpu_second": steps * 8 * 4 / medians["sum"],
        "samples_per_cpu_second_trl": steps * 8 * 4 / medians["trl"],
    }


def used(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def trl_trainer(
    prompts: Sequence[Any], learner: Any, spec: Any, steps: int, folder: Path
) -> Callable[[], Any]:
    """TRL's RLOO trainer on the same model, prompts, rewards, and sizes of batches."""
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import RLOOConfig, RLOOTrainer

    model = str(Path(__file__).resolve().parent.parent / "src/fedpref/models/builtin")
    settings = RLOOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8 * spec.task.num_generations,
        num_generations=spec.task.num_generations,
        max_completion_length=spec.task.sampling.max_completion_length,
        max_steps=steps,
        learning_rate=UNMOVED,
        beta=spec.task.estimator.kl,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    rewards = list(learner.rewards.values())
    for function, name in zip(rewards, learner.objectives, strict=True):
        object.__setattr__(function, "__name__", name)
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    trainer = RLOOTrainer(
        model=loaded, reward_funcs=rewards, args=settings, train_dataset=data, peft_config=lora
    )
    return trainer.train


def with_interval(values: Sequence[float], digits: int) -> str:
    """The mean, and Student's 95 % interval over seeds."""
    mean, *ends = student(values)
    if np.isnan(mean):
        return ""
    between = ", ".join(f"{end:.{digits}f}" for end in ends)
    return f"{mean:.{digits}f} [{between}]" if ends else f"{mean:.{digits}f}"


def student(values: Sequence[float]) -> tuple[float, ...]:
    """A mean and the ends of its 95 % interval, where there is more than one value."""
    mean = statistics.fmean(values)
    if len(values) < 2 or np.isnan(mean):
        return (mean,)
    spread = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - spread, mean + spread


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:3])
    parser.add_argument(
        "--data",
        help="where the part `pairs` finds hh-rlhf: a folder, or the Hub dataset if it is not "
        "given",
    )
    parser.add_argument(
        "--fewer",
        action="store_true",
        help="of `shipped` FIRM, b = 0, scalarized and FedCMOO alone, on clients as they are",
    )
    parser.add_argument(
        "--settings",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of `shipped`, as the model's",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark-firm"), help="where runs are kept"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, few rounds and points; the figures mean less",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    console, progress = Console(width=220), Console(stderr=True)
    numbers = range(1 if arguments.quick else arguments.seeds)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) if arguments.quick else arguments.output
        quick = (
            ["rounds=6", "partition.max_clients=2", "evaluate_every=0"] if arguments.quick else []
        )
        if "convex" in arguments.parts:
            figures, table = convex(range(3 if arguments.quick else 10), 60)
            found |= figures
            console.print(table)
        if "speed" in arguments.parts:
            found |= speed(2 if arguments.quick else 6, 1 if arguments.quick else 3)
        if "shipped" in arguments.parts:
            settings = [*quick, *arguments.settings]
            if arguments.fewer:
                figures, table = compared(
                    CONFIG, FEWER, numbers, settings, output / "fewer", progress
                )
                tables = [table]
            else:
                figures, tables = shipped(numbers, settings, arguments.quick, output, progress)
            found |= figures
            console.print(*tables)
        if "pairs" in arguments.parts:
            place = [f"data.path={arguments.data}"] if arguments.data else []
            console.print(
                offline(
                    numbers,
                    [*place, *(["rounds=1"] if arguments.quick else [])],
                    output / "pairs",
                    progress,
                )
            )
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
