"""The notebooks run from top to bottom, and so does the search in the documents. Slow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda file: file.stem
)
def test_a_notebook_runs(file: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)
    assert list((tmp_path / "runs/notebook").iterdir())


@pytest.mark.slow
def test_the_documents_search_runs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna", reason="Optuna is nothing that fedpref needs")
    text = (ROOT / "docs/sweeps.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**settings, "rounds": 1}))
    monkeypatch.chdir(tmp_path)
    small = code.replace('"demo-offline"', '"small.yaml"').replace("n_trials=20", "n_trials=2")
    found: dict[str, Any] = {}
    exec(small, found)
    assert found["study"].best_params.keys() == {"learning_rate", "steps"}
    assert {path.name for path in (tmp_path / "runs/search").iterdir()} == {"0", "1"}
