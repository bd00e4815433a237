"""Inject one fault after the other: a job with a fault, then the same run resumed to its end, beside a run without."""

import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from lockstep.drill.processes import running_processes
from lockstep.runtime.errors import ExitCode, LockstepError, StorageError
from lockstep.training.checkpoint import list_checkpoints
from lockstep.training.sample_ledger import read_ledger

INTERVAL = 4
UPDATE = 2 * INTERVAL + 2  # counted from 1; by then there are two checkpoints, and one update that neither contains
SETTINGS = (
    "--data.name synthetic --data.num_samples 512 --data.batch_size 16 --num_epochs 1 --evaluate_every 0 "
    f"--checkpoint.interval {INTERVAL} --checks.ledger true"
)
SECONDS_TO_START_AND_END = 120
SECONDS_ABOVE_LIMIT = 5  # how much later than the stall limit a verdict may come
SECONDS_FOR_ORPHANS_TO_END = 5
SECONDS_UNTIL_MENDED = 40  # a cut link
# The launcher's message, or, if a rank on another node notices first, the message of its MPI.
KILLED = r"[Kk]illed|signal 9|Exited with|peer process has unexpectedly disconnected"


@dataclass(frozen=True)
class Fault:
    """One fault, and what must come of it.

    Attributes:
        what: what happens, for people.
        verdict: what the job must print, as a regular expression; {rank} is the rank with the fault.
        codes: the exit codes that are right; None: any but 0, since launchers have their own.
        tears: whether a file of the last checkpoint is truncated before the run is resumed.
    """

    what: str
    verdict: str
    codes: frozenset[int] | None
    tears: bool = False


FAULTS = {
    "sigkill": Fault("a rank is killed (SIGKILL)", KILLED, None),
    "sigstop": Fault(
        "a rank is stopped (SIGSTOP)",
        r"rank {rank}: (process \d+ on \S+ is stopped|no sign of \S+, which is stopped)",
        frozenset({ExitCode.STALLED}),
    ),
    "slow": Fault("a rank is slow", r"Rank {rank} was the slowest: \d+%", frozenset({ExitCode.DONE})),
    "exception": Fault("a rank raises an exception", r"lockstep: rank {rank}:", frozenset({ExitCode.BUG})),
    "nan": Fault(
        "a rank's images become NaN",
        r"update \d+: the (loss|gradient of \S+) on rank {rank} is infinite or not a number",
        frozenset({ExitCode.NON_FINITE}),
    ),
    "full_disk": Fault(
        "the disk is full", r"rank 0 could not write its part of a checkpoint", frozenset({ExitCode.STORAGE})
    ),
    "torn_shard": Fault("a rank is killed, a checkpoint's file torn", KILLED, None, tears=True),
    "sigterm": Fault("a rank gets SIGTERM", r"stopped by SIGTERM after update \d+", frozenset({ExitCode.STOPPED})),
    "sigusr1": Fault("a rank gets SIGUSR1", r"stopped by SIGUSR1 after update \d+", frozenset({ExitCode.STOPPED})),
    "cut_link": Fault("a node's link is cut", r"the job stalled.*nothing comes through", frozenset({ExitCode.STALLED})),
}


@dataclass(frozen=True)
class Job:
    """A job that has ended, with its timed output.

    Attributes:
        code: its launcher's exit code; None if it had to be killed.
        lines: (seconds since 1970, line) of standard output and error.
        ended: seconds since 1970.
    """

    code: int | None
    lines: list[tuple[float, str]]
    ended: float

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)


