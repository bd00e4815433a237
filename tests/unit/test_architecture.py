"""Rules of the architecture, checked in the source."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.runtime.errors import ExitCode
from tests.launching import ROOT

PACKAGE = ROOT / "app" / "lockstep"
KNOWN_BY = {  # rooms or files
    "horovod": (
        "comm/backend.py",
        "comm/cluster.py",
        "comm/collectives.py",
        "comm/elastic.py",
        "comm/horovod_library.py",
        "benchmark/horovod_optimizer.py",
        "benchmark/peers/data_parallel.py",
    ),
    "mpi4py": ("comm/mpi_library.py",),
}
FLOORS = (  # from the ground up
    {"runtime"},
    {"settings"},
    {"comm"},
    {"data", "models"},
    {"parallel"},
    {"tasks"},
    {"training"},
    {"doctor", "drill", "benchmark", "report"},
    {"commands"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _imports(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("source", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down_only_and_few_files_know_horovod_and_one_mpi(source: Path) -> None:
    inside = source.relative_to(PACKAGE)
    room = inside.parts[0] if len(inside.parts) > 1 else None
    for name in _imports(source):
        if (library := name.split(".")[0]) in KNOWN_BY:
            assert str(inside) in KNOWN_BY[library], f"{inside} imports {name}"
        if name.startswith("lockstep.") and room and (other := name.split(".")[1]) != room:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{inside} imports {name}"


def test_every_room_has_its_floor() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FLOOR_OF)


def test_nothing_under_app_hides_a_module_of_the_standard_library() -> None:
    """`python app/train.py` puts app/ first on the path of modules."""
    assert not {path.stem for path in (ROOT / "app").iterdir()} & set(sys.stdlib_module_names)


def test_the_docs_have_every_exit_code() -> None:
    table = (ROOT / "docs" / "exit-codes.md").read_text()
    documented = {int(code): name for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", table, flags=re.MULTILINE)}
    assert documented == {code.value: code.name for code in ExitCode}
