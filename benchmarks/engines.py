"""What a federation over mutual TLS costs a round, and what it survives, on this machine.

    python benchmarks/engines.py
    python benchmarks/engines.py --parts rounds --quick

`rounds`: seconds of a round without training, in which a tree travels to clients and back, or to
neighbours on a ring: in process, over simulated sites, over sites with certificates, by what these
stand on alone (FLARE carries tensors, or bytes, and nothing is checked), and by Flower, deployed
(`--flower PYTHON`, an interpreter that has it). `overhead`: rounds with ten local steps of
the shipped model; the share in excess of the run in process is the overhead. `checkpoints`: rounds
with ten of 2,000 clients, each followed by a checkpoint, against their work alone. `kills`: in each
of so many runs a site's processes are killed at a random moment, in each of others the server's. A
run has survived if it ends, by itself or by `fedpref resume`, with all its rounds, each once, and
every site has kept what is private to its clients.

Figures: `ratio_MBmb_over_bare_flare`, `ratio_flower_over_flare_4mb` (with --flower),
`seconds_ENGINE_10_steps`, `overhead_share`, `checkpoint_share`,
`seconds_per_round_10_of_CLIENTS_ENGINE`, `seconds_of_work_10_of_CLIENTS_ENGINE`, `kills_tried` and
`kills_survived`.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from attacks import make_model, make_rows
from ending import end_with_children
from engine_rounds import CLASSES_HERE
from fedpref import config
from fedpref.engines.store import Store
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import METRICS
from fedpref.sites import kits
from fedpref.sites.submitted import SUBMITTED

CONFIG = Path(__file__).resolve().parent.parent / "configs/feddpo.yaml"
SITES = ("clinic", "bank", "school")
ROUNDS = 6
SETTINGS = [
    "algorithm.name=fedpdpo",
    "algorithm.parts={head: low-rank, head_rank: 4, bottleneck: 0, reward: false, adapter: false}",
    "task.max_length=256",
    f"rounds={ROUNDS}",
    "baselines=[]",
    "patience={seconds: 30, min_clients: 1, rounds_per_job: 3}",
]


def fedpref(*arguments: str) -> subprocess.CompletedProcess[str]:
    # a server finds engine_rounds.py there
    with_programs = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), *map(os.path.abspath, sys.path)]),
    }
    command = [sys.executable, "-m", "fedpref", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=with_programs)


def federation(
    folder: Path, port: int, sites: Sequence[str], settings: Sequence[str]
) -> dict[str, Path]:
    """Kits of a server, of sites, to which the clients of an experiment are shared out, and of who
    submits.
    """
    made = kits.provision(folder, "trial", "localhost", port, sites, "admin@fedpref.org")
    chosen = Experiment.load(CONFIG, settings)
    names = [client.name for client in chosen.clients()[0]]
    for kit in made.values():  # the program of rounds without training is no experiment
        if (resources := kit / "local/resources.json").exists():
            content = json.loads(resources.read_text())
            content["class_allow_list"] += CLASSES_HERE
            resources.write_text(json.dumps(content))
    for k, site in enumerate(sites):
        content = config.dump(chosen)
        partition = {"name": "natural", "only": names[k :: len(sites)]}
        content = {
            "data": content["data"],
            "partition": partition,
            "algorithms": ["feddpo", "fedpdpo", "decdpo", "scaffold"],
        }
        (made[site] / kits.SITE_FILE).write_text(yaml.safe_dump(content))
    return made


# ---- what a round costs

CELLS = [  # clients, sites, MB of a client's tree, gossip on a ring
    (2, 2, 4, False),
    (2, 2, 50, False),
    (8, 2, 4, False),
    (8, 2, 50, False),
    (8, 2, 4, True),
    (100, 2, 4, False),
    (100, 2, 4, True),
    (8, 8, 4, False),
    (8, 8, 4, True),
]
PROGRAM = ("rounds=1000", "algorithm.name=decdpo", "baselines=[]")
ENGINES = ("simulation", "flare-simulated", "flare", "bare")
HERE = Path(__file__).resolve().parent


def without_training(port: int, turns: int, flower: str | None, quick: bool) -> dict[str, float]:
    """Medians over rounds but the first of a program that moves trees and does nothing else;
    engines take turns.
    """
    seconds: dict[str, list[float]] = {}
    cells = [cell for cell in CELLS if not quick or cell[:2] == (2, 2)]
    for sites, clients in sorted({(sites, clients) for clients, sites, _, _ in cells}):
        chosen = [cell for cell in cells if cell[:2] == (clients, sites)]
        names = [f"site-{k + 1}" for k in range(sites)]
        with small_clients(clients) as settings, started(port, names, settings) as (made, place):
            content = {
                "experiment": config.dump(Experiment.load(CONFIG, settings)),
                "cells": [{"mb": mb, "rounds": 6, "gossip": gossip} for _, _, mb, gossip in chosen],
                "sites": sites,
                "admin": str(made["admin@fedpref.org"]),
            }
            for _ in range(turns):
                for engine in ENGINES:
                    if engine == "bare" and clients != sites:
                        continue  # FLARE alone has no clients in its sites
                    results = timed(engine, content, place)
                    for cell, rounds in zip(chosen, results, strict=True):
                        if engine == "bare" and cell[3]:
                            continue
                        kinds = rounds if engine == "bare" else {"": rounds}
                        for kind, taken in kinds.items():
                            key = _key(" ".join((engine, kind)).strip(), *cell)
                            seconds.setdefault(key, []).extend(taken[1:])
                            print(f"{key:60s} {statistics.median(taken[1:]):.2f} s", flush=True)
                if flower and (sites, clients) == (2, 2):
                    ran = subprocess.run(
                        [flower, str(HERE / "flower_rounds.py"), "--mb", "4"],
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    seconds.setdefault(_key("flower", *CELLS[0]), []).extend(
                        json.loads(ran.stdout)[1:]
                    )
                    print(f"flower {ran.stdout.strip()}", flush=True)
    found = {key: statistics.median(rounds) for key, rounds in seconds.items()}
    for mb in (4, 50):
        # as tensors or as bytes, whichever FLARE carries faster
        bare = min(found[_key(f"bare {kind}", 2, 2, mb, False)] for kind in ("tensor", "bytes"))
        ours = found[_key("flare", 2, 2, mb, False)]
        found[f"ratio_{mb}mb_over_bare_flare"] = ours / bare
    if flower:
        found["ratio_flower_over_flare_4mb"] = (
            found[_key("flower", *CELLS[0])] / found[_key("flare", *CELLS[0])]
        )
    return found


def timed(engine: str, content: Mapping[str, Any], place: Path) -> list[Any]:
    """Seconds of each round of some cells, by engine_rounds.py in a process of its own."""
    file = place / "cells.json"
    file.write_text(json.dumps(content))
    ran = subprocess.run(
        [sys.executable, str(HERE / "engine_rounds.py"), engine, str(file)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), *map(os.path.abspath, sys.path)]),
            "FEDPREF_RUNS": str(place),
            "OMP_NUM_THREADS": "1",
        },
        start_new_session=True,  # FLARE's simulator ends its whole process group
    )
    results: list[Any] = json.loads(file.read_text()).get("results")
    assert results, ran.stdout[-3000:] + ran.stderr[-3000:]
    return results


@contextmanager
def small_clients(count: int) -> Iterator[list[str]]:
    """Settings of an experiment on clients with as few shipped pairs as a site's limits take."""
    pairs = {str(pair.prompt): pair for pair in Experiment.load(CONFIG).clients()[0][0].train}
    test, train = list(pairs.values())[:10], list(pairs.values())[10:]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for k in range(count):
            own = [("train", train[(8 * k + j) % len(train)]) for j in range(8)]
            for split, pair in (*own, *(("test", pair) for pair in test)):
                sides = {side: getattr(pair, side) for side in ("prompt", "chosen", "rejected")}
                file.write(json.dumps({**sides, "client": f"client-{k}", "split": split}) + "\n")
        file.flush()
        yield [
            f"data={{name: files, path: {file.name}, split_column: split}}",
            "partition={name: natural}",
            "rounds=1000",
            "algorithm.name=decdpo",
            "baselines=[]",
        ]


