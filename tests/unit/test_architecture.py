"""The rules of the house, read from the source."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.runtime.errors import ExitCode
from tests.launching import ROOT

APP = ROOT / "app"
KNOWN_BY = {
    "horovod": {f"cluster/{name}.py" for name in ("comm", "collectives", "elastic", "gloo", "horovod_library")},
    "mpi4py": {"cluster/mpi_library.py"},
}
SOURCES = sorted(path for folder in ("app", "env", "tests") for path in (ROOT / folder).rglob("*.py"))
LAYERS = (
    ("cluster", "data", "models", "config", "settings", "imports", "trust"),
    ("parallel", "tasks", "training"),
    ("programs",),
)


def _imports(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _layer(room: str) -> int:
    return next((index for index, rooms in enumerate(LAYERS) if room in rooms), len(LAYERS) - 1)


@pytest.mark.parametrize("source", sorted(APP.rglob("*.py")), ids=lambda path: str(path.relative_to(APP)))
def test_imports_run_one_way_and_few_files_know_horovod_and_one_mpi(source: Path) -> None:
    inside = source.relative_to(APP)
    room = inside.parts[0].removesuffix(".py")
    for name in _imports(source):
        if (library := name.split(".")[0]) in KNOWN_BY:
            assert str(inside) in KNOWN_BY[library], f"{inside} imports {name}"
        if name.startswith("app.") and room != "__init__":
            assert _layer(name.split(".")[1]) <= _layer(room), f"{inside} imports {name}"


def test_nothing_under_app_hides_a_module_of_the_standard_library() -> None:
    """`python app/train.py` puts app/ first on the path of modules."""
    assert not {path.stem for path in APP.iterdir()} & set(sys.stdlib_module_names)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(source: Path) -> None:
    assert len(source.read_text().splitlines()) <= 300


def test_the_docs_have_every_exit_code() -> None:
    table = (ROOT / "docs" / "exit-codes.md").read_text()
    documented = {int(code): name for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", table, flags=re.MULTILINE)}
    assert documented == {code.value: code.name for code in ExitCode}
