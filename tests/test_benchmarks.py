"""Benchmarks: each has its quick form, and says what it writes."""

from __future__ import annotations

import re
import runpy
import sys

import pytest

from conftest import ROOT

FOLDER = ROOT / "benchmarks"
# modules of others, or programs that others start
SHARED = {"ending", "engine_rounds", "flower_rounds", "flower_simulation", "log_linear"}
SHARED |= {f"distributed_{name}" for name in ("figures", "laws", "models")}
SHARED |= {"paper_program", "plural_program"}
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in SHARED)


@pytest.mark.long
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_has_a_quick_form_and_writes_its_figures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert not ended.value.code
    said = capsys.readouterr().out
    assert {"--quick", "--json"} <= set(re.findall(r"--\w+", said))


def test_every_script_is_a_benchmark_or_a_part_of_one() -> None:
    for name in SHARED:
        assert not re.search(r"add_argument\(\s*\"--quick", (FOLDER / f"{name}.py").read_text())
    assert all((FOLDER / f"{name}.py").exists() for name in SHARED)
