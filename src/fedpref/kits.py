"""A federation of real hosts: certificates, and a folder for each participant to start from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fedpref.errors import UserError

SITE_FILE, LOG = "site.yaml", "fedpref.log"
CLASSES = [
    "fedpref.flare.Coordinator",
    "fedpref.flare.Sited",
    "nvflare.collab.runtime.controller.CollabController",
    "nvflare.collab.runtime.executor.CollabExecutor",
]
PROMPT = {"NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "15"}  # seconds that a server waits at a job's end for sites that have died
TEMPLATE = """# What this site brings to experiments, and what it consents to. This file stays here.
# All keys: docs/sites.md.
data: {name: files, path: preferences.jsonl} # rows with prompt, chosen, rejected; seen from this file
client: %s # the name that others see; with `partition`, the names are those of its clients
algorithms: [feddpo, fedpdpo, decdpo]
max_rounds: 1000
"""


def provision(folder: Path, name: str, server: str, port: int, sites: Sequence[str], admin: str) -> dict[str, Path]:
    """Make certificates and a kit for each participant, by FLARE's provisioning; returns where the kits are.

    No kit lets a job bring code of its own: what runs is what is installed. Keep `state`, it has the root's key. Raises UserError where
    the folder is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already. Give another folder: certificates are not made twice.")
    if len(set(sites)) < len(sites) or {server, admin} & set(sites):
        raise UserError("two participants have the same name. Give each a name of its own.")
    participants: list[dict[str, Any]] = [{"name": server, "type": "server", "org": "coordinator", "fed_learn_port": port}]
    participants += [{"name": site, "type": "client", "org": _org(site)} for site in sites]
    participants += [{"name": admin, "type": "admin", "org": "coordinator", "role": "lead"}]
    builders = [
        {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder", "args": {"template_file": ["master_template.yml"]}},
        {"path": "nvflare.lighter.impl.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
        {"path": "nvflare.lighter.impl.cert.CertBuilder"},
        {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
    ]
    project = {"api_version": 3, "name": name, "description": name, "participants": participants, "builders": builders}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        (Path(scratch) / "project.yml").write_text(yaml.safe_dump(project, sort_keys=False))
        command = [sys.executable, "-m", "nvflare.cli", "provision", "-p", "project.yml", "-w", "made"]
        made = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        kits = Path(scratch) / "made" / name / "prod_00"
        if made.returncode or not kits.is_dir():
            raise UserError(f"provisioning failed: {(made.stdout + made.stderr).strip()[-600:]}")
        for kit in kits.iterdir():
            _restrict(kit / "local")
        for site in sites:
            (kits / site / SITE_FILE).write_text(TEMPLATE % site)
        shutil.move(Path(scratch) / "made" / name / "state", kits / "state")
        shutil.move(Path(scratch) / "project.yml", kits / "project.yml")
        kits.replace(folder)
    return {participant["name"]: folder / participant["name"] for participant in participants}


def _org(site: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in site)


def _restrict(local: Path) -> None:
    """Let a participant run this package's classes, and no code that comes with a job."""
    resources = local / "resources.json.default"
    if resources.exists():
        content = json.loads(resources.read_text())
        content["class_allow_list"] = [*content.get("class_allow_list", []), *CLASSES]
        (local / "resources.json").write_text(json.dumps(content, indent=1))
    rights = local / "authorization.json.default"
    if rights.exists():
        content = json.loads(rights.read_text())
        for role in content["permissions"].values():
            if isinstance(role, dict):
                role["byoc"] = "none"
        (local / "authorization.json").write_text(json.dumps(content, indent=1))


# ---- a kit at work


def start(kit: Path, variables: Mapping[str, str]) -> None:
    """Start what a kit is for, with these environment variables; it goes on when the caller ends, and starts anew where it dies."""
    program = kit / "startup/sub_start.sh"
    if not program.exists():
        raise UserError(f"{kit}: this is no kit of a server or site (no startup/sub_start.sh).")
    if running(kit):
        raise UserError(f"{kit}: it is running already. `fedpref site stop {kit}` stops it.")
    for left in ("shutdown.fl", "pid.fl", "daemon_pid.fl"):
        (kit / left).unlink(missing_ok=True)
    _keep_apart(kit)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with (kit / LOG).open("a") as log:
        subprocess.Popen(
            ["bash", str(program)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **PROMPT, **variables},
            cwd=kit,
            start_new_session=True,
        )


def _keep_apart(kit: Path) -> None:
    """Let a server keep its jobs in its kit; by default all servers of a machine share one place, and take one another's."""
    resources = kit / "local/resources.json"
    content = json.loads(resources.read_text())
    for component in content.get("components", ()):
        if component.get("id") == "job_manager":
            component["args"]["uri_root"] = str(kit / "jobs")
    if persistor := content.get("snapshot_persistor"):
        persistor["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
    resources.write_text(json.dumps(content, indent=1))


def stop(kit: Path, seconds: float = 20.0) -> None:
    """Stop it, with the jobs that it runs; nothing happens where it does not run."""
    (kit / "shutdown.fl").touch()
    daemon = _process(kit / "daemon_pid.fl")
    if child := _process(kit / "pid.fl"):
        _send(child, signal.SIGTERM)
    until = time.monotonic() + seconds
    while running(kit) and time.monotonic() < until:
        time.sleep(0.2)
    if daemon:
        with suppress(ProcessLookupError):
            os.killpg(daemon, signal.SIGKILL)  # it was started as the first of its session
    for left in ("shutdown.fl", "pid.fl", "daemon_pid.fl"):
        (kit / left).unlink(missing_ok=True)


def running(kit: Path) -> bool:
    """Whether its process lives."""
    process = _process(kit / "daemon_pid.fl")
    return process is not None and _lives(process)


def _process(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _send(process: int, what: signal.Signals) -> None:
    if _lives(process):
        os.kill(process, what)
