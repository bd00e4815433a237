"""Run the doctor, and read its output."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.launching import Finished, launch, slowness

DOCTOR = "lockstep doctor"
SECONDS = 9.0  # of the doctor itself; the launcher needs some of the ten, too
# A rank that does not know how to reach its mpirun: as if it were another MPI's.
UNKNOWN_TO_MPI = "env -u PMIX_NAMESPACE -u PMIX_RANK " + " ".join(
    f"-u PMIX_SERVER_URI{version}" for version in ("2", "21", "3", "4", "41")
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")


def run_doctor(command: str, cwd: Path, environment: Mapping[str, str] | None = None, tries: int = 3) -> Finished:
    """What the doctor says, in time. If other processes got in its way it tries again, so many times in all."""
    for _ in range(tries):
        finished = launch(command, timeout_seconds=60, cwd=cwd, environment=environment)
        if "took too long to load" not in finished.stdout and "speed" not in all_faults_of(finished):
            break
    assert finished.stdout.count("Launch line: ") == 1, finished.output
    (seconds,) = re.findall(r"; checked in (\S+) s$", finished.stdout, re.MULTILINE)
    assert float(seconds) < SECONDS * slowness(), finished.output
    return finished


def faults_of(finished: Finished) -> dict[str, str]:
    """What was found, by check; without the speed of ranks while other processes really take some of it."""
    found = all_faults_of(finished)
    return {check: what for check, what in found.items() if check != "speed"} if slowness() > 1.2 else found


def all_faults_of(finished: Finished) -> dict[str, str]:
    """What was found, by check."""
    return dict(re.findall(r"^  FAULT +(\S+(?: \S+)*?)  +(.*)$", finished.stdout, re.MULTILINE))


def launch_line_of(finished: Finished) -> str:
    (line,) = re.findall(r"^Launch line: (.*)$", finished.stdout, re.MULTILINE)
    return without_folder(line)


def without_folder(line: str) -> str:
    """A launch line, as if it were typed in the clone."""
    return re.sub(r"python ('[^']*/|\S*/)?app/train\.py'?", "python app/train.py", line)


def in_a_machine_with(planted: str) -> str:
    """A command for the doctor alone, in a mount namespace of its own."""
    return f"unshare --mount sh -c {shlex.quote(f'{planted} && exec {DOCTOR}')}"
