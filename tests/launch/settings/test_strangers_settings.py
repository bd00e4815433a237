"""Settings of another user that would run their script: the victim's commands refuse them."""

import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, Finished, launch

VICTIM, STRANGER = 54322, 65534
DATA, SETTINGS = 3, 2  # exit codes
SMALL = "--data.name synthetic --data.num_samples 64 --num_epochs 1 --loggers none"
PACKAGES = {"PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}"}
PROGRAMS = {name: f"{shlex.quote(str(ROOT / 'app' / name))}" for name in ("train.py", "evaluate.py", "export.py")}
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="acts as two other users: needs root and setpriv"
)


def _thorough(*values: str) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


@pytest.fixture
def place() -> Iterator[Path]:
    """Make a folder that both users can reach, with a folder of the victim in it."""
    with tempfile.TemporaryDirectory(prefix="strangers-") as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "victim" / "runs").mkdir(parents=True)
        for folder in (place / "victim", place / "victim" / "runs"):
            os.chown(folder, _victim()[0], -1)
        yield place


@pytest.fixture
def attack(place: Path) -> dict[str, Path]:
    """Write the other user's script, which creates a file, and settings that would run it as a data set."""
    script, mark, settings = place / "script", place / "victim" / "mark", place / "theirs" / "settings.yaml"
    settings.parent.mkdir()
    script.write_text(f"#!/bin/sh\nid -u > {mark}\n")
    script.chmod(0o755)
    settings.write_text(f"data: {{name: subprocess.call, root: {script}}}\n")
    (settings.parent / "model.safetensors").write_bytes(b"")  # what a finished run has
    for path in (script, settings.parent, *settings.parent.iterdir()):
        os.chown(path, STRANGER, STRANGER)
    return {"run": settings.parent, "settings": settings, "mark": mark}