def checkpoints(folder: Path, clients: int, rounds: int) -> dict[str, float]:
    """What a round with ten of many clients takes, all included, against its work alone.

    The rounds of a run that keeps a checkpoint after each, but the first, in which everybody's
    state is new.
    """
    make_model(folder / "model")
    make_rows(folder / "rows.jsonl", [10] * clients)
    found: dict[str, float] = {}
    for name in ("scaffold", "feddpo"):
        content = {
            "data": {"name": "files", "path": str(folder / "rows.jsonl"), "test_fraction": 0.2},
            "partition": {"name": "natural", "column": "client", "min_test_rows": 1},
            "task": {
                "name": "preference",
                "model": {"path": str(folder / "model"), "lora_r": 4, "dtype": "float32"},
            },
            "algorithm": {"name": name, "local": {"steps": 2, "batch_size": 4}},
            "federation": {"clients_per_round": 10},
            "rounds": rounds + 1,
            "evaluate_every": 0,
            "workers": 1,
        }
        run = RunDirectory(folder / name)
        happened = events(config.parse(Experiment, content, name), run)
        ends = [time.perf_counter() for event in happened if event.kind == "round"]
        # between the ends of rounds lie a checkpoint and the next round's work; the last round is
        # followed by an evaluation
        passed = [b - a for a, b in pairwise(ends)]
        work = [row["seconds"] for row in run.read_rows(METRICS)][1:]
        found[f"seconds_per_round_10_of_{clients}_{name}"] = statistics.median(passed)
        found[f"seconds_of_work_10_of_{clients}_{name}"] = statistics.median(work)
        found[f"checkpoint_share_{name}"] = 1 - statistics.median(work) / statistics.median(passed)
    shares = [value for key, value in found.items() if key.startswith("checkpoint_share")]
    return {**found, "checkpoint_share": max(shares)}


