"""Whether a choice is ever lost, how long people wait, and what judging the policy's own answers is
worth.

    python benchmarks/collect.py --quick
    python benchmarks/collect.py --json collect.json

`choices_tried` are sent by three raters to a page whose process is killed again and again;
`choices_lost` are those that it had said were written and that are not there, or are there twice.
`seconds_to_next_item` is how long a rater who takes five seconds a choice waits for the next item,
in 95 of 100 choices at most, while the model draws answers on the same processors.

Then FedDPO on those shipped clients who have 64 pairs, whose tastes are known and judge: on 64
given
pairs, and on 32 of them and as many pairs of the policy's own answers (the task
`online-preference`), in equal steps. `online_win_rate` is the share of held-out prompts, in
percent, on which the trained model's answer pleases the client more than the model's before,
`online_win_rate_low` its 95 % interval's lower end over clients and seeds, and `offline_win_rate`
that of given pairs at the same KL from the base, between learning rates in proportion;
`online_gain_low` and `online_gain_high` are the interval of the difference. `--quick` has fewer
kills, the small shipped model and one seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ending import end_with_children
from fedpref import Experiment, UserError, config
from fedpref.collect.store import FILE
from fedpref.data import Builtin
from fedpref.engines.workers import keep_freed_memory
from fedpref.experiments.finished import FinishedRun
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.numerics.intervals import interval
from fedpref.rewards.reward import plain

RATERS = ("Ann", "Bob", "Cem")
THINKS = 5.0  # seconds that a rater takes
RATE = 2.5e-3  # of the online run
SPREAD = (0.5, 1.0)  # times that, on given pairs, between which the KL is met
STEPS, BATCH, ROUNDS = 4, 4, 4
HELD_OUT, ASKED = 80, 24  # pairs of a client, and prompts that are answered


def begun(arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Begin a page in a process of its own, and return it with its address."""
    command = [sys.executable, "-m", "fedpref", "collect", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("page: "):
            return process, line.split()[1]
    raise RuntimeError("the page did not come")


def posted(address: str, content: Any) -> Any:
    request = urllib.request.Request(
        address, json.dumps(content).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


# ---- nothing is lost


def killed(folder: Path, kills: int) -> dict[str, float]:
    """Choose while the page is killed, and count what was said to be written and is not."""
    file = folder / "answers.jsonl"
    with file.open("w") as out:
        for k in range(400 * kills):
            out.write(json.dumps({"prompt": f"Prompt {k}?", "completions": ["a", "b"]}) + "\n")
    draw, said, tried = random.Random(0), Counter[str](), 0
    for turn in range(kills):
        process, address = begun(["--candidates", str(file), "--output", str(folder / "choices")])
        told: dict[str, list[str]] = {rater: [] for rater in RATERS}
        sent: dict[str, int] = dict.fromkeys(RATERS, 0)
        threads = [
            threading.Thread(target=choosing, args=(address, rater, turn, told[rater], sent))
            for rater in RATERS
        ]
        for thread in threads:
            thread.start()
        time.sleep(draw.uniform(0.2, 1.5))
        process.kill()
        process.wait()
        for thread in threads:
            thread.join()
        said.update(one for some in told.values() for one in some)
        tried += sum(sent.values())
    with closing(sqlite3.connect(folder / "choices" / FILE)) as database:
        rows = database.execute("select address, item, rater from events").fetchall()
    written = Counter(address for address, _, _ in rows)
    lost = sum(written[address] != 1 for address in said)
    doubled = sum(count - 1 for count in Counter(row[1:] for row in rows).values())
    return {"choices_tried": float(tried), "choices_lost": float(lost + doubled)}


def choosing(address: str, rater: str, turn: int, told: list[str], sent: dict[str, int]) -> None:
    """Choose until nobody answers, and keep what was said to be written."""
    try:
        state = posted(f"{address}api/next", {"rater": rater})
        while "item" in state:
            name = f"choice-{rater}-{turn}-{sent[rater]}"
            sent[rater] += 1
            state = posted(f"{address}api/choose", chosen(state, rater, name))
            told.append(name)
    except (OSError, ValueError):
        return


def chosen(state: Mapping[str, Any], rater: str, address: str) -> dict[str, Any]:
    item = state["item"]
    return {
        "address": address,
        "rater": rater,
        "item": item["number"],
        "name": item["name"],
        "shown": "left",
        "seconds": 1,
    }


# ---- nobody waits


def waiting(folder: Path, model: str, choices: int) -> float:
    """Return how long a rater waits for the next item, in 95 of 100 choices at most."""
    prompts = dict.fromkeys(plain(row.prompt) for row in Builtin().read())
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompts))
    arguments = ["--prompts", str(file), "--model", model, "--max-new-tokens", "64"]
    process, address = begun([*arguments, "--output", str(folder / "drawn")])
    try:
        while "item" not in (state := posted(f"{address}api/next", {"rater": "Ann"})):
            time.sleep(0.2)
        time.sleep(4 * THINKS)  # who comes first reads what it is about
        waits = []
        for k in range(choices):
            time.sleep(THINKS)
            before = time.perf_counter()
            state = posted(f"{address}api/choose", chosen(state, "Ann", f"choice-{k}"))
            while "item" not in state:
                time.sleep(0.1)
                state = posted(f"{address}api/next", {"rater": "Ann"})
            waits.append(time.perf_counter() - before)
    finally:
        process.terminate()
        process.wait()
    return float(np.quantile(waits, 0.95))


