"""env/ works on every Python 3.11 or newer that this machine has; Debian 12's own 3.11.2 above all."""

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SYSTEM = Path("/usr/bin/python3")
PYTEST = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")  # and what it needs: Python alone, of any version
OLDEST = (3, 11)


def _version(python: Path) -> tuple[int, ...]:
    code = "import sys; print('%d %d %d' % sys.version_info[:3])"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(map(int, done.stdout.split()))


def _pythons() -> dict[tuple[int, ...], Path]:
    """By version: those on PATH, the system's, and pyenv's."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders += [Path("/usr/bin"), Path("/usr/local/bin"), *sorted(pyenv.glob("versions/*/bin"))]
    names = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("python3*"))]
    found = {_version(path): path for path in names if re.fullmatch(r"python3(\.\d+)?", path.name)}
    return {version: path for version, path in sorted(found.items()) if version >= OLDEST}


@pytest.mark.parametrize(
    "python", [pytest.param(path, id=".".join(map(str, version))) for version, path in _pythons().items()]
)
def test_env_compiles_and_can_be_imported(python: Path) -> None:
    """All of it but what runs in the finished environment."""
    code = (
        "import glob, importlib, warnings; warnings.simplefilter('error')\n"
        "for file in glob.glob('env/*.py'):\n"
        "    compile(open(file).read(), file, 'exec')\n"
        "    importlib.import_module(file[:-3].replace('/', '.'))\n"
    )
    done = subprocess.run([python, "-B", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
@pytest.mark.skipif(_version(SYSTEM) < OLDEST, reason=f"{SYSTEM} is missing, or older than 3.11")
def test_the_tests_of_env_pass_on_the_systems_own_python(tmp_path: Path) -> None:
    for name in PYTEST:
        distribution = importlib.metadata.distribution(name)
        for top in {Path(file.parts[0]) for file in distribution.files or () if file.parts[0] != ".."}:
            if top.name != "__pycache__" and not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(str(distribution.locate_file(str(top))))
    tests = [
        str(path) for path in sorted((ROOT / "tests" / "unit" / "env").glob("test_*.py")) if path != Path(__file__)
    ]
    assert len(tests) == 4
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [SYSTEM, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, env=variables | {"HOME": str(Path.home())}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d{2,} passed", done.stdout.splitlines()[-1]), done.stdout