@cache
def _victim() -> tuple[int, str]:
    """An ordinary user, and a Python of which they can read everything; root where this one is in root's own home."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        command = f"{_switch(VICTIM)} {python} -c 'import horovod.torch, app, rich'"
        if launch(command, cwd=Path("/"), environment=PACKAGES).returncode == 0:
            return VICTIM, python
    return 0, sys.executable


def _switch(user: int) -> str:
    return f"setpriv --reuid {user} --regid {user} --clear-groups"


def _as_victim(command: str, place: Path) -> Finished:
    user, python = _victim()
    folders = {"HOME": str(place / "victim"), "PYTHONDONTWRITEBYTECODE": "1", **PACKAGES}
    return launch(f"{_switch(user)} {python} {command}", cwd=place / "victim", environment=folders)


def _plant_latest(place: Path, run: Path) -> None:
    link = place / "victim" / "runs" / "latest"
    link.symlink_to(run)
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)


def _commands(attack: dict[str, Path]) -> dict[str, str]:
    return {
        "train --config": f"{PROGRAMS['train.py']} --config {attack['settings']}",
        "train --resume": f"{PROGRAMS['train.py']} --resume --run_dir {attack['run']}",
        "evaluate": f"{PROGRAMS['evaluate.py']} {attack['run']}",
        "export": f"{PROGRAMS['export.py']} {attack['run']}",
    }


@pytest.mark.parametrize("way", ["train --config", *_thorough("train --resume", "evaluate")])
def test_a_strangers_settings_run_nothing(place: Path, attack: dict[str, Path], way: str) -> None:
    finished = _as_victim(_commands(attack)[way], place)
    assert not attack["mark"].exists(), finished.output
    assert finished.returncode == SETTINGS, finished.output
    assert f"comes from nobody (uid {STRANGER})" in finished.stderr, finished.output
    assert "data.name: subprocess.call" in finished.stderr, finished.output
    assert "--trust true" in finished.stderr, finished.output
    assert "Traceback" not in finished.output


@pytest.mark.parametrize("program", ["train.py --resume", *_thorough("export.py runs/latest")])
def test_a_planted_link_is_not_followed(place: Path, attack: dict[str, Path], program: str) -> None:
    _plant_latest(place, attack["run"])
    name, _, rest = program.partition(" ")
    finished = _as_victim(f"{PROGRAMS[name]} {rest}", place)
    assert not attack["mark"].exists(), finished.output
    assert finished.returncode == SETTINGS, finished.output
    assert "runs/latest is a link that nobody (uid 65534) has put into a folder of" in finished.stderr, finished.output


@pytest.mark.thorough
def test_settings_that_everybody_may_write_are_refused(place: Path, attack: dict[str, Path]) -> None:
    os.chown(attack["settings"], _victim()[0], -1)
    attack["settings"].chmod(0o666)
    for trust in ("", "--trust true"):
        finished = _as_victim(f"{PROGRAMS['train.py']} --config {attack['settings']} {trust}", place)
        assert not attack["mark"].exists(), finished.output
        assert finished.returncode == SETTINGS, finished.output
        assert "chmod o-w" in finished.stderr, finished.output


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["train --config", "export"])
def test_trusted_settings_run_and_what_is_no_data_set_is_told(place: Path, attack: dict[str, Path], way: str) -> None:
    finished = _as_victim(f"{_commands(attack)[way]} --trust true", place)
    assert attack["mark"].read_text().strip() == str(_victim()[0]), finished.output
    assert finished.returncode == DATA, finished.output
    assert "data.name is subprocess.call: it must give a data set" in finished.stderr, finished.output
    assert "gave int" in finished.stderr, finished.output
    assert "Traceback" not in finished.output


@pytest.mark.thorough
def test_a_strangers_settings_and_run_without_names_of_code_are_fine(place: Path) -> None:
    theirs = place / "theirs"
    theirs.mkdir()
    settings = theirs / "settings.yaml"
    settings.write_text("data: {name: synthetic, num_samples: 64}\nnum_epochs: 1\nloggers: none\n")
    os.chown(settings, STRANGER, STRANGER)
    finished = _as_victim(f"{PROGRAMS['train.py']} --config {settings} --run_dir run", place)
    assert finished.returncode == 0, finished.output
    run = place / "victim" / "run"
    for path in (run, *run.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    assert _as_victim(f"{PROGRAMS['evaluate.py']} {run}", place).stdout.count("Accuracy: ")


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        pytest.param(
            "--data.name os.system", DATA, "data.name is os.system: it must give a data set", marks=pytest.mark.thorough
        ),
        pytest.param(
            "--model.name collections.Counter",
            SETTINGS,
            "model.name is collections.Counter: ",
            marks=pytest.mark.thorough,
        ),
        ("--model.name builtins.print", SETTINGS, "it must give torch's Module, and gave NoneType None"),
        pytest.param(
            "--task ppo --model.name mlp --env.id builtins.dict",
            SETTINGS,
            "it must give gymnasium's Env, and gave dict",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_what_a_name_gives_is_of_its_kind(tmp_path: Path, settings: str, code: int, message: str) -> None:
    finished = launch(f"python {PROGRAMS['train.py']} {SMALL} {settings}", cwd=tmp_path)
    assert finished.returncode == code, finished.output
    assert message in finished.stderr, finished.output
    assert finished.stderr.count("lockstep: ") == 1, finished.output
    assert "Traceback" not in finished.output


@pytest.mark.parametrize(
    ("owner", "mode", "told"),
    [
        (0, 0o644, "has 1 rows"),
        (STRANGER, 0o644, "may be written by other users"),
        (0, 0o646, "may be written by other users"),
    ],
)
def test_rows_of_a_sweep_are_the_users_word(tmp_path: Path, owner: int, mode: int, told: str) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("--trust true --data.name subprocess.call\n")
    os.chown(rows, owner, -1)
    rows.chmod(mode)
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_ID": "9"}
    finished = launch(["bash", str(ROOT / "slurm" / "sweep.sbatch"), str(rows)], cwd=tmp_path, environment=job)
    assert finished.returncode == SETTINGS, finished.output
    assert told in finished.stderr, finished.output
