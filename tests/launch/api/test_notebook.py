"""docs/notebook.ipynb runs from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.launching import ROOT


@pytest.mark.thorough
def test_the_notebook_runs_and_shows_its_pictures(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    kernel = AsyncKernelManager(transport="ipc")  # files of this user's, not ports that everybody can reach
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, km=kernel, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "Accuracy: 0.9" in "".join(output.get("text", "") for output in outputs)
