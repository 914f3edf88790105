"""A round of a thousand small clients: fedpref's simulation beside Flower's, in turns.

    python benchmarks/simulated_clients.py --flower PYTHON-WITH-FLWR [--quick] [--json F]

Log-linear policies of ten pairs each, one exact gradient step a client, then the mean, so that what
is measured is what a simulation adds; both end with the same parameters, which is checked.
`fedpref_seconds_1000_clients` and `flower_seconds_1000_clients` are medians over rounds after the
first, which each makes in turn, and `flower_over_fedpref` their ratio. `--quick` has 200 clients
and says so in the names. Without `--flower` fedpref is measured alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ending import end_with_children
from fedpref.algorithms import FedDPO
from log_linear import LogLinear, Pairs, clients, engine, plain

DIMENSIONS, PAIRS, RATE = 1000, 10, 0.1


class Flower:
    """Its simulation in a process of its own, which makes a round when it is told to."""

    def __init__(self, python: str, shards: list[Pairs], folder: Path) -> None:
        command = [python, str(Path(__file__).with_name("flower_simulation.py"))]
        for name, rows in (
            ("features", [shard.features for shard in shards]),
            ("preferred", [shard.preferred for shard in shards]),
        ):
            np.save(folder / f"{name}.npy", torch.stack(rows).numpy())
            command.append(str(folder / f"{name}.npy"))
        pipe = subprocess.PIPE
        with (folder / "flower.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--rate", str(RATE)], stdin=pipe, stdout=pipe, stderr=log, text=True
            )
        self.log = folder / "flower.log"
        self.heard()

    def heard(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"Flower ended:\n{self.log.read_text()[-2000:]}")
        return line

    def round(self) -> float:
        """Let it make a round, and return its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.heard())

    def end(self) -> np.ndarray:
        """Let it end, and return the parameters."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return np.array(json.loads(self.heard()))


@contextmanager
def flower(python: str, shards: list[Pairs]) -> Iterator[Flower]:
    with tempfile.TemporaryDirectory() as folder:
        other = Flower(python, shards, Path(folder))
        try:
            yield other
        finally:
            other.process.kill()


class Ours:
    """FedDPO in this process."""

    def __init__(self, shards: list[Pairs]) -> None:
        self.fed = engine(LogLinear(DIMENSIONS), shards, 0)
        self.method = FedDPO(local=plain(1, RATE))
        start = {"theta": torch.zeros(DIMENSIONS, dtype=torch.float64)}
        self.state, self.done = self.method.init(self.fed, start), 0

    def round(self) -> float:
        begun = time.perf_counter()
        self.fed.begin(self.done, self.fed.clients)
        self.state, _ = self.method.step(self.fed, self.state)
        self.done += 1
        return time.perf_counter() - begun


def measure(python: str | None, count: int, rounds: int) -> dict[str, float]:
    shards = clients(count, PAIRS, DIMENSIONS, 1.0, 0)
    ours, seconds, others = Ours(shards), [], []
    name = f"seconds_{count}_clients"
    if python is None:
        return {f"fedpref_{name}": statistics.median([ours.round() for _ in range(rounds)][1:])}
    with flower(python, shards) as other:
        for _ in range(rounds):
            seconds.append(ours.round())
            others.append(other.round())
            print(f"fedpref {seconds[-1]:.2f} s, Flower {others[-1]:.2f} s", flush=True)
        theta = other.end()
    error = float(np.abs(theta - ours.state.adapter["theta"].numpy()).max())
    if error > 1e-9:
        raise SystemExit(f"the two do not train alike: parameters are {error:.2g} apart")
    mine, theirs = statistics.median(seconds[1:]), statistics.median(others[1:])
    return {
        f"fedpref_{name}": mine,
        f"flower_{name}": theirs,
        "flower_over_fedpref": theirs / mine,
        "largest_difference": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flower", help="a Python that has flwr[simulation]")
    parser.add_argument("--quick", action="store_true", help="200 clients, four rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    end_with_children()
    torch.set_num_threads(1)
    count, rounds = (200, 4) if arguments.quick else (1000, 8)
    figures = measure(arguments.flower, count, rounds)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
