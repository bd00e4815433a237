"""The wheel: `pip install .` gives `import lockstep` and the command, and all that the package needs lies within it."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.launching import ROOT, launch


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with Lockstep's wheel, which borrows the packages, but not the clone, of this one."""
    folder = tmp_path_factory.mktemp("installed")
    wheels, env = folder / "wheels", folder / "env"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, _copy(folder)], check=True)
    venv.create(env, with_pip=False)
    subprocess.run(
        [*pip, "--python", env / "bin" / "python", "install", "--no-deps", *wheels.glob("*.whl")], check=True
    )
    (site_packages,) = (env / "lib").glob("python*/site-packages")
    (site_packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # whose own .pth do not count
    return env


def _copy(folder: Path) -> Path:
    """The clone's own files: building leaves folders behind."""
    copy = folder / "clone"
    files = subprocess.run(["git", "ls-files", "app", "pyproject.toml", "README.md"], cwd=ROOT, capture_output=True)
    for name in files.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


def test_importing_it_starts_neither_horovod_nor_mpi(installed: Path, tmp_path: Path) -> None:
    heavy = "[name for name in ('torch', 'horovod', 'mpi4py') if name in sys.modules]"
    program = f"import lockstep, sys; print(lockstep.__file__, {heavy})"
    shown = launch([str(installed / "bin" / "python"), "-c", program], cwd=tmp_path)
    assert shown.returncode == 0, shown.output
    file, _, loaded = shown.stdout.strip().partition(" ")
    assert Path(file).is_relative_to(installed)
    assert loaded == "[]"


@pytest.mark.thorough
def test_the_command_trains_and_reports(installed: Path, tmp_path: Path) -> None:
    lockstep = str(installed / "bin" / "lockstep")
    quick = "--data.name synthetic --data.num_samples 64 --data.batch_size 16 --num_epochs 1 --config reference"
    trained = launch([lockstep, "train", *quick.split(), "--run_dir", "run"], cwd=tmp_path)
    assert trained.returncode == 0, trained.output
    for command in (["report", "run"], ["benchmark", "--help"]):
        done = launch([lockstep, *command], cwd=tmp_path)
        assert done.returncode == 0, done.output


@pytest.mark.thorough
def test_the_peers_are_within_it(installed: Path, tmp_path: Path) -> None:
    python = str(installed / "bin" / "python")
    peer = ["lockstep.benchmark.peers.data_parallel", "plain"]
    done = launch([python, "-m", *peer, "--updates", "2", "--warmup", "1"], cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert "images_per_second" in done.stdout
