"""What a run ran on: versions, machine, commits of the code."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("fedpref", "torch", "transformers", "peft", "datasets", "numpy", "nvflare")


def described() -> str:
    """As JSON: `started`, `python`, `platform`, `processors`, `versions` of packages, and `commits` of fedpref and of the working folder,
    where these are checkouts.
    """
    places = {"fedpref": Path(__file__).parent, "working folder": Path.cwd()}
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
        "commits": {name: commit for name, place in places.items() if (commit := _commit(place))},
    }
    return json.dumps(content, indent=1) + "\n"


def _commit(place: Path) -> str | None:
    """A folder's commit, with a + where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
