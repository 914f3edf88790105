"""The documents: their code runs, their commands parse, their links and names lead somewhere."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from conftest import ROOT
from fedpref import Experiment, cli, config
from fedpref.algorithms import AnyAlgorithm
from fedpref.reports.settings import OPEN

DOCS = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
COMMANDS: Any = typer.main.get_command(cli.app)


def blocks(file: Path, *languages: str) -> list[str]:
    return [
        text
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```", file.read_text(), re.M | re.S)
        if language in languages and not re.match(r"# \w+\.\w+\n", text)  # a file, run elsewhere
    ]


def every_command(group: Any = COMMANDS, name: str = "fedpref") -> list[tuple[str, Any]]:
    found = []
    for part, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found += [
            (f"{name} {part}", command),
            *(every_command(command, f"{name} {part}") if inner else ()),
        ]
    return found


ELSEWHERE = ("README.md", "sweeps.md")  # the search of the latter: tests/test_examples.py
PROGRAMS = [file for file in DOCS if blocks(file, "python") and file.name not in ELSEWHERE]
TRAINS = ("index.md", "exporting.md", "troubleshooting.md")


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=pytest.mark.slow if file.name in TRAINS else (), id=file.name)
        for file in PROGRAMS
    ],
)
def test_python_in_documents_runs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"document_{file.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for text in blocks(file, "python"):
        exec(compile(text, f"{file.name}", "exec"), module.__dict__)


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_commands_in_documents_are_ours(file: Path) -> None:
    for line in "".join(blocks(file, "bash", "")).splitlines():
        if not line.startswith("fedpref "):
            continue
        words = shlex.split(line.replace("...", ""), comments=True)
        command, rest = COMMANDS, words[1:]
        while getattr(command, "commands", None):
            assert rest[0] in command.commands, line
            command, rest = command.commands[rest[0]], rest[1:]
        asks = any(getattr(parameter, "prompt", None) for parameter in command.params)
        command.make_context(words[1], rest, resilient_parsing=asks or "..." in line)


def test_gains_in_the_table_of_claims_are_those_of_the_figures() -> None:
    figures = json.loads((ROOT / "docs/results/figures.json").read_text())
    claims = (ROOT / "docs/results.md").read_text()
    found = 0
    for name, value in figures.items():
        is_gain = name.startswith(("policy_gain", "control_gain"))
        if is_gain and not name.endswith(("_low", "_high")):
            said = f"{value:+.1f} [{figures[f'{name}_low']:+.1f}, {figures[f'{name}_high']:+.1f}]"
            assert said in claims, name
            found += 1
    assert found > 5


def test_settings_in_documents_are_ours() -> None:
    found = [(file.name, text) for file in DOCS for text in blocks(file, "yaml")]
    assert len(found) > 3
    for name, text in found:
        config.parse(Experiment, yaml.safe_load(text), name)


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_links_in_documents_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
        assert (file.parent / target).exists(), f"{file.name}: {target}"


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_document_has_a_place_left_to_fill(file: Path) -> None:
    assert re.findall(r": [A-Z]{5,}\s*$|TODO|TBD|FIXME", file.read_text(), re.M) == []


def test_every_document_is_in_the_table_of_contents() -> None:
    content = yaml.safe_load(re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text()))
    named = re.findall(r"'([\w/-]+\.md)'", str(content["nav"]))
    assert sorted(named) == sorted(
        file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")
    )


def test_functions_that_documents_name_are_there() -> None:
    groups = {choice.group for choice in OPEN.values()}  # of entry points
    names = {
        name for file in DOCS for name in re.findall(r"`(fedpref(?:\.\w+)+)`", file.read_text())
    } - groups
    assert len(names) > 30
    for name in names:
        assert pkgutil.resolve_name(name), name


def test_every_algorithm_is_described() -> None:
    text = "".join(file.read_text() for file in (ROOT / "docs/algorithms").glob("*.md"))
    names = [kind.name for kind in config.kinds(AnyAlgorithm)]
    assert len(names) > 15
    assert [name for name in names if f"`{name}`" not in text and f"## {name}" not in text] == []


@pytest.mark.parametrize(
    ("name", "command"), every_command(), ids=lambda part: part if isinstance(part, str) else ""
)
def test_every_command_has_an_example(name: str, command: Any) -> None:
    assert f"Example: {name}" in command.help, name


def test_no_line_of_code_is_cut() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    (style,) = re.findall(r"^extra_css: \[(.+)\]$", settings, re.M)
    assert re.search(r"pre > code \{\s*white-space: pre-wrap;", (ROOT / "docs" / style).read_text())
