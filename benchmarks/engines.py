"""What a federation over mutual TLS costs a round, and what it survives, on this machine.

    python benchmarks/engines.py
    python benchmarks/engines.py --parts rounds --quick

`rounds`: seconds of a round with one local step on one pair, which is next to nothing, for adapters of several sizes: in process, over
two simulated sites, over two sites with certificates; and with ten local steps of the shipped model, whose share in excess of the run in
process is the overhead. `kills`: in each of so many runs a site's processes are killed at a random moment, in each of others the server's.
A run has survived if it ends, by itself or by `fedpref resume`, with all its rounds, each once, and every site has kept what is private to
its clients.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from fedpref import trees
from fedpref.experiment import Experiment
from fedpref.flare import kits
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


def federation(folder: Path, port: int, sites: Sequence[str], clients: int) -> dict[str, Path]:
    """Kits of a server, of sites and of who submits; so many shipped clients are shared out to the sites."""
    made = kits.provision(folder, "trial", "localhost", port, sites, "admin@fedpref.org")
    chosen = Experiment.load(CONFIG, [f"partition={{name: natural, max_clients: {clients}}}"])
    names = [client.name for client in chosen.clients()[0]]
    for k, site in enumerate(sites):
        partition = {"name": "natural", "only": names[k :: len(sites)]}
        content = {"data": {"name": "builtin"}, "partition": partition, "algorithms": ["feddpo", "fedpdpo"]}
        (made[site] / kits.SITE_FILE).write_text(yaml.safe_dump(content))
    return made


# ---- what a round costs


def rounds(made: dict[str, Path], folder: Path, quick: bool) -> dict[str, float]:
    """Medians over rounds but the first, in turns of engines."""
    found: dict[str, float] = {}
    cells = [("1 step", 1, rank) for rank in ((8, 52) if quick else (8, 52, 650))] + [("10 steps", 10, 8)]
    for title, steps, rank in cells:
        local = "{steps: 1, batch_size: 1}" if steps == 1 else f"{{steps: {steps}, batch_size: 8}}"
        settings = [f"algorithm.local={local}", f"task.model.lora_r={rank}", "rounds=5", "references=[]", "checkpoint_every=100"]
        settings += ["evaluate_every=0", "patience={seconds: 300, min_sites: 2}", "partition={name: natural, max_clients: 8}"]
        lines = {
            "simulation": ["run", str(CONFIG), *settings, "workers=2"],
            "flare_simulated": ["run", str(CONFIG), *settings, "engine=flare", "sites=2"],
            "flare": ["submit", str(CONFIG), *settings, "--admin", str(made["admin@fedpref.org"])],
        }
        for engine, command in lines.items():
            place = folder / f"{engine}-{steps}-{rank}"
            ran = fedpref(*command, "--output", str(place))
            assert ran.returncode == 0, ran.stdout + ran.stderr
            rows = RunDirectory(place).read_rows(METRICS)
            seconds = statistics.median(row["seconds"] for row in rows[1:])
            megabytes = rows[0]["bytes_up"] / rows[0]["clients"] / 1e6
            key = f"round_seconds_{engine}_8_{megabytes:.1f}" if steps == 1 else f"seconds_{engine}_{steps}_steps"
            found[key] = seconds
            print(f"{title:9s} {engine:16s} {megabytes:6.1f} MB a client  {seconds:.2f} s a round", flush=True)
    found["overhead_share"] = 1 - found["seconds_simulation_10_steps"] / found["seconds_flare_10_steps"]
    return found


# ---- what is survived


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


@contextmanager
def started(port: int, sites: Sequence[str], clients: int) -> Iterator[tuple[dict[str, Path], Path]]:
    """A federation at work, and a folder for its runs."""
    with tempfile.TemporaryDirectory(prefix="fedpref-engines-") as scratch:
        folder = Path(scratch)
        made = federation(folder / "federation", port, sites, clients)
        try:
            for name in ("localhost", *sites):
                assert fedpref("site", "start", str(made[name]), "--runs", str(folder / "server")).returncode == 0
            time.sleep(25)
            yield made, folder
        finally:
            for name in (*sites, "localhost"):
                kits.stop(made[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["rounds", "kills"], default=["rounds", "kills"])
    parser.add_argument("--sites", type=int, default=10, help="runs in which a site is killed")
    parser.add_argument("--server", type=int, default=5, help="runs in which the server is killed")
    parser.add_argument("--port", type=int, default=28102)
    parser.add_argument("--quick", action="store_true", help="one kill of each, small adapters")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    chance = random.Random(0)
    counts = (1, 1) if arguments.quick else (arguments.sites, arguments.server)
    found: dict[str, float] = {}
    if "rounds" in arguments.parts:
        with started(arguments.port, SITES[:2], 8) as (made, folder):
            found |= rounds(made, folder, arguments.quick)
    if "kills" in arguments.parts:
        with started(arguments.port + 1, SITES, 6) as (made, folder):
            rows = []
            for k in range(sum(counts)):
                target = made[chance.choice(SITES)] if k < counts[0] else made["localhost"]
                rows.append(attempt(f"run-{k}", target, made, folder, chance))
                print(rows[-1], flush=True)
        found |= {"kills_tried": len(rows), "kills_survived": sum(bool(row["survived"]) for row in rows)}
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
