"""Starts real commands for tests: with a time-out, and with nothing of them left behind."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
# As it was before this process itself became an MPI process; and on the CPU, since a test has more ranks than GPUs.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
SECONDS_TO_ADD = 0.03  # two million numbers, on a modern core
across_nodes = pytest.mark.skipif(
    " " in f"{ROOT}{sys.prefix}", reason="Open MPI does not quote its own path, which has a blank, for other nodes"
)


def slowness() -> float:
    """By how much a wait must be longer here and now than on a quiet machine of two modern cores; 1 at least.

    Measured once for the speed of one core, and each time for the load of all of them.
    """
    return max(1.0, _slowness_of_a_core()) * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


@cache
def _slowness_of_a_core() -> float:
    def measure() -> float:
        started = time.process_time()  # without what other processes take of the core
        sum(range(2_000_000))
        return time.process_time() - started

    return min(measure() for _ in range(3)) / SECONDS_TO_ADD


class DidNotEndError(AssertionError):
    """A command was killed because its time was over."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        return f"{self.stdout}\n{self.stderr}"


def launch(
    command: Sequence[str] | str,
    timeout_seconds: float = 120,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run `command` (a string: by bash) to its end.

    Raises:
        DidNotEndError: it did not end in time, which is longer on a busy machine; it and every process that it started
            are killed, by id.
    """
    timeout_seconds *= slowness()
    started = time.monotonic()
    process = subprocess.Popen(
        command if isinstance(command, str) else list(command),
        shell=isinstance(command, str),
        executable="/bin/bash" if isinstance(command, str) else None,
        cwd=cwd,
        env={**ENVIRONMENT, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        stdout, stderr = _kill(process)
        raise DidNotEndError(f"{command} did not end in {timeout_seconds:.0f} s:\n{stdout}\n{stderr}") from None
    except BaseException:  # Ctrl-C, or the test's own time-out
        _kill(process)
        raise
    return Finished(process.returncode, stdout, stderr, time.monotonic() - started)


def block_of(page: Path, language: str, beginning: str) -> str:
    """The block of code on a page that begins so."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if block.startswith(beginning)]
    return str(found)


def running(parent: psutil.Process, script: Path) -> list[psutil.Process]:
    """The Python processes below `parent` that run `script`: its ranks."""
    found = []
    for child in parent.children(recursive=True):
        with suppress(psutil.Error):  # it has ended, and nobody has asked for its exit code
            if child.cmdline()[1:2] == [str(script)]:
                found.append(child)
    return found


def kill_after_a_checkpoint(command: str, run: Path, cwd: Path) -> None:
    """Kill both ranks of app/train.py by SIGKILL once there is a checkpoint: later updates, in mid-epoch, are lost."""
    process = psutil.Popen(shlex.split(command), cwd=cwd, env=ENVIRONMENT, stdout=-3, stderr=-3, stdin=-3)
    deadline = time.monotonic() + 120 * slowness()
    try:
        while not any((run / "checkpoints").glob("[0-9]*/manifest.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)
    finally:
        ranks = running(process, ROOT / "app" / "train.py")
        for rank in ranks:
            rank.kill()
        psutil.wait_procs([*ranks, process], timeout=30 * slowness())
        assert not process.is_running()
    assert len(ranks) == 2


def _kill(process: subprocess.Popen[str]) -> tuple[str, str]:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)  # a launcher passes it on
    _, alive = psutil.wait_procs(family, timeout=5)
    for member in alive:
        member.kill()
    return process.communicate()