@dataclass(frozen=True)
class Result:
    """The result of one fault.

    Attributes:
        failures: what went wrong; empty if the drill passed.
        impossible: why the fault cannot be injected here; None if it was.
        seconds: from the fault to the verdict.
        code: the job's exit code.
        redone: updates that were lost by the fault and repeated after resuming.
        orphans: processes that the job left behind.
    """

    fault: str
    failures: list[str] = field(default_factory=list)
    impossible: str | None = None
    seconds: float | None = None
    code: int | None = None
    verdict: str = ""
    redone: int | None = None
    orphans: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Drill:
    """How jobs are started, and where their runs and logs go.

    Attributes:
        launcher: such as `mpirun -np {ranks}`.
        limit_seconds: the stall limit of the jobs: seconds without progress after which a job must end itself.
        folder: for runs and logs, visible on all nodes.
    """

    launcher: str
    num_ranks: int
    limit_seconds: float
    folder: Path

    def reference(self) -> str:
        """Train without a fault, and return the digest of the model.

        Raises:
            LockstepError: that run fails.
        """
        job = self._train("reference", resume=False)
        if job.code != 0:
            raise LockstepError(f"a run without any fault ended with {job.code}:\n{job.output[-3000:]}")
        return _digest(self.folder / "reference")

    def inject(self, name: str, reference: str) -> Result:
        """Inject the fault `name`, resume the run, and compare its model with the digest `reference`."""
        fault, run = FAULTS[name], self.folder / name
        rank = 0 if name == "full_disk" else self.num_ranks - 1  # on several nodes, a rank of the last one
        injected_file = self.folder / f"{name}.injected"
        program = ["-m", "lockstep.drill.faulty_train", name, str(rank), str(UPDATE), str(injected_file)]
        job = self._start([*program, *self._settings(run)], name)
        if "not possible here: " in job.output:
            reason = re.search(r"not possible here: (.*)", job.output)
            return Result(name, impossible=reason[1] if reason else "")
        orphans = self._orphans(run, SECONDS_UNTIL_MENDED if name == "cut_link" else SECONDS_FOR_ORPHANS_TO_END)
        failures = [f"processes are left: {'; '.join(orphans)}"] if orphans else []
        seconds, verdict = self._judge(fault, rank, job, injected_file, failures)
        redone = None
        if injected_file.exists():
            redone = self._resume(fault, run, job, reference, failures)
        return Result(name, failures, None, seconds, job.code, verdict, redone, orphans)

    def _judge(
        self, fault: Fault, rank: int, job: Job, injected_file: Path, failures: list[str]
    ) -> tuple[float | None, str]:
        """Check how the job ended; append to `failures`.

        Returns the seconds from the fault to the verdict, and the verdict.
        """
        if not injected_file.exists():
            failures.append(f"the job ended with {job.code} before the fault: {job.output[-500:]}")
            return None, ""
        pattern = re.compile(fault.verdict.replace("{rank}", str(rank)))
        verdicts = [(moment, line) for moment, line in job.lines if pattern.search(line)]
        if not verdicts:
            failures.append(f"no verdict like {pattern.pattern!r}")
        if fault.codes is not None and job.code not in fault.codes:
            failures.append(f"it ended with {job.code}, not with {sorted(fault.codes)}")
        if job.code in (None, 0) and fault.codes is None:
            failures.append(f"it ended with {job.code}")
        seconds = (verdicts[0][0] if verdicts else job.ended) - float(injected_file.read_text())
        if seconds > self.limit_seconds + SECONDS_ABOVE_LIMIT:
            failures.append(f"the verdict took {seconds:.1f} s")
        return seconds, verdicts[0][1].strip() if verdicts else ""

    def _resume(self, fault: Fault, run: Path, job: Job, reference: str, failures: list[str]) -> int | None:
        """Resume the run to its end, and compare it with the run without a fault; append to `failures`.

        Returns the number of repeated updates; None if resuming failed.
        """
        redone = 0
        if job.code != 0:
            if fault.tears:
                _truncate(list_checkpoints(run)[-1])
            resumed = self._train(run.name, resume=True)
            if resumed.code != 0:
                failures.append(f"resuming ended with {resumed.code}: {resumed.output[-1500:]}")
                return None
            if fault.tears and "skipped: " not in resumed.output:
                failures.append("the torn checkpoint was not noticed")
            start = re.search(r"Goes on after update (\d+)", resumed.output)
            redone = max(0, UPDATE - 1 - (int(start[1]) if start else 0))
        if _digest(run) != reference:
            failures.append("the model is not that of a run without a fault")
        accounts = read_ledger(run)
        if not accounts or not all(account.is_exact for account in accounts):
            failures.append("not every sample was learned from exactly once")
        return redone

    # -- jobs --------------------------------------------------------------------------------------------------------

    def _settings(self, run: Path) -> list[str]:
        limit = ["--stall.limit_seconds", str(self.limit_seconds)]
        return [*shlex.split(SETTINGS), *limit, "--run_dir", str(run)]

    def _train(self, name: str, resume: bool) -> Job:
        settings = self._settings(self.folder / name) + (["--resume"] if resume else [])
        return self._start(["-m", "lockstep", "train", *settings], f"{name}-resumed" if resume else name)

    def _start(self, program: Sequence[str], log: str) -> Job:
        """Run `program` on all ranks to its end. Its output also goes to the file `log`.log."""
        command = [*shlex.split(self.launcher.format(ranks=self.num_ranks)), sys.executable, *program]
        lines: list[tuple[float, str]] = []
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout
        output = process.stdout
        reader = threading.Thread(target=lambda: lines.extend((time.time(), line.rstrip("\n")) for line in output))
        reader.start()
        code: int | None = None
        try:
            code = process.wait(self.limit_seconds + SECONDS_TO_START_AND_END)
        except subprocess.TimeoutExpired:
            pass
        finally:
            ended = time.time()
            if code is None:
                _kill(process.pid)
            reader.join(SECONDS_FOR_ORPHANS_TO_END)
            (self.folder / f"{log}.log").write_text("".join(f"{moment:.2f} {line}\n" for moment, line in lines))
        return Job(code, list(lines), ended)

    def _orphans(self, run: Path, seconds: float) -> list[str]:
        """The job's processes that still run on any node after `seconds`; returns sooner if none does."""
        deadline = time.monotonic() + seconds
        while running_processes(f"--run_dir {run}") and time.monotonic() < deadline:
            time.sleep(0.2)
        counted = self._start(["-m", "lockstep.drill.processes", f"--run_dir {run}"], f"{run.name}-left")
        if counted.code != 0:
            return [f"they could not be counted: {counted.output[-300:]}"]
        return sorted({line.strip() for _, line in counted.lines if f"--run_dir {run}" in line})


def _kill(pid: int) -> None:
    """Kill a process and all its descendants on this node."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=SECONDS_FOR_ORPHANS_TO_END)


def _digest(run: Path) -> str:
    try:
        return str(json.loads((run / "summary.json").read_text())["model_digest"])
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"{run} was not finished: {error}") from error


def _truncate(checkpoint: Path) -> None:
    """Cut a file in half, as after a power cut on a file system that acknowledges writes too early."""
    file = next(iter(sorted(checkpoint.glob("*.safetensors"))))
    with file.open("rb+") as opened:
        opened.truncate(file.stat().st_size // 2)
