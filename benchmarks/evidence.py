"""What is claimed, out of the files of runs: one flat object of figures.

    fedpref bench opposed --only shipped --output runs/bench-opposed task.model.path=smollm2-q4
    python benchmarks/language_laws.py --model smollm2-q4 --json laws.json
    python benchmarks/evidence.py --bench runs/bench-opposed --figures laws.json --json F

`--bench` are folders of `fedpref bench`, of which each set with FedPDPO gives the gain of its
policy, in points of held-out accuracy: `policy_gain_best_rival_SET` over the federated method whose
mean is the highest, with the interval's ends as `_low` and `_high`, `policy_gain_alone_SET`, and
`policy_gain_words_SET` over the best regression on word counts. `control_gain_openai` is the first
of these on the summaries of OpenAI's labellers, who hardly differ. `--style` is a run with
`task.generation.rewards.taste`, as of the shipped clients, or several of other seeds:
`style_gain_opposed_clients` is the mean over clients and seeds of what the answers of clients'
policies please them more than those of the model before, with its interval's ends. `--figures` are
what language_laws.py, pluralllm.py and firm.py write; names that those have are changed to those of
this table. `--quick` makes all of it itself in a small form, but for what needs `--data`: the
figures then say that it runs, and no more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ending import end_with_children
from fedpref.experiments.finished import FinishedRun
from fedpref.numerics.intervals import interval
from fedpref.numerics.metrics import ACCURACY
from fedpref.reports.comparison import compare
from fedpref.runs.sweep import SWEEP, members

OURS = "fedpdpo"
NO_RIVALS = ("alone", "pooled")  # they do not federate
CONTROL = "summaries"
RENAMED = {
    "rounds_saved_percent_equal_steps": "pluralllm_steps_saved_percent",
    "alignment_gain_percent_equal_steps": "pluralllm_alignment_gain_percent",
    "min_gap_points_equal_steps": "pluralllm_min_gap_points",
    # of random splits of the countries, where those were made
    **{
        f"splits_{name}{end}": f"pluralllm_{name}{end}"
        for name in ("steps_saved_percent", "alignment_gain_percent", "min_gap_points")
        for end in ("", "_low", "_high")
    },
    "smoothness_ratio_fedcmoo": "firm_smoothness_ratio_fedcmoo",
    "drift_ratio_b0": "firm_lambda_drift_ratio_b0",
    "hypervolume_ratio_fedcmoo_equal_kl": "firm_hypervolume_ratio_fedcmoo_equal_kl",
}
KEPT = ("drift_exponent_lm", "consensus_exponent_lm")
HERE = Path(__file__).resolve().parent
TABLES = HERE.parent.parent / "shared/data"


def policies(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield the gains of FedPDPO's policy on a set of the benchmark."""
    runs: dict[str, list[Path]] = {}
    for path in members(folder):
        runs.setdefault(path.parent.name, []).append(path)
    if OURS not in runs:
        return
    means = {row.name: row.mean for row in compare([folder])}
    rivals = [name for name in runs if name not in (OURS, *NO_RIVALS)]
    wanted = {"alone": "alone"}
    if rivals:
        best = max(rivals, key=lambda name: means[name])
        print(f"{folder.name}: the best rival is {best}, {means[best]:.1f} of {means}")
        wanted["best_rival"] = best
    for called, name in wanted.items():
        if name in runs:
            gain = compare([*runs[name], *runs[OURS]])[1].gain
            assert gain is not None
            yield from named(f"policy_gain_{called}_{folder.name}", *gain)
            if called == "best_rival" and folder.name == CONTROL:
                yield from named("control_gain_openai", *gain)
    if lines := words(next(iter(runs.values()))):
        ours = accuracies(runs[OURS], OURS)
        name = max(lines, key=lambda name: float(lines[name].mean()))
        apart = 100 * (ours - lines[name])
        yield from named(f"policy_gain_words_{folder.name}", float(apart.mean()), *interval(apart))


def named(name: str, mean: float, low: float, high: float) -> list[tuple[str, float]]:
    return [(name, mean), (f"{name}_low", low), (f"{name}_high", high)]


def accuracies(paths: Sequence[Path], line: str) -> np.ndarray:
    """Return a line's accuracies [seeds, clients]."""
    rows = [FinishedRun.at(path).result().evaluations[line] for path in sorted(paths)]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise SystemExit(f"{paths[0]}: its clients are not those of the other seeds")
    return np.array([[row[name][ACCURACY] for name in sorted(row)] for row in rows])


