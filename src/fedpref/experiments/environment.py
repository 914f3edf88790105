"""What a run ran on: versions, machine, commits of the code."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

PACKAGES = ("fedpref", "torch", "transformers", "peft", "datasets", "numpy", "nvflare")


def described(model: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the environment as JSON.

    Args:
        model: Where the run's model came from, with its digest, if it goes by a name.

    Returns:
        It has `started`, `python`, `platform`, `processors`, `versions` of packages, `commits` of
        fedpref and of the working folder, where these are checkouts, and `model`.
    """
    folders = {"working folder": Path.cwd()}
    # not where it is installed into somebody's checkout
    if _git("ls-files", "--error-unmatch", __file__, folder=Path(__file__).parent):
        folders["fedpref"] = Path(__file__).parent
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    content = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "versions": versions,
        **({"model": dict(model)} if model else {}),
        "commits": {
            name: commit
            for name, folder in folders.items()
            if (commit := _git("describe", "--always", "--abbrev=12", "--dirty=+", folder=folder))
        },
    }
    return json.dumps(content, indent=1) + "\n"


def _git(*words: str, folder: Path) -> str:
    """Return what git prints in a folder; nothing where there is no git or no checkout."""
    try:
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
