"""A real Slurm of two nodes on this machine, for tests: slurm_cluster.sh makes it, in namespaces of its own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launching import ENVIRONMENT, ROOT, Finished, launch, slowness

SCRIPT = ROOT / "tests" / "slurm_cluster.sh"
INSTALL = "tests/install_slurm.sh"
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "sshd", "ssh-keygen", "ip", "nsenter", "unshare", "taskset")
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
# What a person has who has just logged in. A home of one's own, since horovodrun keeps there what it knows of hosts.
LOGIN = {"HOME": "/tmp", "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin", "CUDA_VISIBLE_DEVICES": ""}
LOGIN |= {name: value for name, value in os.environ.items() if name == "LOCKSTEP_VENV"}
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
STATES_OF_A_JOB_IN_HAND = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}
SECONDS_TO_END = 30


@dataclass(frozen=True)
class SlurmCluster:
    """A login node, which runs what tests ask for, and the nodes n1 and n2 with 4 CPUs each.

    Attributes:
        pid: of the process whose end is the cluster's.
    """

    pid: int

    def run(self, command: str, cwd: Path, timeout_seconds: float = 60, /, **environment: str) -> Finished:
        """Run a line of bash on the login node to its end, as a person would who has just logged in."""
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in {**LOGIN, **environment}.items())
        line = f"cd {shlex.quote(str(cwd))} && {command}"
        enter = f"nsenter --target {self.pid} {' '.join(NAMESPACES)}"
        return launch(f"exec {enter} env -i {variables} bash -c {shlex.quote(line)}", timeout_seconds)

    def submit(self, arguments: str, cwd: Path, **environment: str) -> "Job":
        """`sbatch` with a line of arguments."""
        finished = self.run(f"sbatch {arguments}", cwd, **environment)
        assert finished.returncode == 0, finished.output
        return Job(self, re.findall(r"^Submitted batch job (\d+)$", finished.stdout, re.MULTILINE)[0], cwd)


@dataclass(frozen=True)
class Job:
    """A job that was submitted.

    Attributes:
        cwd: where it was submitted.
    """

    cluster: SlurmCluster
    id: str
    cwd: Path

    @property
    def output(self) -> str:
        """What it has written: to one file, or of an array to one for each task."""
        files = [*self.cwd.glob(f"*-{self.id}.out"), *sorted(self.cwd.glob(f"*-{self.id}_*.out"))]
        return "".join(file.read_text() for file in files)

    def states(self) -> set[str]:
        return set(self._show("JobState"))

    def wait(self, timeout_seconds: float = 150) -> int:
        """Until it has ended; its exit code (of an array, the largest)."""
        self.wait_until(lambda: not self.states() & STATES_OF_A_JOB_IN_HAND, timeout_seconds)
        codes = [code.split(":") for code in self._show("ExitCode")]
        return max(int(code) or (128 + int(signal) if int(signal) else 0) for code, signal in codes)

    def wait_until(self, condition: Callable[[], bool], timeout_seconds: float = 100) -> None:
        """Raises AssertionError, with all that the job has said, if `condition` does not come true in time."""
        deadline = time.monotonic() + timeout_seconds * slowness()
        while not condition():
            assert time.monotonic() < deadline, f"job {self.id} is {self.states()}:\n{self.output}"
            time.sleep(0.3)

    def cancel(self) -> None:
        """And wait until nothing of it runs."""
        self.cluster.run(f"scancel {self.id}", self.cwd)
        self.wait_until(lambda: not self.states() & STATES_OF_A_JOB_IN_HAND)

    def _show(self, field: str) -> list[str]:
        shown = self.cluster.run(f"scontrol --oneliner show job {self.id}", self.cwd)
        assert shown.returncode == 0, shown.output
        return re.findall(rf"\b{field}=(\S+)", shown.stdout)


def why_not_here() -> str | None:
    """Why this machine cannot hold the cluster; None if it can."""
    if os.geteuid() != 0:
        return "a Slurm for tests needs root, to make its nodes"
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]
    if not any(Path("/usr/lib").glob("*/libpmix.so")):  # without it srun offers pmix, and fails
        missing.append("libpmix.so")
    if missing:
        return f"a Slurm for tests needs {', '.join(missing)}: {INSTALL} installs them"
    unshared = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {unshared.stderr.strip()}" if unshared.returncode else None


@contextmanager
def slurm_cluster(shared: Path) -> Iterator[SlurmCluster]:
    """Start a cluster, whose nodes share `shared`, the clone and the environment; in the end nothing of it is left."""
    # Processes of a namespace end with its first one, which ends with its standard input, and so with this process.
    folders = {str(Path(folder).resolve()) for folder in (shared, ROOT, sys.prefix, sys.base_prefix)}
    process = subprocess.Popen(
        ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", str(SCRIPT), *sorted(folders)],
        env={**ENVIRONMENT, "PATH": PATH},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for pytest, which then ends it
    )
    assert process.stdin
    assert process.stdout
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line == "ready\n":
                break
        else:
            raise AssertionError(f"{SCRIPT.name} failed:\n{said}")
        (first,) = psutil.Process(process.pid).children()
        yield SlurmCluster(first.pid)
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(SECONDS_TO_END)
        finally:
            process.kill()
