"""Distributed DPO: its laws on log-linear policies, language models over servers and graphs, and
the paper's way of working as a peer.

    python benchmarks/distributed_dpo.py --data FOLDER
    python benchmarks/distributed_dpo.py --parts laws scale

Four parts. `laws` fits the theory's exponents (distributed_laws.py). `models` trains on hh and
ukpconvarg, at random and by objective or worker (distributed_models.py). `program` comes to the
same loss as full fine-tuning with whole models exchanged (paper_program.py), and compares bytes and
processor time. `scale` runs 64 clients on a ring. Without --data there are no models, and the
program learns from the shipped pairs. Runs of language models are kept under --output and not done
again; --figures writes pictures.

Figures: `drift_exponent`, `consensus_formula_error`, `participation_r2`, `speedup_exponent`,
`bytes_ratio_vs_paper` and `bytes_ratio_vs_tuned`, `cpu_ratio_vs_paper` and `cpu_ratio_vs_tuned`,
`mixing_share`, `seconds_a_round`, `peak_memory_mb`.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from distributed_laws import LAWS, Law
from distributed_models import CONFIGS, DATASETS, Outcome, train
from fedpref import Experiment
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.federation.common import train_own
from fedpref.federation.network import Network
from fedpref.numerics import seeds
from fedpref.reports.tables import bytes_text
from paper_program import Race, race

FIGURES = {
    "drift_exponent": "drift floor: exponent of E - 1",
    "participation_r2": "participation floor: variance explained by (N - S) / (S (N - 1))",
    "consensus_formula_error": "consensus error: largest relative distance from the closed form",
    "speedup_exponent": "speed-up: exponent of N in the mean model's noise",
}


def law_table(laws: Sequence[Law]) -> Table:
    """Measured beside theory."""
    table = Table(
        "law", "theory", "measured", "95 %", "", title="laws on log-linear policies", box=MARKDOWN
    )
    for law in laws:
        mean, low, high = law.interval
        table.add_row(
            law.name,
            f"{law.theory:g}",
            f"{mean:.4g}",
            "" if math.isnan(low) else f"[{low:.4g}, {high:.4g}]",
            law.note,
        )
    return table


def model_table(name: str, outcomes: Mapping[str, Outcome]) -> Table:
    """A dataset's lines."""
    columns = (
        "accuracy, %",
        "pooled loss",
        "squared gradient",
        "disagreement, %",
        "consensus error",
        "before mixing",
        "bytes",
    )
    table = Table("", *columns, title=name, box=MARKDOWN)
    for line, found in outcomes.items():
        errors = [
            f"{found.last(figure):.3g}" if figure in found.rounds[0][0] else ""
            for figure in CONSENSUS
        ]
        pooled, gradient, apart = (
            found.diagnostic(key)
            for key in ("pooled_loss", "pooled_gradient_norm_squared", "disagreement")
        )
        shown = (
            f"{100 * found.accuracy:.1f}",
            f"{pooled:.4f}",
            f"{gradient:.3g}",
            f"{100 * apart:.1f}",
        )
        table.add_row(line, *shown, *errors, bytes_text(found.bytes))
    return table


CONSENSUS = ("consensus_error", "consensus_error_before_mixing")


def race_table(theirs: Race, tuned: Race, ours: Race) -> Table:
    """The ways to one loss."""
    table = Table(
        "", "rounds", "pooled loss", "bytes", "processor, s", title="to the same loss", box=MARKDOWN
    )
    names = ("full fine-tuning, whole models", "the same at its best rate", "fedpref")
    for name, found in zip(names, (theirs, tuned, ours), strict=True):
        table.add_row(
            name,
            str(found.rounds),
            f"{found.loss:.4f}",
            bytes_text(found.bytes),
            f"{found.seconds:.1f}",
        )
    return table


class Timed(Simulation):
    """A simulation that knows how long its clients trained."""

    training_seconds = 0.0

    def each(self, work: Any, *args: Any) -> Any:
        begun = time.perf_counter()
        results = super().each(work, *args)
        self.training_seconds += (work is train_own) * (time.perf_counter() - begun)
        return results


