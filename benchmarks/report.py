"""What the page of a run costs: seconds to write it for 200 rounds, 64 clients and two lines, its
bytes, seconds to open it; and the help.

    python benchmarks/report.py --run runs/demo --json FILE

Opening is from navigation to the last chart drawn, in headless Chromium, where there is one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ending import end_with_children
from fedpref import Experiment, run
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_files import EVALUATION, METRICS
from fedpref.reports.page import REPORT

CONFIG = Path(__file__).resolve().parent.parent / "configs/feddpo.yaml"
ROUNDS, CLIENTS = 200, 64


def long_run(folder: Path) -> Path:
    """A run directory with figures of many rounds and clients under two lines, made of a short
    run's.
    """
    path = run(
        Experiment.load(
            CONFIG,
            ["rounds=1", "baselines=[alone]", "partition.max_clients=2", "algorithm.local.steps=1"],
        ),
        folder / "run",
    ).path
    short, rng = RunDirectory(path), np.random.default_rng(0)
    (first,), (last,) = short.read_rows(METRICS), short.read_rows(EVALUATION)
    names = [f"hospital-{k:02d}" for k in range(CLIENTS)]
    measured = next(iter(last["clients"].values()))
    for place in (path, path / "baselines/alone"):
        (place / METRICS).write_text(
            "".join(json.dumps({**first, "round": k + 1}) + "\n" for k in range(ROUNDS))
        )
        with (place / EVALUATION).open("w") as file:
            for k in range(ROUNDS):
                clients = {
                    name: {**measured, "rewards/accuracies": float(rng.uniform(0.4, 0.9))}
                    for name in names
                }
                file.write(
                    json.dumps({"round": k + 1, "clients": clients, "summary": last["summary"]})
                    + "\n"
                )
    (path / "clients.json").write_text(
        json.dumps(
            {name: {"train": 10, "test": 50, "truncated": 0, "digest": ""} for name in names}
        )
    )
    return path


def seconds_of(turns: int, *command: str) -> float:
    """The median of some runs."""
    found = []
    for _ in range(turns):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fedpref", *command], check=True, capture_output=True)
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def opening(turns: int, page: Path) -> float | None:
    """Seconds until a browser has drawn every chart."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        found = []
        for _ in range(turns):
            opened = browser.new_page()
            begun = time.perf_counter()
            opened.goto(page.resolve().as_uri())
            opened.wait_for_function(
                "[...document.querySelectorAll('.chart')].every((chart) => "
                "chart.querySelector('.main-svg'))"
            )
            found.append(time.perf_counter() - begun)
            opened.close()
        browser.close()
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="once each, in place of five times")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--run", type=Path, help="a run, such as the demo's, whose page is opened too"
    )
    arguments = parser.parse_args()
    end_with_children()
    turns = 1 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as scratch:
        path = long_run(Path(scratch))
        found: dict[str, float | None] = {
            "report_seconds_200_64": seconds_of(turns, "report", str(path))
        }
        found["report_mb"] = (path / REPORT).stat().st_size / 1e6
        found["open_seconds"] = opening(turns, path / REPORT)
    if arguments.run:
        found |= {
            "run_mb": (arguments.run / REPORT).stat().st_size / 1e6,
            "run_open_seconds": opening(turns, arguments.run / REPORT),
        }
    found["help_seconds"] = seconds_of(turns, "--help")
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
