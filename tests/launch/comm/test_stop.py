"""Runs that stop ahead of time by themselves, or because they were asked to."""

import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lockstep.training.checkpoint import list_checkpoints
from tests.launching import ENVIRONMENT, ROOT, launch, running, slowness

TRAIN = ROOT / "app" / "train.py"
COMMAND = f"python {shlex.quote(str(TRAIN))}"
LONG = "--num_epochs 1000 --run_dir run --stop.margin_seconds 2"


@pytest.mark.thorough
def test_a_run_ends_before_its_job_does_and_goes_on_in_the_next(tmp_path: Path) -> None:
    """No signal: the clock alone."""
    end = time.time() + 18 * slowness()
    environment = {"LOCKSTEP_JOB_END_TIME": f"{end:.0f}"}
    stopped = launch(f"mpirun -np 2 {COMMAND} {LONG}", cwd=tmp_path, environment=environment)
    assert time.time() < end
    assert stopped.returncode == 75, stopped.output
    (update,) = re.findall(r"stopped by the end of the job's time after update (\d+) of 63000", stopped.stderr)
    assert int(list_checkpoints(tmp_path / "run")[-1].name) == int(update) > 0
    resumed = launch(
        f"mpirun -np 2 {COMMAND} --resume --run_dir run --stop.after_minutes {0.2 * slowness()}", cwd=tmp_path
    )
    assert resumed.returncode == 75, resumed.output
    assert f"Goes on after update {update} " in resumed.stdout
    assert int(list_checkpoints(tmp_path / "run")[-1].name) > int(update)


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("horovodrun", marks=pytest.mark.thorough)])
def test_usr1_to_the_launcher_saves_and_leaves_nobody_behind(launcher: str, tmp_path: Path) -> None:
    command = shlex.split(f"{launcher} -np 2 {COMMAND} {LONG} --checkpoint.interval 0")
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "output").open("w+") as output:
        ranks: list[psutil.Process] = []
        process = psutil.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=output, stderr=output, stdin=-3)
        try:
            _wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
            ranks = running(process, TRAIN)
            assert len(ranks) == 2
            process.send_signal(signal.SIGUSR1)
            code = process.wait(30 * slowness())
            _, alive = psutil.wait_procs(ranks, timeout=5 * slowness())
        finally:
            for member in [*ranks, process]:
                if member.is_running():
                    member.kill()
        output.seek(0)
        said = output.read()
    assert code == 75, said
    assert not alive
    assert re.search(r"stopped by SIGUSR1 after update \d+ of 63000, which is saved", said)
    assert len(list_checkpoints(tmp_path / "run")) == 1


@pytest.mark.thorough
@pytest.mark.parametrize(("presses", "code"), [(1, 75), (2, 130)])
def test_ctrl_c_once_saves_and_twice_leaves_at_once(presses: int, code: int, tmp_path: Path) -> None:
    """An update takes some seconds here: the second one comes in the midst of it."""
    command = f"{COMMAND} {LONG} --checkpoint.interval 0 --data.batch_size 4000"
    said, metrics = tmp_path / "output", tmp_path / "run" / "metrics.jsonl"
    with said.open("w") as output:
        process = psutil.Popen(
            shlex.split(command), cwd=tmp_path, env=ENVIRONMENT, stdout=output, stderr=output, stdin=-3
        )
    try:
        _wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            _wait_until(lambda: "Ctrl-C again leaves at once" in said.read_text())
        ended = process.wait(60 * slowness())
    finally:
        if process.is_running():
            process.kill()
    assert ended == code, said.read_text()
    assert ("stopped by SIGINT after update" in said.read_text()) == (presses == 1)
    assert len(list_checkpoints(tmp_path / "run")) == (1 if presses == 1 else 0)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60 * slowness()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
