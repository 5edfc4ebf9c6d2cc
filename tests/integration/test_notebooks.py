"""Every notebook runs on a lake as it is, and is kept without what it printed."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from memmc.pipeline.score import score

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
assert NOTEBOOKS


@pytest.fixture(scope="module")
def scored(workspace):
    """The workspace, its instances scored."""
    before = Path.cwd()
    os.chdir(workspace.root)
    try:
        score(workspace.config, "cxr")
    finally:
        os.chdir(before)
    return workspace


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_changes_nothing(scored, file, monkeypatch):
    for name, value in {"WORK": scored.root, "LAKE": "lake", "COHORT": "cxr", "STEPS": 30}.items():
        monkeypatch.setenv(f"MEMMC_{name}", str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = versions(scored.root / "lake")
    notebook = nbformat.read(file, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert versions(scored.root / "lake") == before


def versions(lake: Path) -> list[str]:
    return sorted(str(path) for path in lake.rglob("*") if path.is_file() and "_leases" not in path.parts)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_kept_without_outputs(file):
    for cell in nbformat.read(file, 4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
