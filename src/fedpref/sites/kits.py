"""A federation of real hosts: certificates, and a folder (kit) for each participant."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from fedpref.errors import UserError
from fedpref.numerics import files
from fedpref.sites.identity import SITE_ORGANISATION

SITE_FILE, LOG, README = "site.yaml", "fedpref.log", "readme.txt"
LONGEST_LOG = 20 * 10**6  # bytes, above which the log of the last start is set aside
VALID_DAYS = 3650  # of a root
CERTIFICATES = "cert.json"  # in `state`: all certificates, by participant
SPLIT_KEY = "split.key"  # a secret of all sites, in their kits and in `state`
PROJECT, STATE = "project.yml", "state"  # of a federation: its participants, and the root's key
CLASSES = [
    "fedpref.sites.programs.Coordinator",
    "fedpref.sites.programs.Sited",
    "nvflare.collab.runtime.controller.CollabController",
    "nvflare.collab.runtime.executor.CollabExecutor",
]
LEFT = ("shutdown.fl", "pid.fl", "daemon_pid.fl")  # files that FLARE leaves in a kit
SHELL = ("bash", "sh")
# in which a killed process is gone, unless the system holds it or it is another user's
KILL_SECONDS = 10.0
# seconds that a server waits at a job's end for sites that have died
PROMPT = {"NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "15"}
SITE_README = """This folder is a site of a fedpref federation.
It holds the site's private key: nobody else may read it.

1. pip install "fedpref[flare]"
2. Edit site.yaml: where the rows are, and what the site consents to.
3. fedpref site check THIS-FOLDER
4. fedpref site start THIS-FOLDER        (as a service: --foreground)

`fedpref site status` and `fedpref site stop` do what they say. Logs: fedpref.log and log.txt.
Back up site.yaml, split.key and the folder of runs (fedpref/); startup/ can be made anew.
start.sh and the like are the engine's own: `fedpref site start` sets what they leave out.
"""
OTHER_README = """This folder is the server's, or who submits', in a fedpref federation.
It holds a private key: nobody else may read it.

The server:  pip install "fedpref[flare]"; fedpref site start THIS-FOLDER --runs RUNS
Submitting:  fedpref submit CONFIG --admin THIS-FOLDER
Who is there: fedpref federation status --admin THIS-FOLDER

start.sh and the like are the engine's own: `fedpref site start` sets what they leave out.
"""
TEMPLATE = """# What this site brings to experiments, and what it consents to. This file stays here.
# All keys: `fedpref list site`.
# rows with prompt, chosen, rejected; the path is as seen from this file
data: {name: files, path: preferences.jsonl}
client: %s # the name that others see; with `partition`, the names are those of its clients
algorithms: [feddpo, fedpdpo, decdpo, alone] # `alone` is what experiments are compared with
limits: {} # what they may ask for; without more: updates of 8 examples at least, batches of 4
split_key: split.key # of all sites, and not of the coordinator: tells which prompts are held out
max_rounds: 1000
"""


def provision(
    folder: Path,
    name: str,
    server: str,
    port: int,
    sites: Sequence[str],
    admin: str,
    valid_days: int = VALID_DAYS,
) -> dict[str, Path]:
    """Make certificates and a kit for each participant, by FLARE's provisioning.

    No kit lets a job bring code of its own: what runs is what is installed. Keep the folder
    `state`, it has the root's key.

    Args:
        folder: Where kits go.
        name: The federation's name.
        server: The host name by which sites reach the server.
        port: The one port that must be open there.
        sites: Names of the sites.
        admin: Who submits experiments, as an address.
        valid_days: How long the root is valid; participants' certificates are so for 360 days, and
            never longer than the root's.

    Returns:
        Each participant's kit.

    Raises:
        UserError: The folder is there already, or a name cannot be used.
    """
    if folder.exists():
        raise UserError(
            f"{folder} is there already. Give another folder, or add a site by `fedpref "
            "federation add`."
        )
    if not 0 < port < 2**16:
        raise UserError(f"port {port}: ports go from 1 to {2**16 - 1}.")
    for site in sites:
        _refuse_site(site)
    _refuse_names([server, *sites, admin])
    participants: list[dict[str, Any]] = [
        {"name": server, "type": "server", "org": "coordinator", "fed_learn_port": port}
    ]
    participants += [_client(site) for site in sites]
    participants += [{"name": admin, "type": "admin", "org": "coordinator", "role": "lead"}]
    builders = [
        {
            "path": "nvflare.lighter.impl.workspace.WorkspaceBuilder",
            "args": {"template_file": ["master_template.yml"]},
        },
        {
            "path": "nvflare.lighter.impl.static_file.StaticFileBuilder",
            "args": {"config_folder": "config"},
        },
        {"path": "nvflare.lighter.impl.cert.CertBuilder", "args": {"root_valid_days": valid_days}},
        {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
    ]
    project = {
        "api_version": 3,
        "name": name,
        "description": name,
        "participants": participants,
        "builders": builders,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _provisioned(project, folder.parent) as made:
        made.replace(folder)
    return {participant["name"]: folder / participant["name"] for participant in participants}


def add(folder: Path, site: str) -> Path:
    """Make the kit of one more site, under the root of a federation; nobody else's kit changes."""
    project = _project(folder)
    _refuse_site(site)
    _refuse_names([*(participant["name"] for participant in project["participants"]), site])
    project["participants"].append(_client(site))
    with _provisioned(project, folder, folder / STATE) as made:
        for name in (site, STATE, PROJECT):
            _put(made / name, folder / name)
    return folder / site


