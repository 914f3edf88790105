"""Rounds of Flower, deployed on this machine: a SuperLink with TLS, SuperNodes, FedAvg, clients
that return what they get.

    PYTHON-WITH-FLWR benchmarks/flower_rounds.py --nodes 2 --mb 4 --rounds 6

Prints seconds of each round as a JSON list. Flower needs an environment of its own (its typer and
rich are older than ours): `python -m venv E && E/bin/pip install flwr`. Its sleeps between
questions are part of what a user waits for, and of this.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

BIN = Path(sys.prefix) / "bin"
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "rounds"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr"]
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "rounds.server:app"
clientapp = "rounds.client:app"
[tool.flwr.app.config]
nodes = {nodes}
rounds = {rounds}
elements = {elements}
out = "{out}"
"""
CLIENT = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)
"""
SERVER = """
import json, os, time
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    settings, marks = context.run_config, []
    while len(list(grid.get_node_ids())) < settings["nodes"]:
        time.sleep(0.2)
    nodes = dict.fromkeys(("min_train_nodes", "min_available_nodes"), settings["nodes"])
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, **nodes)
    theta = np.random.default_rng(0).standard_normal(settings["elements"]).astype(np.float32)
    start = ArrayRecord({"theta": Array(theta)})
    strategy.start(grid=grid, initial_arrays=start, num_rounds=settings["rounds"], timeout=600,
                   evaluate_fn=lambda number, arrays: marks.append(time.perf_counter()))
    beside = settings["out"] + ".part"
    open(beside, "w").write(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
    os.replace(beside, settings["out"])
"""


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def certificates(folder: Path) -> None:
    """A root, and a server's certificate under it."""
    (folder / "ext").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n"
    )
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    root = [
        "req",
        "-x509",
        *key,
        "-days",
        "2",
        "-subj",
        "/CN=root",
        "-addext",
        "keyUsage=critical,keyCertSign,cRLSign",
    ]
    asked = [
        "req",
        "-new",
        *key,
        "-subj",
        "/CN=localhost",
        "-keyout",
        "server.key",
        "-out",
        "server.csr",
    ]
    signed = [
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "ext",
    ]
    for command in (
        [*root, "-keyout", "ca.key", "-out", "ca.pem"],
        asked,
        [*signed, "-out", "server.pem"],
    ):
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)


def rounds(
    folder: Path, nodes: int, megabytes: float, count: int, processes: list[subprocess.Popen[bytes]]
) -> list[float]:
    """Seconds of each round; what was started is in `processes`."""
    certificates(folder)
    out, app, link = folder / "seconds.json", folder / "app", f"127.0.0.1:{port()}"
    (app / "rounds").mkdir(parents=True)
    (app / "pyproject.toml").write_text(
        PROJECT.format(nodes=nodes, rounds=count, elements=round(megabytes * 1e6 / 4), out=out)
    )
    for name, text in (("__init__", ""), ("client", CLIENT), ("server", SERVER)):
        (app / "rounds" / f"{name}.py").write_text(text)
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    environment.pop("PYTHONPATH", None)

    def start(name: str, *command: str) -> None:
        (folder / name).mkdir()
        with (folder / f"{name}.log").open("wb") as log:
            env = {**environment, "FLWR_HOME": str(folder / name)}
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    host, number = link.split(":")
    tls = [
        f"--ssl-{kind}={folder}/{file}"
        for kind, file in (
            ("ca-certfile", "ca.pem"),
            ("certfile", "server.pem"),
            ("keyfile", "server.key"),
        )
    ]
    start(
        "link",
        "flower-superlink",
        *tls,
        "--host",
        host,
        "--port",
        number,
        "--disable-runtime-dependency-installation",
    )
    time.sleep(5)
    for k in range(nodes):
        where = ["--superlink", link, "--host", host, "--port", str(port())]
        start(f"node{k}", "flower-supernode", "--root-certificates", f"{folder}/ca.pem", *where)
    (folder / "cli").mkdir()
    connection = (
        '[superlink]\ndefault = "here"\n[superlink.here]\naddress = '
        f'"{link}"\nroot-certificates = "{folder}/ca.pem"\n'
    )
    (folder / "cli/config.toml").write_text(connection)
    run = ["flwr", "run", str(app), "here"]
    subprocess.run(
        run,
        env={**environment, "FLWR_HOME": str(folder / "cli")},
        check=True,
        capture_output=True,
        timeout=120,
    )
    until = time.monotonic() + 900
    while not out.exists() and time.monotonic() < until:
        time.sleep(1)
    return list(json.loads(out.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--mb", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="flower-", ignore_cleanup_errors=True) as scratch:
        try:
            print(
                json.dumps(
                    rounds(
                        Path(scratch), arguments.nodes, arguments.mb, arguments.rounds, processes
                    )
                )
            )
        finally:
            for process in reversed(processes):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            # its helpers have sessions of their own
            subprocess.run(["pkill", "-9", "-f", f"{BIN}/fl(wr|ower)-"])


if __name__ == "__main__":
    main()
