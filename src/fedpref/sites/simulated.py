"""An experiment over simulated sites, each a process of its own on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.recipe import SimEnv

from fedpref import config
from fedpref.engines.site_folder import CLIENTS, OPENINGS, STORE
from fedpref.engines.site_folder import EXPERIMENT as DIGEST
from fedpref.engines.site_masks import FILE as SUMS
from fedpref.errors import UserError
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.private import FOLDER
from fedpref.experiments.rounds import Event
from fedpref.experiments.run_directory import RunDirectory
from fedpref.experiments.run_lock import RunLock
from fedpref.privacy.secret import FILE as SECRET
from fedpref.sites import RUNS, SITE, TELLS
from fedpref.sites.kits import CLASSES
from fedpref.sites.programs import SIMULATED, check_name, job

LOG, TOLD, EXPERIMENT = "log.txt", "told.jsonl", "experiment.json"
# of a site's folder; who keeps the secret keeps the noise
NOT_HANDED_OVER = shutil.ignore_patterns(
    f"{STORE}*", CLIENTS, OPENINGS, DIGEST, SUMS, f"{SECRET}*", "cache"
)


def simulated(experiment: Experiment, folder: RunDirectory) -> Generator[Event, None, None]:
    """Run an experiment, or what is left of it, job after job, and yield its events.

    What sites have kept of a run that is done goes into its directory, but for secrets and what
    clients had under way.
    """
    path = folder.path.resolve()
    check_name(path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = RunLock(path.parent / SIMULATED / path.name)  # the run's own is its coordinator's
    lock.acquire()
    try:
        yield from _jobs(experiment, path)
    finally:
        lock.release()


def _jobs(experiment: Experiment, path: Path) -> Generator[Event, None, None]:
    if not path.exists():
        for left in (path.parent / SIMULATED).glob(f"*/{path.name}"):
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="fedpref-flare-") as name:
        scratch = Path(name)
        (scratch / TOLD).touch()
        (scratch / EXPERIMENT).write_text(json.dumps(config.dump(experiment)))
        environment = {
            **os.environ,
            RUNS: str(path.parent),
            TELLS: str(scratch / TOLD),
            "OMP_NUM_THREADS": "1",
            # modules of one's own are found as they are here
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        }
        environment.pop(SITE, None)
        while True:
            with (scratch / LOG).open("a") as log:
                command = [sys.executable, "-m", "fedpref.sites.simulated", name, path.name]
                process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd=scratch,
                    start_new_session=True,
                )
            try:
                end = yield from _told(scratch, process)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the sites' processes too
                process.wait()
            if end == "done":
                break
    for kept in sorted((path.parent / SIMULATED).glob(f"*/{path.name}")):
        hand_over(kept, path)
        shutil.rmtree(kept)


def hand_over(kept: Path, path: Path) -> None:
    """Copy what a site has kept of a run that is done into the run's directory."""
    places = {str(kept), str(kept / FOLDER)}  # clients may be called as a file of the site's is

    def held_back(place: str, names: list[str]) -> set[str]:
        return NOT_HANDED_OVER(place, names) if place in places else set()

    shutil.copytree(kept, path, ignore=held_back, dirs_exist_ok=True)


def _told(scratch: Path, process: Any) -> Generator[Event, None, str]:
    """Yield the events of one job until it ends, and return how.

    Raises:
        UserError: It failed.
    """
    start, line = (scratch / TOLD).stat().st_size, ""
    with (scratch / TOLD).open() as told:
        told.seek(start)
        while True:
            has_ended = process.poll() is not None
            line += told.readline()
            if line.endswith("\n"):
                content, line = json.loads(line), ""
                if "error" in content:
                    raise UserError(content["error"])
                if "end" in content:
                    process.wait()
                    return str(content["end"])
                yield Event(**content)
            elif has_ended:
                last = "\n".join((scratch / LOG).read_text(errors="replace").splitlines()[-15:])
                raise UserError(
                    "the simulation of sites ended before the experiment did. It said "
                    f"last:\n{last}"
                )
            else:
                time.sleep(0.1)


def main(scratch: Path, run: str) -> None:
    """Run one job, in a process of its own, which FLARE's simulator takes for itself."""
    threading.Thread(target=_go_with, args=(os.getppid(),), daemon=True).start()
    experiment = config.parse(
        Experiment, json.loads((scratch / EXPERIMENT).read_text()), "the experiment"
    )
    simulate(
        job(experiment, run, simulated=experiment.sites), experiment.sites, scratch / "workspace"
    )


def _go_with(parent: int) -> None:
    """End this process and its sites' when its parent is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def simulate(recipe: Any, sites: int, workspace: Path, classes: Sequence[str] = CLASSES) -> None:
    """Run a job over simulated sites, each a process.

    Args:
        recipe: The job.
        sites: How many.
        workspace: FLARE's folder.
        classes: Classes that the processes may run.
    """
    local = workspace / recipe.name / "local"
    local.mkdir(parents=True, exist_ok=True)
    (local / "resources.json").write_text(json.dumps({"class_allow_list": list(classes)}))
    recipe.execute(
        SimEnv(
            clients=[f"site-{number + 1}" for number in range(sites)], workspace_root=str(workspace)
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
