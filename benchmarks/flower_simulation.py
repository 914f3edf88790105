"""Rounds of Flower's simulation on this machine: FedAvg of log-linear policies over many small
clients.

    PYTHON-WITH-FLWR benchmarks/flower_simulation.py FEATURES.npy PREFERRED.npy --rate 0.1

Prints a line when it is ready, makes a round for each line that it reads, prints the round's
seconds, and at the end of input the parameters as a JSON list. Flower needs an environment of its
own: `python -m venv E && E/bin/pip install "flwr[simulation]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

FOREVER = 10**6


def step(files: list[str], rate: float) -> ClientApp:
    app, mapped = ClientApp(), []  # what a process has mapped: features, and what is preferred

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        mapped[:] = mapped or [np.load(path, mmap_mode="r") for path in files]
        x, wanted = (rows[client] for rows in mapped)
        theta = message.content["arrays"]["theta"].numpy()
        margin = x @ theta
        gradient = x.T @ (1 / (1 + np.exp(-margin)) - wanted) / len(x)
        arrays = ArrayRecord({"theta": Array(theta - rate * gradient)})
        metrics = MetricRecord({"num-examples": len(x)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


class OverError(Exception):
    """Nobody asks for more rounds."""


def server(dimensions: int, clients: int, said: Any) -> ServerApp:
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        begun = 0.0

        def wait(round: int, arrays: ArrayRecord) -> None:
            """Say how long the round took, and wait until the next is asked for."""
            nonlocal begun
            print(json.dumps(time.perf_counter() - begun), file=said, flush=True)
            if not sys.stdin.readline():
                print(json.dumps(arrays["theta"].numpy().tolist()), file=said, flush=True)
                raise OverError
            begun = time.perf_counter()

        while len(list(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        everybody = dict.fromkeys(("min_train_nodes", "min_available_nodes"), clients)
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, **everybody)
        start = ArrayRecord({"theta": Array(np.zeros(dimensions))})
        strategy.start(
            grid=grid, initial_arrays=start, num_rounds=FOREVER, timeout=600, evaluate_fn=wait
        )

    return app


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features")
    parser.add_argument("preferred")
    parser.add_argument("--rate", type=float, default=0.1)
    arguments = parser.parse_args()
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    said, sys.stdout = sys.stdout, sys.stderr  # what Flower and Ray print is no answer
    clients, _, dimensions = np.load(arguments.features, mmap_mode="r").shape
    try:
        run_simulation(
            server(dimensions, clients, said),
            step([arguments.features, arguments.preferred], arguments.rate),
            num_supernodes=clients,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    finally:
        os._exit(0)  # its threads wait for one another


if __name__ == "__main__":
    main()
