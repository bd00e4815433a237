"""The public API and its page."""

import inspect
import re
import subprocess
import sys

import pytest

import lockstep
from tests.launching import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()


def test_the_page_lists_every_public_name_and_no_other() -> None:
    listed = re.findall(r"^\| \[`(\w+)`\]", PAGE, flags=re.MULTILINE)
    assert sorted(listed) == sorted(lockstep.__all__)


def test_every_public_name_is_there_with_a_docstring() -> None:
    for name in lockstep.__all__:
        assert inspect.getdoc(getattr(lockstep, name)), name


@pytest.mark.parametrize("name", ["train", "evaluate", "load_model", "read_settings"])
def test_the_page_has_the_parameters_of_every_function(name: str) -> None:
    (told,) = re.findall(rf"`lockstep\.{name}\((.*?)\)(?: ->|`)", PAGE)
    parameters = inspect.signature(getattr(lockstep, name)).parameters.values()
    assert re.findall(r"(\w+):", told) == [parameter.name for parameter in parameters]
    assert re.findall(r"= ([^,]+)", told) == [str(p.default) for p in parameters if p.default is not p.empty]


def test_a_name_that_is_not_public_is_refused_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        lockstep.nonsense  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_mpi() -> None:
    code = "import sys, lockstep; print({'torch', 'mpi4py', 'horovod', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