def _key(engine: str, clients: int, sites: int, mb: float, gossip: bool) -> str:
    name = f"round_seconds_{engine.replace('-', '_').replace(' ', '_')}_{clients}_{mb}"
    return name + ("_ring" if gossip else "") + ("" if sites == 2 else f"_on_{sites}_sites")


def overhead(made: dict[str, Path], folder: Path) -> dict[str, float]:
    """The share of a round of ten local steps of the shipped model that is not in a run in one
    process; engines take turns.
    """
    settings = [
        "algorithm.local={steps: 10, batch_size: 8}",
        "rounds=5",
        "baselines=[]",
        "checkpoint_every=100",
    ]
    settings += [
        "evaluate_every=0",
        "patience={seconds: 300, min_sites: 2, rounds_per_job: 100}",
        "partition={name: natural, max_clients: 8}",
    ]
    lines = {
        "simulation": ["run", str(CONFIG), *settings, "workers=2"],
        "flare": ["submit", str(CONFIG), *settings, "--admin", str(made["admin@fedpref.org"])],
    }
    seconds: dict[str, list[float]] = {engine: [] for engine in lines}
    for turn in range(2):
        for engine, command in lines.items():
            place = folder / f"{engine}-{turn}"
            ran = fedpref(*command, "--output", str(place))
            assert ran.returncode == 0, ran.stdout + ran.stderr
            seconds[engine] += [
                row["seconds"] for row in RunDirectory(place).read_rows(METRICS)[1:]
            ]
    found = {
        f"seconds_{engine}_10_steps": statistics.median(rounds)
        for engine, rounds in seconds.items()
    }
    return {
        **found,
        "overhead_share": 1
        - found["seconds_simulation_10_steps"] / found["seconds_flare_10_steps"],
    }


# ---- what is survived


def kill(kit: Path) -> int:
    """Kill the processes of a kit, all but the one that starts them anew."""
    found = subprocess.run(
        ["pgrep", "-f", f"nvflare.*{kit}"], capture_output=True, text=True
    ).stdout.split()
    for process in map(int, found):
        if process != os.getpid():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
    return len(found)


def survived(run: Path, made: dict[str, Path]) -> bool:
    """Whether all rounds are there, each once, and every site has kept, whole, what is private to
    its clients.

    A site that was killed in the last job has its clients' heads of the last round in which it took
    part.
    """
    rows = RunDirectory(run).read_rows(METRICS)
    if [row["round"] for row in rows] != list(range(1, ROUNDS + 1)) or not (run / "done").exists():
        return False
    kept = json.loads((run / "clients.json").read_text())
    found = 0
    for site in SITES:
        place = made[site] / "fedpref" / json.loads((run / SUBMITTED).read_text())["run"]
        last = sorted((place / "checkpoints").glob("round-*"))[-1:]
        if not last:
            return False
        stored = Store(place / "checkpoints").load(last[0], ["own"])["own"]
        heads = [kept_there.value for kept_there in stored.values()]
        if not all(head and any(bool(tensor.any()) for tensor in head.values()) for head in heads):
            return False  # a head that was begun anew would be zero but for its last steps
        found += len(heads)
    return found == len(kept)


