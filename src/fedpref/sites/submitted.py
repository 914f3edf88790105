"""An experiment over sites that have been started, submitted to their server job after job."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.recipe import ProdEnv

from fedpref import config
from fedpref.errors import UserError, command
from fedpref.experiments.experiment import Experiment
from fedpref.experiments.rounds import Event
from fedpref.experiments.run_directory import CONFIG, RunDirectory
from fedpref.sites import SAYS
from fedpref.sites.programs import check_name, job

SUBMITTED = "submitted.json"  # in a run directory: by whose kit, and the run's name at the server
LOGIN, POLL = 30.0, 2.0  # seconds
LOG = 2**17  # bytes of log for which a poll is waited; a longer one is fetched less often
T = TypeVar("T")


def submitted(
    experiment: Experiment, admin: Path, folder: RunDirectory
) -> Generator[Event, None, None]:
    """Run an experiment, or what is left of it, and yield its events.

    The run directory is fetched from the coordinator after each job.

    Args:
        experiment: The experiment.
        admin: The kit of who submits.
        folder: The run directory.

    Raises:
        UserError: The server cannot be reached, or a job ends without having told how.
    """
    if not (admin / "startup").is_dir():
        raise UserError(
            f"{admin}: this is no kit. Give by --admin the folder of who submits, which `fedpref "
            "federation init` made."
        )
    path = folder.path.resolve()
    check_name(path.name)
    if (path / SUBMITTED).exists():
        run = json.loads((path / SUBMITTED).read_text())["run"]
    else:
        run = f"{path.name}-{uuid.uuid4().hex[:8]}"
        record = {"admin": str(admin.resolve()), "run": run}
        folder.create({CONFIG: config.to_yaml(experiment), SUBMITTED: json.dumps(record) + "\n"})
    while (yield from _job(experiment, run, admin, folder)) != "done":
        continue


def admin_of(folder: RunDirectory) -> Path | None:
    """Return the kit by which a run was submitted; None for one that was not."""
    record = folder.path / SUBMITTED
    return Path(json.loads(record.read_text())["admin"]) if record.exists() else None


def _job(
    experiment: Experiment, run: str, admin: Path, folder: RunDirectory
) -> Generator[Event, None, str]:
    """Yield the events of one job until it ends, and return how.

    Who stops listening stops the job.
    """
    again = f"`{command('resume', folder.path)}` goes on from the last round that was completed."
    environment = ProdEnv(startup_kit_location=str(admin), username=admin.name, login_timeout=LOGIN)
    number = _asked(lambda: job(experiment, run).execute(environment).get_job_id(), again)
    session: Session = _asked(
        lambda: new_secure_session(admin.name, str(admin), timeout=LOGIN), again
    )
    yield Event(
        experiment.algorithm.name,
        "begin",
        0,
        experiment.rounds,
        {},
        f"job {number} is with the server",
    )
    end, heard = "", 0
    try:
        while not end:
            status = str(_asked(lambda: session.get_job_meta(number), again)["status"])
            log = _asked(lambda: session.get_job_logs(number), again)["logs"].get("server", "")
            for content in (
                json.loads(line.split(SAYS, 1)[1]) for line in log.splitlines() if SAYS in line
            ):
                if (said := content.pop("number")) <= heard:
                    continue
                heard = said
                if "error" in content:
                    raise UserError(content["error"])
                if "kind" in content:
                    yield Event(**content)
                end = content.get("end", "")
            if not end and status.startswith("FINISHED"):
                raise UserError(
                    f"job {number} ended as {status}, and did not say how. Its log at the server "
                    f"has more. {again}"
                )
            # FLARE hands out a log as a whole: fetched at a fixed pace, what crosses the wire would
            # grow with the square of the run
            time.sleep(pause(len(log)))
        while not str(_asked(lambda: session.get_job_meta(number), again)["status"]).startswith(
            "FINISHED"
        ):
            time.sleep(POLL)
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(_asked(lambda: session.download_job_result(number, scratch), again))
            for fetched in result.rglob("fedpref/config.yaml"):
                # settings are the submitter's: those that a server sends might name code
                def own(place: str, names: list[str], top: Path = fetched.parent) -> set[str]:
                    return {CONFIG, SUBMITTED} & set(names) if Path(place) == top else set()

                shutil.copytree(fetched.parent, folder.path, ignore=own, dirs_exist_ok=True)
    except (GeneratorExit, KeyboardInterrupt):
        _asked(lambda: session.abort_job(number), again)
        raise
    finally:
        session.close()
    return end


def pause(length: int) -> float:
    """Return the seconds until a log of so many bytes is fetched again."""
    return POLL * max(1.0, length / LOG)


def set_admitted(site: str, admin: Path, admits: bool, *, absent: bool = False) -> None:
    """Let a site take part in a federation, or no longer.

    The server turns an expelled site away, whatever certificate it has.

    Args:
        site: Its name.
        admin: The kit of who submits.
        admits: Whether it may take part.
        absent: Do so although no site of that name is connected.

    Raises:
        UserError: The server cannot be reached, or no such site is there to be expelled.
    """
    session: Session = _session(admin)
    try:
        there = {one.name for one in _asked(session.get_connected_client_list)}
        if not admits and not absent and site not in there:
            raise UserError(
                f"no site called {site!r} is connected; there are {', '.join(sorted(there))}. Give "
                "--absent to turn away one that is not."
            )
        _asked(lambda: (session.enable_client if admits else session.disable_client)(site))
    finally:
        session.close()


@dataclass(frozen=True)
class Connected:
    """A site as the server knows it.

    Attributes:
        name: Its name.
        seconds: Since it was last heard.
        version: The version of its FLARE.
    """

    name: str
    seconds: float
    version: str


def connected(admin: Path) -> tuple[list[Connected], str]:
    """Return who is connected to a server, and its last job in words.

    Raises:
        UserError: The server cannot be reached.
    """
    session: Session = _session(admin)
    try:
        clients = _asked(session.get_connected_client_list)
        versions: Any = _asked(lambda: session.report_version("all"))
        jobs: Any = _asked(lambda: session.list_jobs(limit=1, reverse=True))
        last = "there was no job yet"
        if jobs:
            job_id, name = jobs[0].get("job_id", ""), jobs[0].get("job_name", "")
            log = _asked(lambda: session.get_job_logs(job_id))["logs"].get("server", "")
            said = [json.loads(line.split(SAYS, 1)[1]) for line in log.splitlines() if SAYS in line]
            done = [one for one in said if one.get("kind") == "round"]
            rounds = f", round {done[-1]['done']} of {done[-1]['total']}" if done else ""
            last = f"last job: {name}, {jobs[0].get('status', '')}{rounds}"
        now = time.time()
        found = [
            Connected(
                one.name,
                now - (one.last_connect_time or now),
                str(versions.get(one.name, {}).get("version", "")),
            )
            for one in clients
        ]
        return sorted(found, key=lambda one: one.name), last
    finally:
        session.close()


def _session(admin: Path) -> Session:
    if not (admin / "startup").is_dir():
        raise UserError(
            f"{admin}: this is no kit. Give by --admin the folder of who submits, which `fedpref "
            "federation init` made."
        )
    session: Session = _asked(lambda: new_secure_session(admin.name, str(admin), timeout=LOGIN))
    return session


def _asked(call: Callable[[], T], again: str = "") -> T:
    """Call FLARE with its console output suppressed; any exception becomes a UserError."""
    try:
        with redirect_stdout(io.StringIO()):
            return call()
    except Exception as error:
        raise UserError(
            f"the server could not be asked: {type(error).__name__}: {error}. {again}"
        ) from error
