"""Experiments over sites on NVIDIA FLARE 2.9, through its Collab API; all that is known of FLARE is in this file.

The coordinator's program runs on the FLARE server, a `Site` in each client's process. A job runs so many rounds of an experiment, from its
last checkpoint; what travels are our own messages, as bytes, so that FLARE's serialisation sees no object of ours.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvflare.collab import CollabRecipe, collab

from fedpref import config
from fedpref.engines.site import RUN, Host, Site
from fedpref.errors import UserError
from fedpref.experiment import Experiment, with_whole_paths
from fedpref.hosting import consenting, refuse_code
from fedpref.places import Share
from fedpref.rundirectory import CONFIG, RunDirectory
from fedpref.running import Event, events

SITE_FILE = "FEDPREF_SITE"  # the environment variable that names a site's file
TOLD, SUBMITTED = "told.jsonl", "submitted.json"
RUNS = "FEDPREF_RUNS"  # and the one that names the coordinator's folder of runs
TELLS = "FEDPREF_TELLS"  # the file in which a simulation's coordinator tells what happens
FUNCTIONS = "FEDPREF_FUNCTIONS"  # rewards that a server may import, with commas between


class Sited:
    """What runs in a site's process."""

    def __init__(self, simulated: int = 0) -> None:
        self.simulated = simulated  # how many sites are simulated; 0: this is a real one, with a file of its own

    @collab.init
    def start(self) -> None:
        name = collab.site_name
        host: Host
        file = os.environ.get(SITE_FILE)
        if file:
            host, folder = consenting(name, Path(file))
        elif self.simulated:
            host, folder = Share(int(name.rsplit("-", 1)[1]) - 1, self.simulated), Path(os.environ[RUNS]) / ".sites" / name
        else:
            raise UserError(f"{SITE_FILE} is not set: start the site by `fedpref site start`.")
        self._site = Site(name, host, folder, self)
        self._is_secure = not self.simulated

    @collab.publish
    def answer(self, message: bytes) -> bytes:
        """What the coordinator asks; other sites have nothing to ask."""
        if collab.caller != "server":
            raise PermissionError(f"{collab.caller} is not the coordinator")
        return self._site.answer(message)

    @collab.publish
    def hear(self, message: bytes) -> None:
        """What another site's clients tell clients here."""
        self._site.hear(collab.caller, message)

    def tell(self, site: str, message: bytes) -> None:
        collab.get_clients([site])(secure=self._is_secure, expect_result=False).hear(message)


class Collab:
    """The way from the coordinator to sites."""

    @property
    def sites(self) -> Sequence[str]:
        return sorted(site.name for site in collab.clients)

    def ask(self, messages: Mapping[str, bytes], seconds: float) -> dict[str, bytes]:
        running = {site: collab.get_clients([site])(blocking=False, timeout=seconds).answer(message) for site, message in messages.items()}
        return {site: bytes(answer) for site, results in running.items() for _, answer in results}


class Coordinator:
    """What runs on the server: rounds of an experiment, from its last checkpoint; what happens is told in a file."""

    def __init__(self, experiment: str, run: str, rounds: int) -> None:
        self.experiment, self.run, self.rounds = experiment, run, rounds

    @collab.main
    def main(self) -> None:
        if not RUN.fullmatch(self.run):
            raise UserError(f"a run cannot be called {self.run[:40]!r}")
        folder = Path(os.environ[RUNS]) / self.run
        with Path(os.environ.get(TELLS) or f"{folder}.{TOLD}").open("a") as told:

            def tell(content: Mapping[str, Any]) -> None:
                told.write(json.dumps(content) + "\n")
                told.flush()

            try:
                done = 0
                spec = config.parse(Experiment, json.loads(self.experiment), "the experiment")
                if TELLS not in os.environ:
                    refuse_code(spec, os.environ.get(FUNCTIONS, "").split(","))
                for event in events(spec, RunDirectory(folder), transport=Collab()):
                    tell(asdict(event))
                    done += event.kind == "round"
                    if done == self.rounds and event.kind == "round":
                        break
                tell({"end": "done" if RunDirectory(folder).done else "more"})
            except UserError as error:
                tell({"error": str(error)})
            except Exception as error:
                tell({"error": f"{type(error).__name__}: {error}"})
                raise
            finally:
                self._hand_over(folder, Path(told.name))

    def _hand_over(self, folder: Path, told: Path) -> None:
        """Put what the run has come to where FLARE takes a job's results from."""
        context = collab.fl_ctx
        result = Path(context.get_workspace().get_run_dir(context.get_job_id())) / "fedpref"
        result.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(told, result / TOLD)
        if folder.exists():
            shutil.copytree(folder, result / "run", ignore=shutil.ignore_patterns("checkpoints", "cache"), dirs_exist_ok=True)


