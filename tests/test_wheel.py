"""The wheel: what somebody has who typed `pip install`, without a checkout."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from conftest import ROOT
from test_extending import BLOCKS


def called(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    if "run" in command:
        assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(
        ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    # with the setuptools that is here: an environment of its own would be fetched
    called(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, tree),
        cwd=place,
    )
    (made,) = place.glob("*.whl")
    return made


@pytest.mark.long
def test_the_wheel_is_whole(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    called(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
        *("--target", installed, wheel),
        cwd=empty,
    )

    def fedpref(*arguments: str) -> str:
        return called(
            sys.executable, "-m", "fedpref", *arguments, cwd=empty, PYTHONPATH=str(installed)
        )

    where = called(
        *(sys.executable, "-c", "import fedpref; print(fedpref.__file__)"),
        cwd=empty,
        PYTHONPATH=str(installed),
    )
    assert Path(where.strip()).is_relative_to(installed)
    named = re.findall(r"^([a-z0-9-]+): ", fedpref("list", "configs"), re.M)
    assert sorted(named) == sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))
    whole = ["partition.max_clients=2", "partition.max_rows=20", "baselines=[]"]
    # nothing but what fedpref itself says
    fedpref("run", "feddpo", *whole, "rounds=1", "algorithm.local.steps=1", "--output", "out")
    assert "Plotly" in (empty / "out/report.html").read_text()


@pytest.mark.slow
def test_from_an_installed_wheel_to_a_finished_demo(tmp_path: Path) -> None:
    release, empty = tmp_path / "release", tmp_path / "empty"
    empty.mkdir()
    script = ROOT / "scripts/release.py"
    called(sys.executable, script, "--url", "https://example.org/x", "--output", release, cwd=empty)
    (wheel,) = release.glob("*.whl")
    assert len(list(release.glob("*.tar.gz"))) == 1
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    called(
        *(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel),
        cwd=empty,
    )
    extra = "scipy", "matplotlib", "moocore", "nvflare"
    code = f"from importlib.util import find_spec; print([m for m in {extra} if find_spec(m)])"
    assert called(python, "-c", code, cwd=empty).strip() == "[]"
    fedpref = tmp_path / "venv/bin/fedpref"
    assert "demo-offline" in called(fedpref, "list", "configs", cwd=empty)
    called(fedpref, "run", "feddpo", "--output", "by-name", "rounds=1", cwd=empty)
    table = ["ask,good,bad,who", *(f"What is {n}?,It is {n}.,No.,c{n % 2}" for n in range(60))]
    (empty / "rows.csv").write_text("\n".join(table) + "\n")
    named = ("--prompt", "ask", "--chosen", "good", "--rejected", "bad", "--client", "who")
    begin = ("init", "mine", "--data", "rows.csv", *named, "--model", "builtin")
    called(fedpref, *begin, cwd=empty)
    called(fedpref, "check", "mine/experiment.yaml", cwd=empty)
    # parts of one's own, as the document shows them
    own = tmp_path / "own"
    own.mkdir()
    for _, text in BLOCKS:
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            (own / name[1]).write_text(text)
    for line in "".join(text for language, text in BLOCKS if language == "bash").splitlines():
        called(fedpref, *shlex.split(line)[1:], cwd=own)
    called(fedpref, "demo", "--offline", "--output", "out", cwd=empty)
    rows = (empty / "out/evaluation.jsonl").read_text().splitlines()
    assert len(json.loads(rows[-1])["clients"]) == 12
    refused = subprocess.run(
        [tmp_path / "venv/bin/fedpref", "check", "firm"], cwd=empty, capture_output=True, text=True
    )
    assert (refused.returncode, "fedpref[firm]" in refused.stderr) == (2, True)