def _refuse_site(name: str) -> None:
    if set(name) & set(".%+@"):
        raise UserError(
            f"no site can be called {name!r:.80}: its name has letters from A to Z, digits, - and "
            "_. Give it another."
        )


def _refuse_names(names: Sequence[str]) -> None:
    """Raise UserError for participants whose folders would be one, or one that is not a kit."""
    seen: dict[str, str] = {}
    for name in names:
        # as NVIDIA FLARE and certificates take them; a server is a host, an admin an address
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._%+@-]{0,63}", name):
            raise UserError(
                f"no participant can be called {name!r:.80}: a name has at most 64 letters from A "
                "to Z, digits, - and _, and begins with a letter or a digit. Give it another."
            )
        # file systems may not tell large letters from small ones
        plain = name.casefold()
        if plain in (STATE, PROJECT) or (plain == "server" and name != names[0]):
            raise UserError(
                f"no participant can be called {name!r}: the federation has a folder or a role of "
                "that name. Give it another."
            )
        if plain in seen:
            raise UserError(
                f"two participants have the same name: {seen[plain]!r} and {name!r}. Give each a "
                "name of its own."
            )
        seen[plain] = name


def _put(made: Path, place: Path) -> None:
    """Move what was made to its place; what was there goes last, and a crash loses neither."""
    before = _before(place)
    if place.is_dir():
        shutil.rmtree(before, ignore_errors=True)
        place.replace(before)
    made.replace(place)
    shutil.rmtree(before, ignore_errors=True)


def _before(place: Path) -> Path:
    """Return where a folder is while another takes its place; no participant is called so."""
    return place.with_name(f".{place.name}.before")


def _project(folder: Path) -> Any:
    """Return a federation's project, with its root's key in place, whatever was broken off.

    Raises:
        UserError: There is no federation here.
    """
    if not (folder / PROJECT).exists():
        raise UserError(
            f"{folder}: there is no federation here (no {PROJECT}). Give the folder that "
            "`fedpref federation init` made."
        )
    before = _before(folder / STATE)
    if before.exists() and not (folder / STATE).exists():
        before.replace(folder / STATE)
    shutil.rmtree(before, ignore_errors=True)
    return yaml.safe_load((folder / PROJECT).read_text())


