"""The laws of distributed DPO on a language model: client drift, and consensus over graphs.

    python benchmarks/language_laws.py --model smollm2-q4
    python benchmarks/language_laws.py --quick --json laws.json

All by plain gradient descent at a constant rate, from an adapter that FedDPO has trained for some
rounds, in float32. Of so many shipped clients E local steps on all of their pairs give a change;
divided by the rate and E it is the gradient but for the drift, whose squared norm theory puts at
(rate (E - 1))^2 while it is small: `drift_exponent_lm` is the exponent of E - 1 at the lowest of
three rates, `drift_rate_exponent_lm` that of the rate, both 2 by theory. Clients of pairs dealt at
random that gossip in single steps are apart by their batches' noise alone: after R rounds by rate^2
times the sum over the graph's eigenvalues but the first of l^2 + l^4 + ... + l^2R.
`consensus_exponent_lm` is the exponent of the rate, 2 by theory, `consensus_graphs_exponent_lm`
that of the sum over graphs, 1 by theory. Means over repetitions, with the ends of Student's 95 %
intervals as `_low` and `_high`. `--quick` has the small shipped model and one repetition.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from distributed_laws import exponent
from fedpref import Experiment
from fedpref.algorithms import DecDPO
from fedpref.engines import Simulation
from fedpref.engines.workers import keep_freed_memory, one_thread
from fedpref.federation.local_training import LocalTraining, train_locally
from fedpref.federation.verbs import Client
from fedpref.numerics import seeds, topology, trees
from fedpref.numerics.topology import Matrix
from fedpref.numerics.trees import Tree
from log_linear import plain

CLIENTS, PAIRS, WARM, ROUNDS = 8, 10, 3, 8
STEPS = (3, 5, 9)  # local steps whose drift is looked at
MOVES = (3e-5, 6e-5, 1.2e-4)  # of a step, as a share of the adapter's norm
GRAPHS = ("path", "ring", "star", "exponential")


def mean(some: Sequence[Tree]) -> Tree:
    """Return the mean of adapters."""
    return {name: torch.stack([one[name] for one in some]).mean(0) for name in some[0]}


class Trained:
    """Clients' pairs, and an adapter that was trained on them.

    Args:
        model: The language model.
        partition: How pairs come to clients.
        number: Of the repetition.
        cache: Where reference scores and hidden states lie.
    """

    def __init__(self, model: str, partition: str, number: int, cache: Path) -> None:
        where = "last-4" if model.startswith("smollm2") else "null"
        spec = Experiment.load(
            Path("feddpo"),
            [
                f"task.model={{path: {model}, lora_layers_to_transform: {where}, dtype: float32}}",
                f"partition={partition}",
                f"seed={number}",
                "task.max_length=256",
                "algorithm.local={steps: 2, batch_size: 8}",
                f"rounds={WARM}",
            ],
        )
        self.number, self.task = number, spec.build_task()
        self.task.move_to(0)
        shards = [self.task.encode(client) for client in spec.clients()[0][:CLIENTS]]
        self.shards = [self.task.prepare(shard, cache) for shard in shards]
        self.adapter: Tree = self.task.init(seeds.generator(number, "init"))
        for round in range(WARM):
            changed = [
                self.locally(k, self.adapter, spec.algorithm.local, round)
                for k in range(len(shards))
            ]
            self.adapter = mean(changed)

    def locally(self, client: int, start: Tree, local: LocalTraining, round: int = 0) -> Tree:
        """Return an adapter after a client's local steps."""
        draws = seeds.generator(self.number, f"train {client} {round}")
        who = Client(client, self.task, self.shards[client], draws, round, WARM)
        return train_locally(who, start, local, {})[0]

    def descended(self, starts: Sequence[Tree], rate: float) -> list[Tree]:
        """Return clients' adapters after a step on all of their pairs."""
        whole = [replace(plain(1, rate), batch_size=len(shard)) for shard in self.shards]
        return [self.locally(k, theta, whole[k]) for k, theta in enumerate(starts)]

    @cached_property
    def gradient(self) -> Tree:
        """Return the mean over clients of their gradients."""
        end = mean(self.descended([self.adapter] * len(self.shards), 1.0))
        return {name: tensor - end[name] for name, tensor in self.adapter.items()}

    def rate(self, move: float) -> float:
        """Return the rate at which a step moves the adapter by a share of its norm."""
        return move * trees.norm(self.adapter) / trees.norm(self.gradient)


