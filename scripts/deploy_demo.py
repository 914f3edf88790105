"""A federation on this machine: a server and three sites with certificates, experiments over
mutual TLS, and everything stopped again.

    python scripts/deploy_demo.py FOLDER

Three sites host the shipped clients, four each, and consent to three algorithms. FedPDPO runs over
them under masks, then DecDPO on a ring whose messages the server relays and cannot read, then
FedDPO under masks and with noise.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import yaml

from fedpref.experiments.experiment import Experiment
from fedpref.sites import kits

CONFIG = Path(__file__).resolve().parent.parent / "configs/feddpo.yaml"
SITES = ("north", "east", "south")
MASKS = "secrecy.name=masks"
EXPERIMENTS = {
    "fedpdpo": ["algorithm.local.steps=6", MASKS],
    "decdpo": ["network.topology=ring"],
    "feddpo": [
        MASKS,
        "privacy={epsilon: 8, delta: 0.01}",
        "algorithm.aggregate.name=frozen-a",
        "federation.weighting=equal",
    ],
}
COMMON = ["rounds=3", "baselines=[]", "patience={seconds: 300, min_sites: 3}"]


def fedpref(*arguments: str) -> None:
    """A command of fedpref's, as a user would give it."""
    print(f"\n$ fedpref {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "fedpref", *arguments], check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/deploy-demo")
    federation = folder / "federation"
    named = [argument for site in SITES for argument in ("--site", site)]
    fedpref(
        "federation",
        "init",
        str(federation),
        "--server",
        "localhost",
        "--port",
        str(free_port()),
        *named,
    )
    clients = [client.name for client in Experiment.load(CONFIG).clients()[0]]
    for k, site in enumerate(SITES):
        content = {
            "data": {"name": "builtin"},
            "partition": {"name": "natural", "only": clients[k::3]},
            "algorithms": list(EXPERIMENTS),
        }
        (federation / site / kits.SITE_FILE).write_text(yaml.safe_dump(content, sort_keys=False))
    try:
        for name in ("localhost", *SITES):
            fedpref("site", "start", str(federation / name), "--runs", str(folder / "server"))
        for algorithm, settings in EXPERIMENTS.items():
            where = [
                "--admin",
                str(federation / "admin@fedpref.org"),
                "--output",
                str(folder / algorithm),
            ]
            fedpref(
                "submit",
                str(CONFIG),
                f"name={algorithm}",
                f"algorithm.name={algorithm}",
                *settings,
                *COMMON,
                *where,
            )
        # of two nobody's own figures are told, so that each has a page of its own
        for algorithm in EXPERIMENTS:
            page = folder / f"{algorithm}.html"
            fedpref("report", str(folder / algorithm), "--output", str(page))
    finally:
        for name in (*SITES, "localhost"):
            kits.stop(federation / name)
    print(
        f"\nAll is stopped. Private heads have stayed at {federation}/SITE/fedpref, what was "
        f"shared is in {folder}."
    )


if __name__ == "__main__":
    main()