def attempt(
    name: str, kit: Path, made: dict[str, Path], folder: Path, chance: random.Random
) -> dict[str, object]:
    """One run in which a kit is killed once."""
    run = folder / "runs" / name
    command = [
        sys.executable,
        "-m",
        "fedpref",
        "submit",
        str(CONFIG),
        *SETTINGS,
        "--admin",
        str(made["admin@fedpref.org"]),
    ]
    log = (folder / f"{name}.log").open("w")
    begun = time.monotonic()
    running = subprocess.Popen(
        [*command, "--output", str(run)], stdout=log, stderr=subprocess.STDOUT
    )
    time.sleep(chance.uniform(15, 60))
    rounds = sum(
        len(RunDirectory(found).read_rows(METRICS))
        for found in (folder / "server").glob(f"{name}-*")
    )
    has_ended = running.poll() is not None
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
    found = {
        "killed": kit.name,
        "processes": killed,
        "had_ended": has_ended,
        "after_rounds": rounds,
        "resumed": resumed,
    }
    return {**found, "seconds": round(time.monotonic() - begun), "survived": survived(run, made)}


@contextmanager
def started(
    port: int, sites: Sequence[str], settings: Sequence[str]
) -> Iterator[tuple[dict[str, Path], Path]]:
    """A federation at work, and a folder for its runs."""
    with tempfile.TemporaryDirectory(prefix="fedpref-engines-") as scratch:
        folder = Path(scratch)
        made = federation(folder / "federation", port, sites, settings)
        try:
            for name in ("localhost", *sites):
                assert (
                    fedpref(
                        "site", "start", str(made[name]), "--runs", str(folder / "server")
                    ).returncode
                    == 0
                )
            time.sleep(25)
            yield made, folder
        finally:
            for name in (*sites, "localhost"):
                kits.stop(made[name])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["rounds", "overhead", "checkpoints", "kills"],
        default=["rounds", "overhead", "checkpoints", "kills"],
    )
    parser.add_argument("--turns", type=int, default=2, help="of engines")
    parser.add_argument("--flower", help="an interpreter that has flwr")
    parser.add_argument("--sites", type=int, default=10, help="runs in which a site is killed")
    parser.add_argument("--server", type=int, default=5, help="runs in which the server is killed")
    parser.add_argument("--port", type=int, default=28102)
    parser.add_argument("--quick", action="store_true", help="one kill of each, small adapters")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    end_with_children()
    chance = random.Random(0)
    counts = (1, 1) if arguments.quick else (arguments.sites, arguments.server)
    found: dict[str, float] = {}
    if "rounds" in arguments.parts:
        found |= without_training(
            arguments.port,
            1 if arguments.quick else arguments.turns,
            arguments.flower,
            arguments.quick,
        )
    if "overhead" in arguments.parts:
        with started(arguments.port, SITES[:2], ["partition={name: natural, max_clients: 8}"]) as (
            made,
            folder,
        ):
            found |= overhead(made, folder)
    if "checkpoints" in arguments.parts:
        with tempfile.TemporaryDirectory() as scratch:
            found |= checkpoints(Path(scratch), 2000, 4 if arguments.quick else 12)
    if "kills" in arguments.parts:
        with started(arguments.port + 1, SITES, ["partition={name: natural, max_clients: 6}"]) as (
            made,
            folder,
        ):
            rows: list[dict[str, object]] = []
            for k, kind in enumerate(["site"] * counts[0] + ["server"] * counts[1]):
                row: dict[str, object] = {"had_ended": True}
                for again in range(3):  # a run that ended before it could be killed shows nothing
                    if row["had_ended"]:
                        target = made[chance.choice(SITES)] if kind == "site" else made["localhost"]
                        row = attempt(f"run-{k}-{again}", target, made, folder, chance)
                        print(row, flush=True)
                rows.append(row)
        found |= {
            "kills_tried": len(rows),
            "kills_survived": sum(bool(row["survived"]) for row in rows),
        }
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
