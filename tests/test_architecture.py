"""The arrows of the house: which room may import which."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

import fedpref
from conftest import ROOT

PACKAGE = Path(fedpref.__file__).parent
sys.path.insert(0, str(ROOT / "scripts"))
from layers import LAYERS  # noqa: E402  # the one list of layers, which documents are made from too

# the three at the root are below all layers
ORDER = [
    "errors",
    "types",
    "config",
    *LAYERS,
    "__main__",
]
MATHEMATICS = {"losses", "numerics", "channel"}
ALLOWED_IN_MATHEMATICS = {
    "__future__",
    "abc",
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "hashlib",
    "io",
    "jaxtyping",
    "math",
    "os",
    "pathlib",
    "statistics",
}
# pydantic: bounds of hyper-parameters
ALLOWED_IN_MATHEMATICS |= {
    "networkx",
    "numpy",
    "pydantic",
    "safetensors",
    "scipy",
    "torch",
    "typing",
}


def imports(path: Path) -> set[str]:
    """Modules a file imports, as dotted names; those under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= (
                {f"fedpref.{alias.name}" for alias in node.names}
                if node.module == "fedpref"
                else {str(node.module)}
            )
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_arrows_point_to_layers_above_in_the_list(path: Path) -> None:
    own = room(path)
    assert own in ORDER, f"{own} is no layer: see scripts/layers.py"
    for module in imports(path):
        if (
            module.startswith("fedpref.")
            and (other := module.split(".")[1]) in ORDER
            and other != own
        ):
            assert ORDER.index(other) < ORDER.index(own), f"{path.name} imports {module}"


def test_layers_are_folders() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(
        LAYERS
    )
    root = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert root == {"__init__.py", "__main__.py", "py.typed", "errors.py", "config.py", "types.py"}


def test_algorithms_import_neither_engines_nor_the_channel() -> None:
    for path in (PACKAGE / "algorithms").glob("*.py"):
        assert not {
            m for m in imports(path) if m.startswith(("fedpref.engines", "fedpref.channel"))
        }, path.name


def test_engines_name_no_algorithm_and_no_task() -> None:
    for path in (PACKAGE / "engines").glob("*.py"):
        used = {m for m in imports(path) if m.startswith(("fedpref.algorithms", "fedpref.tasks"))}
        assert used <= {"fedpref.tasks.task"}, path.name


def test_the_mathematics_imports_no_model_no_config_and_no_logger() -> None:
    for path in FILES:
        if room(path) in MATHEMATICS:
            outside = {m.split(".")[0] for m in imports(path) if not m.startswith("fedpref")}
            assert outside <= ALLOWED_IN_MATHEMATICS, path.name


@pytest.mark.parametrize("layer", ["losses", "numerics", "federation", "algorithms"])
def test_values_of_methods_cannot_be_changed(layer: str) -> None:
    for path in (PACKAGE / layer).glob("*.py"):
        module = importlib.import_module(f"fedpref.{layer}.{path.stem}")
        for value in vars(module).values():
            if dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
                assert value.__dataclass_params__.frozen, value  # type: ignore[attr-defined]


def test_the_command_line_starts_without_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, fedpref.cli; assert not {'torch', 'transformers', 'pydantic'} & "
        "sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_what_algorithms_and_tasks_are_like_is_declared(path: Path) -> None:
    """A flag that is read by `getattr` with a default is gone without a word once it is renamed."""
    asked = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3))
        and ast.unparse(node.args[0]).split(".")[-1] in ("algorithm", "task", "source")
    ]
    assert not asked