def words(paths: Sequence[Path]) -> Mapping[str, np.ndarray]:
    """Return the accuracies of the regressions on words that stand beside runs."""
    found = FinishedRun.at(paths[0]).result().evaluations
    return {name: accuracies(paths, name) for name in found if name.startswith("words")}


def style(paths: Sequence[Path]) -> list[tuple[str, float]]:
    """Return what the answers of clients' policies please them more than those before."""
    gains = []
    for path in paths:
        run = FinishedRun.at(path)
        last = run.last_of(run.experiment.algorithm.name)["clients"]
        if not all("generation/taste" in row for row in last.values()):
            raise SystemExit(f"{path}: no answers judged by task.generation.rewards.taste")
        gains.append(
            [
                last[name]["generation/taste"] - last[name]["generation/taste_before"]
                for name in sorted(last)
            ]
        )
    ends = interval(np.array(gains))
    return named("style_gain_opposed_clients", float(np.mean(gains)), *ends)


def collected(
    bench: Sequence[Path], files: Sequence[Path], styled: Sequence[Path]
) -> dict[str, float]:
    """Return all figures that are there."""
    figures: dict[str, float] = {}
    for folder in bench:
        for index in sorted(folder.glob(f"*/{SWEEP}")):
            figures |= dict(policies(index.parent))
    for file in files:
        if not file.is_file():
            raise SystemExit(f"--figures: there is no file {file}")
        for name, value in json.loads(file.read_text()).items():
            if name in RENAMED:
                figures[RENAMED[name]] = value
            elif name.startswith(KEPT):
                figures[name] = value
    if styled:
        figures |= dict(style(styled))
    # two seeds have no interval
    return {name: value for name, value in figures.items() if not np.isnan(value)}


def small(folder: Path, data: Path | None) -> tuple[list[Path], list[Path], list[Path]]:
    """Make all that is read, in a small form, and return where it lies."""

    def run(*arguments: str) -> None:
        print(" ".join(arguments), flush=True)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    few = ("partition.max_clients=4", "partition.max_rows=30", "rounds=2", "evaluate_every=2")
    bench, tasted = folder / "bench", folder / "tasted"
    files = [folder / f"{name}.json" for name in ("language_laws", "firm")]
    # it computes on one thread, beside the others
    command = [sys.executable, str(HERE / "language_laws.py"), "--quick", "--json", str(files[0])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as laws:
        methods = [part for name in (OURS, "alone") for part in ("--method", name)]
        where = ("--output", str(bench), "--seeds", "1")
        run("-m", "fedpref", "bench", "quick", *where, *methods, *few)
        answers = "{prompts: 2, max_completion_length: 12, rewards: {taste: {name: taste}}}"
        more = (f"task.generation={answers}", "task.samples=0", f"algorithm.name={OURS}")
        run("-m", "fedpref", "run", "feddpo", "--output", str(tasted), *few, *more, "baselines=[]")
        short = ("task.evaluation_prompts=32", "task.sampling.max_completion_length=12")
        parts = ("--parts", "shipped", "--fewer", "--settings", *short)
        run(str(HERE / "firm.py"), "--quick", *parts, "--json", str(files[1]))
        benches = [bench]
        if data is not None:
            benches.append(folder / "control")
            where = ("--output", str(benches[1]), "--seeds", "1", "--only", CONTROL)
            ours = methods[:2]  # the control is beside the suite's first method alone
            run("-m", "fedpref", "bench", "people", *where, "--data", str(data), *ours, *few)
            files.append(folder / "pluralllm.json")
            parts = ("--parts", "countries", "--quick", "--rounds", "2", "--data", str(data))
            run(str(HERE / "pluralllm.py"), *parts, "--json", str(files[2]))
    if laws.returncode:
        raise SystemExit("language_laws.py failed; its message stands above")
    return benches, files, [tasted]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bench", type=Path, nargs="*", default=[], help="folders of the bench")
    parser.add_argument("--figures", type=Path, nargs="*", default=[], help="other benchmarks'")
    parser.add_argument(
        "--style", type=Path, nargs="*", default=[], help="runs whose answers are measured"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=TABLES if TABLES.is_dir() else None,
        help="the public sets, which --quick can do without",
    )
    parser.add_argument("--quick", action="store_true", help="make it all, in a small form")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    end_with_children()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            figures = collected(*small(Path(folder), arguments.data))
    else:
        figures = collected(arguments.bench, arguments.figures, arguments.style)
    if not figures:
        raise SystemExit("there is nothing in what was given; see --help")
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
