"""Processes of simulated FLARE sites that are killed while they sum under masks. Slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import make_rows, write_rows
from fedpref.experiments.run_files import METRICS
from fedpref.numerics.metrics import ACCURACY

pytest.importorskip("nvflare")
pytestmark = pytest.mark.slow
LOST = ("site-8", "site-9", "site-10")


def processes(*sites: str) -> list[int]:
    """Return the processes of simulated sites."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().split(b"\0")
        except OSError:
            continue
        text = b" ".join(words).decode()
        if "simulator_worker" in text and any(f"/{site} " in text for site in sites):
            found.append(int(place.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found by /proc")
def test_three_of_ten_flare_sites_are_lost_and_the_sums_go_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([12] * 10))
    content = {
        **settings,
        "data": {"name": "files", "path": str(rows), "test_fraction": 0.3},
        "secrecy": {"name": "masks"},
        "engine": "flare",
        "sites": 10,
        "rounds": 3,
        "evaluate_every": 1,
        "patience": {"seconds": 90, "min_clients": 4},
        "workers": 1,
    }
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "fedpref", "run", str(config), "--output", str(run)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 300
        while not ((run / METRICS).exists() and (run / METRICS).read_text()):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        lost = processes(*LOST)
        assert len(lost) == len(LOST)
        for one in lost:
            os.kill(one, signal.SIGKILL)
        assert process.wait(400) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
    rounds = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [row["round"] for row in rounds] == [1, 2, 3]
    assert rounds[0]["clients"] == 10
    assert rounds[-1]["clients"] == 7
    last = json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])
    assert sum(last["bins"][ACCURACY]) == 7, "figures of those that are left"
