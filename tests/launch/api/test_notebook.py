"""docs/notebook.ipynb runs from its first cell to its last, in Jupyter's own kernel.

Jupyter is not in the environment: its kernel needs a package called `comm`, which would hide a user's module of that
name.
"""

import json
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, launch

JUPYTER = ("nbclient==0.11.0", "ipykernel==7.4.0")
EXECUTE = """
import sys
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
kernel = AsyncKernelManager(transport="ipc")  # files of this user's, not ports that everybody can reach
NotebookClient(notebook, km=kernel, timeout=600).execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.thorough
def test_the_notebook_runs_and_shows_its_pictures(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "jupyter"), *JUPYTER]
    installed = launch(pip, timeout_seconds=300)
    assert installed.returncode == 0, installed.output
    (tmp_path / "execute.py").write_text(EXECUTE)
    page = ROOT / "docs" / "notebook.ipynb"
    environment = {"PYTHONPATH": str(tmp_path / "jupyter"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "kernels")}
    finished = launch(
        [sys.executable, "execute.py", str(page), "executed.ipynb"],
        timeout_seconds=600,
        cwd=tmp_path,
        environment=environment,
    )
    assert finished.returncode == 0, finished.output
    cells = json.loads((tmp_path / "executed.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "Accuracy: 0.9" in "".join("".join(output.get("text", "")) for output in outputs)
