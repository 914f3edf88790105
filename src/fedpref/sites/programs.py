"""What runs in FLARE's processes: the coordinator on the server, `Sited` in each client's.

A job runs so many rounds of an experiment, from its last checkpoint. What travels are our own
messages, as bytes, so that FLARE's serialisation sees no object of ours.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from nvflare.collab import CollabRecipe, collab

from fedpref import config
from fedpref.engines.host import Host
from fedpref.engines.kept_sums import FOLDER as SUMS
from fedpref.engines.requests import run_name
from fedpref.engines.site import Site
from fedpref.engines.site_masks import Identity, Unsigned
from fedpref.errors import UserError
from fedpref.experiments.clients import SimulatedSite
from fedpref.experiments.experiment import Experiment, with_whole_paths
from fedpref.experiments.rounds import events
from fedpref.experiments.run_directory import RunDirectory
from fedpref.privacy.secret import FILE as SECRET
from fedpref.sites import FUNCTIONS, RUNS, SAYS, SITE, TELLS
from fedpref.sites.consent import consenting, refuse_code
from fedpref.sites.identity import KitIdentity

STARTUP = "startup"  # in a kit: key and certificates
SIMULATED = ".sites"  # beside runs: what simulated sites keep until a run is done


class Sited:
    """The program of a site's process."""

    def __init__(self, simulated: int = 0) -> None:
        # how many sites are simulated; 0: this is a real one, with a file of its own
        self.simulated = simulated

    @collab.init
    def start(self) -> None:
        """Set the site up, as FLARE starts the process."""
        name = collab.site_name
        host: Host
        file = os.environ.get(SITE)
        if file:
            host, folder = consenting(name, Path(file))
        elif self.simulated:
            host, folder = (
                SimulatedSite(int(name.rsplit("-", 1)[1]) - 1, self.simulated),
                Path(os.environ[RUNS]) / SIMULATED / name,
            )
        else:
            raise UserError(f"{SITE} is not set: start the site by `fedpref site start`.")
        # sites of one machine have nobody between them
        identity: Identity = KitIdentity(Path(file).parent / STARTUP) if file else Unsigned()
        self._site = Site(name, host, folder, self, identity)
        self._is_secure = bool(file)  # whatever the job says

    @collab.publish
    def answer(self, message: bytes) -> bytes:
        """Answer the coordinator; nobody else may ask."""
        if collab.caller != "server":
            raise PermissionError(f"{collab.caller} is not the coordinator")
        return self._site.answer(message)

    @collab.publish
    def hear(self, message: bytes) -> None:
        """Take what another site's clients tell clients here."""
        self._site.hear(collab.caller, message)

    def tell(self, site: str, message: bytes) -> None:
        """Send what clients here tell those of another site."""
        collab.get_clients([site])(secure=self._is_secure, expect_result=False).hear(message)


class Collab:
    """The coordinator's way to sites."""

    @property
    def sites(self) -> Sequence[str]:
        return sorted(site.name for site in collab.clients)

    def ask(self, messages: Mapping[str, bytes], seconds: float) -> dict[str, bytes]:
        running = {
            site: collab.get_clients([site])(blocking=False, timeout=seconds).answer(message)
            for site, message in messages.items()
        }
        return {site: bytes(answer) for site, results in running.items() for _, answer in results}


class Coordinator:
    """The program of the server's process: rounds of an experiment, from its last checkpoint.

    It tells what happens, and how the job ended.
    """

    def __init__(self, experiment: str, run: str, rounds: int) -> None:
        self.experiment, self.run, self.rounds = experiment, run, rounds

    @collab.main
    def main(self) -> None:
        tell = _teller()
        try:
            check_name(self.run)
            folder = RunDirectory(Path(os.environ[RUNS]) / self.run)
            self._rounds(folder, tell)
            if TELLS not in os.environ:
                _hand_over(folder)
            tell({"end": "done" if folder.done else "more"})
        except UserError as error:
            tell({"error": str(error)})
        except Exception as error:
            tell({"error": f"{type(error).__name__}: {error}"})
            raise

    def _rounds(self, folder: RunDirectory, tell: Callable[[Mapping[str, Any]], None]) -> None:
        content, functions = json.loads(self.experiment), os.environ.get(FUNCTIONS, "").split(",")
        if TELLS in os.environ:
            spec = config.parse(Experiment, content, "the experiment")
        else:
            with config.of_somebody_else(functions):
                spec = config.parse(Experiment, content, "the experiment")
            refuse_code(spec, functions)
        done = 0
        with closing(events(spec, folder, transport=Collab())) as happenings:
            for event in happenings:
                tell(asdict(event))
                done += event.kind == "round"
                if event.kind == "round" and done == self.rounds:
                    return


def _teller() -> Callable[[Mapping[str, Any]], None]:
    """Return a function that tells the submitter what happens."""
    if file := os.environ.get(TELLS):
        path = Path(file)

        def write(content: Mapping[str, Any]) -> None:
            with path.open("a") as told:
                told.write(json.dumps(content) + "\n")

        return write
    logger, numbers = logging.getLogger("fedpref"), count(1)
    return lambda content: logger.info(SAYS + json.dumps({"number": next(numbers), **content}))


def _hand_over(folder: RunDirectory) -> None:
    """Copy the run directory to where FLARE takes a job's results from."""
    context = collab.fl_ctx
    result = Path(context.get_workspace().get_run_dir(context.get_job_id())) / "fedpref"
    # who keeps the secret keeps the noise, and who has sums as sites gave them needs it less;
    # results stay at the server
    kept_back = shutil.ignore_patterns("cache", SUMS, f"{SECRET}*")
    shutil.copytree(folder.path, result, ignore=kept_back)


def check_name(run: str) -> None:
    """Raise UserError for a run's name that sites would not take."""
    try:
        run_name(run)
    except ValueError as error:
        raise UserError(
            f"a run cannot be called {run[:40]!r}: {error}. Give another --output."
        ) from error


def job(experiment: Experiment, run: str, *, simulated: int = 0) -> Any:
    """Return a job of an experiment's next rounds, for any environment of FLARE's."""
    content = json.dumps(config.dump(with_whole_paths(experiment) if simulated else experiment))
    coordinator = Coordinator(content, run, experiment.patience.rounds_per_job)
    least = simulated or experiment.patience.min_sites
    return recipe(
        run.replace("/", "-"), coordinator, least, experiment.patience.seconds, simulated=simulated
    )


def recipe(
    name: str,
    coordinator: Any,
    min_sites: int,
    seconds: float,
    *,
    simulated: int = 0,
    site: Any = None,
) -> Any:
    """Return a job of a coordinator's program over sites.

    Args:
        name: The job's.
        coordinator: The program.
        min_sites: How many sites must have come for it to begin.
        seconds: How long is waited.
        simulated: How many sites are simulated; 0 for real ones.
        site: The program of the sites' processes; None is `Sited`.
    """
    made = _Recipe(
        job_name=name,
        server=coordinator,
        client=Sited(simulated) if site is None else site,
        min_clients=min_sites,
        sync_task_timeout=seconds,
    )
    # every participant has these installed, so that FLARE ships none
    made.finalize().set_app_packages(["fedpref", type(coordinator).__module__.split(".")[0]])
    return made


class _Recipe(CollabRecipe):  # type: ignore[misc]  # FLARE has no types
    """A job without code: server and sites have this package installed.

    A site that lets no job bring code of its own stays so.
    """

    @staticmethod
    def _user_source_entries(objs: Any) -> list[Any]:
        return []
