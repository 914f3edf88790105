"""What a run ran on: versions, machine, the commit of the code around it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("fedpref", "torch", "transformers", "peft", "datasets", "numpy", "nvflare")


def described() -> str:
    """As JSON: `started`, `python`, `platform`, `processors`, `versions` of packages, and `commit` where the working folder has one."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    content = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processors": os.cpu_count(),
        "versions": versions,
        "commit": _commit(),
    }
    return json.dumps(content, indent=1) + "\n"


def _commit() -> str | None:
    """The working folder's commit, with a + where files differ from it."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--abbrev=12", "--dirty=+"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
