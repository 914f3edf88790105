"""Create .venv and install fedpref into it, with the standard library alone; a second call with
nothing changed returns at once. The versions are those of constraints.txt, or of the file that is
given: `python scripts/bootstrap.py lowest.txt`.

PyTorch comes first, because pip's own choice is gigabytes of CUDA where no GPU is: a wheel already
at hand, else PyTorch's CPU index where there is no NVIDIA driver, else whatever pip takes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "fedpref-stamp"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def fingerprint(constraints: str) -> str:
    digest = hashlib.sha256(f"{sys.version} {ROOT}".encode())
    for name in ("pyproject.toml", constraints, "scripts/bootstrap.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def pip(*arguments: str, quiet: bool = False) -> bool:
    command = [
        str(PYTHON),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        *arguments,
    ]
    return subprocess.run(command, stderr=subprocess.DEVNULL if quiet else None).returncode == 0


def install_torch(constraints: str) -> None:
    pin = next(
        line for line in (ROOT / constraints).read_text().splitlines() if line.startswith("torch==")
    )
    if pip("--no-index", "--no-deps", pin, quiet=True):
        return
    if not shutil.which("nvidia-smi") and pip("--index-url", CPU_INDEX, pin, quiet=True):
        return
    if not pip(pin):
        sys.exit(f"setup: pip could not install {pin}; its message stands above.")


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(
            f"setup: fedpref needs Python 3.11 or newer, this is {sys.version.split()[0]}. Try "
            "`make setup PYTHON=python3.12`."
        )
    constraints = sys.argv[1] if len(sys.argv) > 1 else "constraints.txt"
    wanted = fingerprint(constraints)
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print("setup: creating .venv and installing fedpref (some minutes; once) ...", flush=True)
    venv.create(VENV, with_pip=True, clear=True)
    install_torch(constraints)
    if not pip("-c", str(ROOT / constraints), "-e", f"{ROOT}[dev]"):
        sys.exit("setup: pip could not install fedpref; its message stands above.")
    STAMP.write_text(wanted)
    print("setup: done. `. .venv/bin/activate` puts the command fedpref on your path.", flush=True)


if __name__ == "__main__":
    main()