def drift(trained: Trained, moves: Sequence[float]) -> Mapping[str, float]:
    """Exponents of the squared distance between clients' changes and the gradient."""
    gradient, found = trained.gradient, {}
    for move in moves:
        rate = trained.rate(move)
        ends = [trained.adapter] * len(trained.shards)
        for step in range(1, STEPS[-1] + 1):
            ends = trained.descended(ends, rate)
            if step in STEPS:
                end = mean(ends)
                error = {
                    name: (tensor - end[name]) / (rate * step) - gradient[name]
                    for name, tensor in trained.adapter.items()
                }
                found[step, rate] = trees.norm(error) ** 2
    rates = sorted({rate for _, rate in found})
    by_steps = [exponent([e - 1 for e in STEPS], [found[e, rate] for e in STEPS]) for rate in rates]
    by_rate = exponent(rates, [found[STEPS[1], rate] for rate in rates])
    share = found[STEPS[-1], rates[-1]] / trees.norm(gradient) ** 2
    print(f"drift: exponents {by_steps} of E - 1, {by_rate} of the rate; at most {share:.2g} of it")
    return {"drift_exponent_lm": by_steps[0], "drift_rate_exponent_lm": by_rate}


def consensus(trained: Trained, moves: Sequence[float]) -> Mapping[str, float]:
    """Exponents of the distance between clients that gossip."""
    found, sums = {}, {}
    rates = [trained.rate(move) for move in moves]
    for graph in GRAPHS:
        matrix = topology.mixing(topology.SHAPES[graph](len(trained.shards)))
        sums[graph] = spectrum(matrix)
        for rate in rates if graph == "ring" else rates[:1]:
            found[graph, rate] = apart(trained, matrix, rate)
    by_rate = exponent(rates, [found["ring", rate] for rate in rates])
    by_graph = exponent(
        [sums[graph] for graph in GRAPHS], [found[graph, rates[0]] for graph in GRAPHS]
    )
    print(f"consensus: {found}, sums {sums}; exponents {by_rate} of the rate, {by_graph} of sums")
    return {"consensus_exponent_lm": by_rate, "consensus_graphs_exponent_lm": by_graph}


def spectrum(matrix: Matrix) -> float:
    """The sum over a graph's eigenvalues but the first of their even powers, up to the rounds'."""
    values = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[:-1]
    return float(sum((values ** (2 * turn)).sum() for turn in range(1, ROUNDS + 1)))


def apart(trained: Trained, matrix: Matrix, rate: float) -> float:
    """The mean squared distance of clients' adapters to their mean, after the last round."""
    method = DecDPO(local=replace(plain(1, rate), batch_size=2))
    engine = Simulation(
        trained.task,
        trained.shards,
        seed=trained.number,
        rounds=ROUNDS,
        weighting="equal",
        mixing=lambda round, active: matrix,
    )
    with closing(engine):
        state, metrics = method.init(engine, trained.adapter), dict[str, float]()
        for round in range(ROUNDS):
            engine.begin(round, engine.clients)
            state, metrics = method.step(engine, state)  # type: ignore[assignment]
        return metrics["consensus_error"]


def measure(
    model: str, repetitions: int, moves: Sequence[float], drifting: int = CLIENTS
) -> dict[str, float]:
    natural = f"{{name: natural, max_clients: {drifting}, max_rows: {PAIRS}}}"
    dealt = f"{{name: iid, clients: {CLIENTS}, max_rows: 40}}"
    values: dict[str, list[float]] = {}
    for number in range(repetitions):
        with one_thread(), tempfile.TemporaryDirectory() as cache:
            found = {
                **drift(Trained(model, natural, number, Path(cache)), moves),
                **consensus(Trained(model, dealt, number, Path(cache)), moves),
            }
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    figures = {}
    for name, some in values.items():
        figures[name] = statistics.fmean(some)
        if len(some) > 1:
            half = statistics.stdev(some) / len(some) ** 0.5 * stats.t.ppf(0.975, len(some) - 1)
            figures[f"{name}_low"], figures[f"{name}_high"] = (
                figures[name] - half,
                figures[name] + half,
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin", help="builtin, smollm2-q4 or another")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the small model, one repetition")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.quick:
        figures = measure("builtin", 1, MOVES[::2], drifting=4)
    else:
        figures = measure(arguments.model, arguments.repetitions, MOVES)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
