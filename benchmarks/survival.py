"""What a federation over mutual TLS survives: sites and the server are killed at random moments, on this machine.

    python benchmarks/survival.py
    python benchmarks/survival.py --quick

A federation of three sites is provisioned and started. In each of so many runs a site's processes are killed at a random moment, in each of
others the server's. A run has survived if it ends, by itself or by `fedpref resume`, with all its rounds, and if in the end every client's
private head is the one that its site has kept from its last round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from fedpref import kits, trees
from fedpref.experiment import Experiment
from fedpref.rundirectory import METRICS, RunDirectory

CONFIG = Path(__file__).resolve().parent.parent / "configs/demo.yaml"
SITES = ("clinic", "bank", "school")
ROUNDS = 6
SETTINGS = [
    "algorithm.name=fedpdpo",
    "algorithm.parts={head: low-rank, head_rank: 4, bottleneck: 0, reward: false, adapter: false}",
    "task.max_length=256",
    f"rounds={ROUNDS}",
    "references=[]",
    "patience={seconds: 30, min_clients: 1, rounds_per_job: 3}",
]


def fedpref(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fedpref.cli", *arguments], capture_output=True, text=True, timeout=600)


def federation(folder: Path, port: int) -> dict[str, Path]:
    """Kits of a server, three sites and who submits; the shipped clients are shared out to the sites."""
    made = kits.provision(folder, "survival", "localhost", port, SITES, "admin@fedpref.org")
    names = [client.name for client in Experiment.load(CONFIG).clients()[0]]
    for k, site in enumerate(SITES):
        content = {"data": {"name": "builtin"}, "partition": {"name": "natural", "only": names[k::3][:2]}, "algorithms": ["fedpdpo"]}
        (made[site] / kits.SITE_FILE).write_text(yaml.safe_dump(content))
    return made


def kill(kit: Path) -> int:
    """Kill the processes of a kit, all but the one that starts them anew."""
    found = subprocess.run(["pgrep", "-f", f"nvflare.*{kit}"], capture_output=True, text=True).stdout.split()
    for process in map(int, found):
        if process != os.getpid():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
    return len(found)


def survived(run: Path, made: dict[str, Path]) -> bool:
    """Whether all rounds are there, and every site's exported heads are what it has kept."""
    rows = RunDirectory(run).read_rows(METRICS)
    if [row["round"] for row in rows] != list(range(1, ROUNDS + 1)) or not (run / "done").exists():
        return False
    for site in SITES:
        place = made[site] / "fedpref" / run.name
        kept = sorted((place / "checkpoints").glob("round-*"))
        if not kept or not all(trees.load(file) for file in (kept[-1] / "own").glob("*.safetensors")):
            return False
    return True


def attempt(name: str, kit: Path, made: dict[str, Path], folder: Path, chance: random.Random) -> dict[str, object]:
    """One run in which a kit is killed once."""
    run = folder / "runs" / name
    command = [sys.executable, "-m", "fedpref.cli", "submit", str(CONFIG), *SETTINGS, "--admin", str(made["admin@fedpref.org"])]
    log = (folder / f"{name}.log").open("w")
    begun = time.monotonic()
    running = subprocess.Popen([*command, "--output", str(run)], stdout=log, stderr=subprocess.STDOUT)
    time.sleep(chance.uniform(15, 60))
    rounds = len(RunDirectory(folder / "server" / name).read_rows(METRICS))
    killed = kill(kit)
    resumed = 0
    try:
        running.wait(timeout=240)
    except subprocess.TimeoutExpired:
        running.kill()
    while not (run / "done").exists() and resumed < 3:
        time.sleep(20)  # until the kit has started anew
        resumed += 1
        try:
            fedpref("resume", str(run))
        except subprocess.TimeoutExpired:
            continue
    found = {"killed": kit.name, "processes": killed, "after_rounds": rounds, "resumed": resumed}
    return {**found, "seconds": round(time.monotonic() - begun), "survived": survived(run, made)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=10, help="runs in which a site is killed")
    parser.add_argument("--server", type=int, default=5, help="runs in which the server is killed")
    parser.add_argument("--port", type=int, default=28102)
    parser.add_argument("--quick", action="store_true", help="one run of each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    chance = random.Random(0)
    counts = (1, 1) if arguments.quick else (arguments.sites, arguments.server)
    with tempfile.TemporaryDirectory(prefix="fedpref-survival-") as scratch:
        folder = Path(scratch)
        made = federation(folder / "federation", arguments.port)
        try:
            for name in ("localhost", *SITES):
                assert fedpref("site", "start", str(made[name]), "--runs", str(folder / "server")).returncode == 0
            time.sleep(25)
            rows = []
            for k in range(sum(counts)):
                target = made[chance.choice(SITES)] if k < counts[0] else made["localhost"]
                rows.append(attempt(f"run-{k}", target, made, folder, chance))
                print(rows[-1], flush=True)
        finally:
            for name in (*SITES, "localhost"):
                kits.stop(made[name])
    found = {"kills_tried": len(rows), "kills_survived": sum(bool(row["survived"]) for row in rows)}
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
