"""The arrows of the house: which room may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedpref

PACKAGE = Path(fedpref.__file__).parent
# Lower rooms know nothing of higher ones. A room may import its own files and rooms of a lower level.
LEVEL = {
    "errors": 0,
    "environment": 0,
    "trees": 0,
    "seeds": 0,
    "summary": 0,
    "losses": 1,
    "multiobjective": 1,
    "channel": 1,
    "topology": 1,
    "network": 2,
    "data": 1,
    "models": 1,
    "rewards": 1,
    "tasks": 2,
    "federation": 3,
    "objectives": 3,
    "local": 4,
    "personalisation": 5,
    "aggregation": 5,
    "diagnostics": 5,
    "algorithms": 6,
    "engines": 6,
    "config": 6,
    "participation": 7,
    "rundirectory": 7,
    "experiment": 8,
    "places": 9,
    "running": 10,
    "hosting": 10,
    "newcomers": 11,
    "__main__": 17,
    "cli": 16,
    "reports": 15,
    "scoring": 11,
    "pareto": 14,
    "sweep": 13,
    "launch": 12,
    "trackers": 11,
    "watching": 11,
    "exporting": 11,
    "judging": 11,
    "flare": 11,
}
MATHEMATICS = {"trees", "seeds", "summary", "losses", "multiobjective", "channel", "topology"}
ALLOWED_IN_MATHEMATICS = {"__future__", "collections", "dataclasses", "functools", "hashlib", "io", "jaxtyping", "math", "os", "pathlib"}
ALLOWED_IN_MATHEMATICS |= {
    "networkx",
    "numpy",
    "pydantic",
    "safetensors",
    "scipy",
    "torch",
    "typing",
}  # pydantic: bounds of hyper-parameters


def imports(path: Path) -> set[str]:
    """Modules a file imports, as dotted names; those under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"fedpref.{alias.name}" for alias in node.names} if node.module == "fedpref" else {str(node.module)}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_arrows_point_down(path: Path) -> None:
    own = room(path)
    assert own in LEVEL, f"{own} has no level: give it one here"
    for module in imports(path):
        if module.startswith("fedpref.") and (other := module.split(".")[1]) in LEVEL and other != own:
            assert LEVEL[other] < LEVEL[own], f"{path.name} imports {module}"


def test_algorithms_import_neither_engines_nor_the_channel() -> None:
    for path in (PACKAGE / "algorithms").glob("*.py"):
        assert not {m for m in imports(path) if m.startswith(("fedpref.engines", "fedpref.channel"))}, path.name


def test_engines_name_no_algorithm_and_no_task() -> None:
    for path in (PACKAGE / "engines").glob("*.py"):
        used = {m for m in imports(path) if m.startswith(("fedpref.algorithms", "fedpref.tasks"))}
        assert used <= {"fedpref.tasks.task"}, path.name


def test_the_mathematics_imports_no_model_no_config_and_no_logger() -> None:
    for path in FILES:
        if room(path) in MATHEMATICS:
            outside = {m.split(".")[0] for m in imports(path) if not m.startswith("fedpref")}
            assert outside <= ALLOWED_IN_MATHEMATICS, path.name


def test_the_command_line_starts_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fedpref.cli; assert not {'torch', 'transformers', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
