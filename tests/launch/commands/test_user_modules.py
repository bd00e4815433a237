"""A user's own modules are found by name, whatever they are called, in every process of a run."""

import shlex
from pathlib import Path

import pytest

from tests.launching import ROOT, launch

NAMES = ("models", "data", "config", "settings", "tasks", "training", "comm", "report", "train", "app", "evaluate")
CHECK = f"""
import importlib, os
from pathlib import Path

HERE = Path(__file__).resolve().parent

def check():
    for name in {NAMES}:
        found = Path(importlib.import_module(name).__file__).resolve()
        assert found.parent == HERE, f"{{name}} is {{found}}"
"""
MODELS = """
from checking import check
from torch import nn

check()

class Net(nn.Sequential):
    def __init__(self, num_channels, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(12, num_classes))
"""
DATA = """
import os
from pathlib import Path
from checking import check

check()

class Images:
    classes = ("dark", "light")

    def __init__(self, root, train):
        pass

    def __len__(self):
        return 24

    def __getitem__(self, index):
        import torch.utils.data

        if torch.utils.data.get_worker_info() is not None:
            check()
            forkserver = Path(f"/proc/{os.getppid()}/maps").read_text()
            assert "torchvision" in forkserver, "the forkserver has not loaded what it was told to"
            Path("checked-in-a-worker").touch()
        from PIL import Image

        return Image.new("RGB", (2, 2), 250 * (index % 2)), index % 2
"""
SETTINGS = "--model.name models.Net --data.name data.Images --data.num_workers 1 --data.batch_size 8 --num_epochs 1"
TRAIN = shlex.quote(str(ROOT / "app" / "train.py"))


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(f"mpirun -np 2 python {TRAIN}", id="mpirun"),
        pytest.param("lockstep train", id="lockstep", marks=pytest.mark.thorough),
        pytest.param("python -m lockstep train", id="-m", marks=pytest.mark.thorough),
    ],
)
def test_whatever_a_users_modules_are_called_they_are_found(program: str, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"NAME = '{name}'\n")
    (tmp_path / "checking.py").write_text(CHECK)
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "data.py").write_text(DATA)
    finished = launch(f"{program} {SETTINGS} --run_dir run", cwd=tmp_path)
    assert finished.returncode == 0, finished.output
    assert (tmp_path / "checked-in-a-worker").exists()


@pytest.mark.thorough
def test_an_installed_package_comes_first_and_the_message_says_so(tmp_path: Path) -> None:
    """Else a file called yaml.py, or queue.py, in the working folder would break whatever imports the real one."""
    (tmp_path / "yaml.py").write_text("class Net: pass\n")
    finished = launch(f"python {TRAIN} --model.name yaml.Net --run_dir run", cwd=tmp_path)
    assert finished.returncode == 2, finished.output
    assert "What is installed comes before the working folder, which has yaml.py too" in finished.stderr


@pytest.mark.thorough
def test_an_old_program_says_once_what_to_type(tmp_path: Path) -> None:
    old = shlex.quote(str(ROOT / "app" / "evaluate.py"))
    finished = launch(f"mpirun -np 2 python {old} nowhere", cwd=tmp_path)
    assert finished.returncode == 5, finished.output
    assert finished.stderr.count("python app/evaluate.py is now `lockstep evaluate`") == 1


def test_the_commands_are_told(tmp_path: Path) -> None:
    shown = launch("lockstep --help", cwd=tmp_path)
    assert shown.returncode == 0, shown.output
    assert "postmortem" in shown.stdout
    wrong = launch("lockstep trian", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "there is no command 'trian'" in wrong.stderr