def scale(clients: int, rounds: int) -> dict[str, float]:
    """DecDPO with many clients on a ring, on the shipped model and one processor: the share of a
    round that is not training, but mixing and measuring the consensus error, and how memory
    grows.
    """
    settings = [
        f"partition={{name: iid, clients: {clients}}}",
        "algorithm.local={steps: 1, batch_size: 2}",
        "task.max_length=128",
    ]
    spec = Experiment.load(CONFIGS / "decdpo.yaml", [*settings, "task.truncation_mode=keep_end"])
    task, method, network = spec.build_task(), spec.algorithm, Network()
    keep_freed_memory()
    with one_thread(), tempfile.TemporaryDirectory() as cache:
        shards = [task.prepare(task.encode(client), Path(cache)) for client in spec.clients()[0]]
        names = [shard.name for shard in shards]
        mixing: Any = lambda round, active: network.matrix(names, 0, round, active)  # noqa: E731
        with closing(Timed(task, shards, seed=0, rounds=rounds, mixing=mixing)) as engine:
            state: Any = method.init(engine, task.init(seeds.generator(0, "init")))
            seconds, memory = [], []
            for number in range(rounds):
                engine.begin(number, engine.clients)
                begun = time.perf_counter()
                state, _ = method.step(engine, state)
                seconds.append(time.perf_counter() - begun)
                memory.append(resident())
            warm = rounds // 4
            return {
                "mixing_share": 1 - engine.training_seconds / sum(seconds),
                "seconds_a_round": sum(seconds) / rounds,
                "memory_mb_after_a_quarter": memory[warm] / 1e6,
                "memory_mb_at_the_end": memory[-1] / 1e6,
                "peak_memory_mb": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            }


def resident() -> float:
    """Bytes of this process that lie in memory now."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a folder with the public sets (docs/data.md)")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["laws", "models", "program", "scale"],
        help="by default all that the data allows",
    )
    parser.add_argument(
        "--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), help="of `models`"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of `models`")
    parser.add_argument("--repetitions", type=int, default=4, help="of `laws`")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmark-distributed-dpo"),
        help="where runs are kept",
    )
    parser.add_argument("--figures", type=Path, help="a folder for pictures")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="shorter, fewer pairs, and no models; the figures mean less",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    parts = arguments.parts or [
        "laws",
        "program",
        "scale",
        *(["models"] if arguments.data and not arguments.quick else []),
    ]
    if "models" in parts and not arguments.data:
        parser.error("models needs --data")
    console, progress = Console(width=170), Console(stderr=True)
    figures: dict[str, float] = {}
    laws: list[Law] = []
    outcomes: dict[str, dict[str, Outcome]] = {}
    if "laws" in parts:
        with one_thread():
            laws = [
                law
                for group in LAWS
                for law in group(1 if arguments.quick else arguments.repetitions, arguments.quick)
            ]
        console.print(law_table(laws))
        figures |= {
            figure: law.interval[0]
            for figure, name in FIGURES.items()
            for law in laws
            if law.name == name
        }
    if "program" in parts:
        with one_thread():
            theirs, tuned, ours = race(
                arguments.data, *((12, 64, ()) if arguments.quick else (30, 128))
            )
        console.print(race_table(theirs, tuned, ours))
        figures |= {
            "bytes_ratio_vs_paper": theirs.bytes / ours.bytes,
            "cpu_ratio_vs_paper": theirs.seconds / ours.seconds,
        }
        figures |= {
            "bytes_ratio_vs_tuned": tuned.bytes / ours.bytes,
            "cpu_ratio_vs_tuned": tuned.seconds / ours.seconds,
        }
    if "scale" in parts:
        figures |= scale(64, 2 if arguments.quick else 100)
    if "models" in parts:
        for name in arguments.datasets:
            outcomes[name] = train(
                name, arguments.data, range(arguments.seeds), arguments.output, progress
            )
            console.print(model_table(name, outcomes[name]))
    if arguments.figures:
        import distributed_figures

        distributed_figures.draw(laws, outcomes, arguments.figures)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