def renew(folder: Path, names: Sequence[str], valid_days: int | None = None) -> dict[str, Path]:
    """Make new certificates, of participants or of the root and with it of everybody.

    Args:
        folder: The federation.
        names: Whose; empty for all.
        valid_days: Make a new root, which is valid so long; None keeps the root.

    Returns:
        By participant, the folder that takes the place of `startup` in its kit.

    Raises:
        UserError: There is no federation, or no such participant.
    """
    project = _project(folder)
    everybody = [participant["name"] for participant in project["participants"]]
    if unknown := sorted(set(names) - set(everybody)):
        raise UserError(
            f"{folder}: there is no participant called {unknown[0]!r}; there are "
            f"{', '.join(everybody)}."
        )
    chosen = everybody if valid_days is not None or not names else list(names)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        state = Path(scratch) / STATE
        shutil.copytree(folder / STATE, state)
        known = state / CERTIFICATES
        if valid_days is not None:
            known.unlink(missing_ok=True)
            for builder in project["builders"]:
                if builder["path"].endswith("CertBuilder"):
                    builder["args"] = {"root_valid_days": valid_days}
        else:
            content = json.loads(known.read_text())
            files.write(known, json.dumps({k: v for k, v in content.items() if k not in chosen}))
        renewed = {}
        with _provisioned(project, folder, state) as made:
            for name in chosen:
                renewed[name] = folder / name / "startup"
                shutil.rmtree(renewed[name], ignore_errors=True)
                renewed[name].parent.mkdir(exist_ok=True)
                (made / name / "startup").replace(renewed[name])
            for name in (STATE, PROJECT):
                _put(made / name, folder / name)
    return renewed


@contextmanager
def _provisioned(
    project: Mapping[str, Any], beside: Path, state: Path | None = None
) -> Iterator[Path]:
    """Yield a folder with all kits of a project, by the root's key in `state` or by a new one.

    It goes afterwards, but for what is taken from it.
    """
    with tempfile.TemporaryDirectory(dir=beside, prefix=".") as scratch:
        (Path(scratch) / PROJECT).write_text(yaml.safe_dump(project, sort_keys=False))
        project_folder = Path(scratch) / "made" / project["name"]
        if state is not None:
            shutil.copytree(state, project_folder / STATE)
        command = [
            sys.executable,
            "-m",
            "nvflare.cli",
            "provision",
            "-p",
            PROJECT,
            "-w",
            "made",
            "--force",
        ]
        ran = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        known = project_folder / STATE / SPLIT_KEY
        secret = known.read_text() if known.exists() else secrets.token_hex(32)
        made = project_folder / "prod_00"
        if ran.returncode or not made.is_dir():
            raise UserError(f"provisioning failed: {(ran.stdout + ran.stderr).strip()[-600:]}")
        for kit in made.iterdir():
            _restrict(kit / "local")
            if (kit / README).exists():
                is_site = any(
                    one["name"] == kit.name and one["type"] == "client"
                    for one in project["participants"]
                )
                (kit / README).write_text(SITE_README if is_site else OTHER_README)
        for participant in project["participants"]:
            if participant["type"] == "client":
                (made / participant["name"] / SITE_FILE).write_text(
                    TEMPLATE % json.dumps(participant["name"])
                )
                _write_secret(made / participant["name"] / SPLIT_KEY, secret)
        _write_secret(project_folder / STATE / SPLIT_KEY, secret)
        shutil.move(project_folder / STATE, made / STATE)
        shutil.move(Path(scratch) / PROJECT, made / PROJECT)
        (made / STATE).chmod(0o700)
        yield made


def _write_secret(file: Path, secret: str) -> None:
    file.touch(mode=0o600)
    file.write_text(secret)


def _client(site: str) -> dict[str, Any]:
    return {"name": site, "type": "client", "org": _org(site)}


def _org(site: str) -> str:
    return SITE_ORGANISATION + "".join(letter if letter.isalnum() else "_" for letter in site)


def _restrict(local: Path) -> None:
    """Let a participant run this package's classes, no code that comes with a job, no commands."""
    resources = local / "resources.json.default"
    if resources.exists():
        content = json.loads(resources.read_text())
        content["class_allow_list"] = CLASSES
        # a site's log may hold its rows, and goes to the server by default
        if "allow_log_streaming" in content:
            content["allow_log_streaming"] = False
            content["components"] = [
                one for one in content["components"] if one["id"] != "site_log_streamer"
            ]
        (local / "resources.json").write_text(json.dumps(content, indent=1))
    rights = local / "authorization.json.default"
    if rights.exists():
        content = json.loads(rights.read_text())
        for role in content["permissions"].values():
            if isinstance(role, dict):
                role |= {"byoc": "none", "shell_commands": "none"}
                if role.get("submit_job") == "any":
                    # in which the coordinator tells what happens
                    role["get_job_log"] = "n:submitter"
                    role["report_version"] = "any"  # for `fedpref federation status`
        (local / "authorization.json").write_text(json.dumps(content, indent=1))