# ---- the policy's own answers


def rows_of(folder: Path, given: int) -> Path:
    """Write rows of the clients who have enough: so many to learn from, and some held out."""
    file = folder / f"given-{given}.jsonl"
    by_client: dict[str, dict[str, list[Any]]] = {}
    for row in Builtin().read():
        sides = by_client.setdefault(str(row.columns["client"]), {"train": [], "test": []})
        sides[str(row.side)].append(row)
    draw = random.Random(0)
    with file.open("w") as out:
        for client, sides in sorted(by_client.items()):
            draw.shuffle(sides["train"])  # alike in both files, so that one has the other's
            if len(sides["train"]) < ROUNDS * STEPS * BATCH:
                continue
            for side, some in (
                ("train", sides["train"][:given]),
                ("test", sides["test"][:HELD_OUT]),
            ):
                for row in some:
                    texts = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
                    out.write(json.dumps({**texts, "client": client, "split": side}) + "\n")
    return file


def experiment(
    folder: Path, model: Mapping[str, Any], is_online: bool, rate: float, seed: int
) -> Experiment:
    """FedDPO on as many judgements: all given, or half of them of the policy's own answers."""
    judgements = ROUNDS * STEPS * BATCH
    path = rows_of(folder, judgements // 2 if is_online else judgements)
    task: dict[str, Any] = {
        "model": model,
        "generation": {
            "prompts": ASKED,
            "max_completion_length": 48,
            "judge": {"name": "taste"},
        },
    }
    if is_online:
        task |= {
            "name": "online-preference",
            "judge": {"name": "taste"},
            "sampling": {"max_completion_length": 48},
        }
    content = {
        "data": {"name": "files", "path": str(path), "split_column": "split"},
        "partition": {"name": "natural", "column": "client"},
        "task": task,
        "algorithm": {
            "name": "feddpo",
            "local": {"steps": STEPS, "batch_size": BATCH, "learning_rate": rate},
        },
        "federation": {"weighting": "equal"},
        "rounds": ROUNDS,
        "seed": seed,
    }
    return config.parse(Experiment, content, "collect")


def outcome(spec: Experiment, folder: Path) -> tuple[np.ndarray, float]:
    """Return each client's win rate, and the mean KL."""
    for _ in events(spec, RunDirectory(folder), folder.parent / "cache"):
        pass
    rows = FinishedRun.at(folder).last_evaluation["clients"]
    wins = np.array([rows[name]["generation/win_rate"] for name in sorted(rows)])
    return 100 * wins, float(np.mean([row["generation/kl"] for row in rows.values()]))


def online(folder: Path, model: Mapping[str, Any], seeds: int) -> dict[str, float]:
    """Return win rates of a model that was trained on its own answers too, and on given ones."""
    own, given = [], []
    for seed in range(seeds):
        wins, kl = outcome(experiment(folder, model, True, RATE, seed), folder / f"online-{seed}")
        own.append(wins)
        print(f"seed {seed}, online: wins {wins.mean():.1f}, kl {kl:.2f}", flush=True)
        points = []
        for by in SPREAD:
            spec = experiment(folder, model, False, by * RATE, seed)
            points.append(outcome(spec, folder / f"given-{seed}-{by}"))
            print(
                f"seed {seed}, given at {by * RATE}: wins {points[-1][0].mean():.1f}, "
                f"kl {points[-1][1]:.2f}",
                flush=True,
            )
        points.sort(key=lambda point: point[1])
        kls = [point[1] for point in points]
        if not kls[0] <= kl <= kls[-1]:
            print(f"seed {seed}: no run on given pairs has a KL of {kl:.2f}; the nearest is taken")
        given.append(
            [np.interp(kl, kls, wins) for wins in zip(*(p[0] for p in points), strict=True)]
        )
    return {
        "online_win_rate": float(np.mean(own)),
        "online_win_rate_low": interval(np.array(own))[0],
        "offline_win_rate": float(np.mean(given)),
        "online_gain_low": interval(np.array(own) - np.array(given))[0],
        "online_gain_high": interval(np.array(own) - np.array(given))[1],
    }


PARTS = ("killed", "waiting", "online")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer kills, the small model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--only", nargs="*", choices=PARTS, metavar="PART", help=" ".join(PARTS))
    arguments = parser.parse_args()
    end_with_children()
    quick, parts = arguments.quick, arguments.only or PARTS
    keep_freed_memory()
    model: dict[str, Any] = {"path": "builtin"}
    if not quick:
        model = {"path": "smollm2-q4", "lora_layers_to_transform": "last-4"}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "killed" in parts:
            figures |= killed(folder, 3 if quick else 20)
        try:
            if "waiting" in parts:
                waits = waiting(folder, model["path"], 4 if quick else 30)
                figures["seconds_to_next_item"] = waits
            if "online" in parts:
                figures |= online(folder, model, 1 if quick else 3)
        except UserError as error:
            print(f"not on the model: {error}")
    figures = {name: float(value) for name, value in figures.items() if np.isfinite(value)}
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