def job(experiment: Experiment, run: str, *, simulated: int = 0) -> Any:
    """A job of the next rounds, for any environment of FLARE's."""
    content = json.dumps(config.dump(with_whole_paths(experiment) if simulated else experiment))
    recipe = _Recipe(
        job_name=run.replace("/", "-"),
        server=Coordinator(content, run, experiment.patience.rounds_per_job),
        client=Sited(simulated),
        min_clients=simulated or experiment.patience.min_sites,
        sync_task_timeout=experiment.patience.seconds,
    )
    recipe.finalize().set_app_packages(["fedpref"])  # which is installed everywhere
    return recipe


class _Recipe(CollabRecipe):  # type: ignore[misc]  # FLARE has no types
    """A job without code: server and sites have this package installed, and a site that lets no job bring code of its own stays so."""

    @staticmethod
    def _user_source_entries(objs: Any) -> list[Any]:
        return []


# ---- real sites


def submitted(experiment: Experiment, admin: Path, folder: RunDirectory) -> Iterator[Event]:
    """An experiment over sites that have been started, job after job; the run directory is fetched from the coordinator after each.

    `admin` is the kit of who submits. Raises UserError where a job ends without having told how.
    """
    from nvflare.recipe import ProdEnv

    place = folder.path.resolve()
    if not (place / SUBMITTED).exists():
        folder.create({CONFIG: config.to_yaml(experiment), SUBMITTED: json.dumps({"admin": str(admin.resolve())}) + "\n"})
    seen = 0
    while True:
        recipe = job(experiment, place.name)
        try:
            with redirect_stdout(io.StringIO()):  # FLARE's own account of it
                run = recipe.execute(ProdEnv(startup_kit_location=str(admin), username=admin.name, login_timeout=30.0))
            yield Event(experiment.algorithm.name, "begin", 0, experiment.rounds, {}, f"job {run.get_job_id()} is with the server")
            with redirect_stdout(io.StringIO()):
                result = run.get_result(clean_up=False)
        except (RuntimeError, OSError) as error:
            raise UserError(f"the job could not be run: {error}. `fedpref resume {folder.path}` tries again.") from error
        files = list(Path(result).rglob(TOLD)) if result else []
        if not files:
            raise UserError(
                f"job {run.get_job_id()} ended as {run.get_status()} and left no record; the server's log has more. "
                f"`fedpref resume {folder.path}` goes on from the last round that was completed."
            )
        lines = [json.loads(line) for line in files[0].read_text().splitlines()]
        fetched = files[0].parent / "run"
        if fetched.is_dir():
            shutil.copytree(fetched, place, dirs_exist_ok=True)
        for content in lines[seen:]:
            if "error" in content:
                raise UserError(content["error"])
            if "kind" in content:
                yield Event(**content)
        seen = len(lines)
        if lines[-1].get("end") == "done":
            return


# ---- simulated sites


def simulated(experiment: Experiment, folder: RunDirectory) -> Iterator[Event]:
    """An experiment over simulated sites, each a process of its own on this machine; events come as they are told."""
    place = folder.path.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedpref-flare-") as scratch:
        told = Path(scratch) / "told.jsonl"
        told.touch()
        (Path(scratch) / "experiment.json").write_text(json.dumps(config.dump(experiment)))
        environment = {**os.environ, RUNS: str(place.parent), TELLS: str(told), "OMP_NUM_THREADS": "1"}
        environment.pop(SITE_FILE, None)
        while True:
            with (Path(scratch) / "log.txt").open("a") as log:
                command = [sys.executable, "-m", "fedpref.flare", scratch, place.name]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=scratch)
            try:
                end = yield from _told(told, process, Path(scratch) / "log.txt")
            finally:
                process.terminate()
                process.wait()
            if end == "done":
                return


def _told(file: Path, process: Any, log: Path) -> Generator[Event, None, str]:
    """Events of one job until it ends; returns how, raises UserError where it failed."""
    start = file.stat().st_size
    with file.open() as lines:
        lines.seek(start)
        while True:
            if not (line := lines.readline()):
                if process.poll() is not None and not (line := lines.readline()):
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                    raise UserError(f"the simulation of sites ended before the experiment did. It said last:\n{tail}")
                time.sleep(0.1 if not line else 0)
                continue
            content = json.loads(line)
            if "error" in content:
                raise UserError(content["error"])
            if "end" in content:
                process.wait()
                return str(content["end"])
            yield Event(**content)


def _simulate(scratch: Path, run: str) -> None:
    from nvflare.recipe import SimEnv

    experiment = config.parse(Experiment, json.loads((scratch / "experiment.json").read_text()), "the experiment")
    job(experiment, run, simulated=experiment.sites).execute(
        SimEnv(clients=[f"site-{k + 1}" for k in range(experiment.sites)], workspace_root=str(scratch / "workspace"))
    )


if __name__ == "__main__":
    _simulate(Path(sys.argv[1]), sys.argv[2])