# ---- a kit at work


def refuse_blanks(kit: Path) -> None:
    """Raise UserError for a folder in which no job would begin: FLARE parts its path at blanks."""
    if any(character.isspace() for character in str(kit.resolve())):
        raise UserError(
            f"{kit.resolve()}: NVIDIA FLARE begins no job in a folder with a space in its path. "
            "Move the kit, or name its folders otherwise."
        )


def start(kit: Path, variables: Mapping[str, str], *, foreground: bool = False) -> None:
    """Start a kit's participant, with some environment variables; it starts anew where it dies.

    Args:
        kit: Its folder.
        variables: What its processes find in their environment.
        foreground: Wait for its end, and stop it when this process is told to end; otherwise it
            goes on in the background, also when the caller ends.

    Raises:
        UserError: The folder is no kit, or the participant is running already.
    """
    kit = kit.resolve()
    program = kit / "startup/sub_start.sh"
    if not program.exists():
        raise UserError(f"{kit}: this is no kit of a server or site (no startup/sub_start.sh).")
    refuse_blanks(kit)
    if running(kit):
        raise UserError(f"{kit}: it is running already. `fedpref site stop {kit}` stops it.")
    for left in LEFT:
        (kit / left).unlink(missing_ok=True)
    _keep_apart(kit)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **PROMPT, **variables}
    if foreground:
        _wait_for(kit, subprocess.Popen(["bash", str(program)], env=environment, cwd=kit))
        return
    if (kit / LOG).exists() and (kit / LOG).stat().st_size > LONGEST_LOG:
        (kit / LOG).replace(kit / f"{LOG}.1")
    with (kit / LOG).open("a") as log:
        subprocess.Popen(
            ["bash", str(program)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=kit,
            start_new_session=True,
        )


def _wait_for(kit: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait for a participant's end, which SIGTERM and Ctrl-C bring about."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        if status := process.wait():
            raise UserError(f"{kit}: its program ended with status {status}.")
    except KeyboardInterrupt:
        stop(kit)
        process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep_apart(kit: Path) -> None:
    """Let a server keep its jobs in its kit.

    By default all servers of a machine share one folder, and take one another's jobs.
    """
    resources = kit / "local/resources.json"
    content = json.loads(resources.read_text())
    for component in content.get("components", ()):
        if component.get("id") == "job_manager":
            component["args"]["uri_root"] = str(kit / "jobs")
    if persistor := content.get("snapshot_persistor"):
        persistor["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
    resources.write_text(json.dumps(content, indent=1))


def stop(kit: Path, seconds: float = 20.0) -> None:
    """Stop a kit's participant, with the jobs that it runs; nothing happens where it does not run.

    Raises:
        UserError: A process cannot be ended.
    """
    (kit / "shutdown.fl").touch()
    for process in _processes(kit):
        with suppress(psutil.Error):
            if not process.name().startswith(SHELL):  # which would start it anew, but for the file
                _end(process, signal.SIGTERM)
    psutil.wait_procs(_processes(kit), timeout=seconds)
    while killed := _processes(kit):  # one may have started another since
        for process in killed:
            _end(process, signal.SIGKILL)
        _, alive = psutil.wait_procs(killed, timeout=KILL_SECONDS)
        if alive:
            raise UserError(
                f"{kit}: process {alive[0].pid} cannot be ended. See whose it is (`ps -f -p "
                f"{alive[0].pid}`); end it there."
            )
    for left in LEFT:
        (kit / left).unlink(missing_ok=True)


def running(kit: Path) -> bool:
    """Return whether a kit's participant runs."""
    return bool(_processes(kit))


def _processes(kit: Path) -> list[psutil.Process]:
    """Return FLARE's processes of a kit, told by their command lines."""
    processes, kit = [], kit.resolve()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = process.cmdline()
            is_flare = any(
                part.startswith("nvflare.") or part.endswith("/startup/sub_start.sh")
                for part in line
            )
            if is_flare and any(Path(part) == kit or kit in Path(part).parents for part in line):
                processes.append(process)
    return processes


def _end(process: psutil.Process, how: signal.Signals) -> None:
    with suppress(psutil.Error):
        process.send_signal(how)
