"""Runs one drill after the other: a job with a fault, then the same run to its end, beside one that had no fault."""

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

from lockstep.drill.faults import FAULTS, Fault
from lockstep.drill.processes import left_behind
from lockstep.runtime.errors import LockstepError, StorageError
from lockstep.training.checkpoint import list_checkpoints
from lockstep.training.sample_ledger import read_ledger

INTERVAL = 4
UPDATE = 2 * INTERVAL + 2  # counted from 1; before it two checkpoints are made, and one update that none of them has
SETTINGS = (
    "--data.name synthetic --data.num_samples 512 --data.batch_size 16 --num_epochs 1 --evaluate_every 0 "
    f"--checkpoint.interval {INTERVAL} --checks.ledger true"
)
SECONDS_TO_START_AND_END = 120
SECONDS_ABOVE_LIMIT = 5  # by which a verdict may come later than the limit of a stall
SECONDS_FOR_ORPHANS_TO_END = 5
SECONDS_UNTIL_MENDED = 40  # a cut link


@dataclass(frozen=True)
class Job:
    """A job that has ended, and when it said what.

    Attributes:
        code: what its launcher ended with; None if it had to be killed.
        lines: (seconds since the epoch, line), of both its outputs.
        ended: seconds since the epoch.
    """

    code: int | None
    lines: list[tuple[float, str]]
    ended: float

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in self.lines)


@dataclass(frozen=True)
class Drilled:
    """What came of one fault.

    Attributes:
        failures: what was not as it should be; empty if it passed.
        impossible: why it cannot be injected here; None if it was.
        seconds: from the fault to the verdict.
        code: the job's exit code.
        redone: updates that were done before the fault and had to be done again.
        orphans: processes that were left.
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
    """One user's own launcher, and where and how hard it is tried.

    Attributes:
        launcher: such as `mpirun -np {ranks}`.
        limit_seconds: without a sign of life, after which a job must end itself.
        folder: for runs and logs; all nodes see it.
    """

    launcher: str
    num_ranks: int
    limit_seconds: float
    folder: Path

    def reference(self) -> str:
        """The digest of the model of a run without a fault.

        Raises:
            LockstepError: not even that works.
        """
        job = self._train("reference", resume=False)
        if job.code != 0:
            raise LockstepError(f"a run without any fault ended with {job.code}:\n{job.output[-3000:]}")
        return _digest(self.folder / "reference")

    def inject(self, name: str, reference: str) -> Drilled:
        """One fault, and what came of it."""
        fault, run = FAULTS[name], self.folder / name
        rank = 0 if name == "full_disk" else self.num_ranks - 1  # of a job on several nodes, on the last of them
        injected_file = self.folder / f"{name}.injected"
        program = ["-m", "lockstep.drill.faulty_train", name, str(rank), str(UPDATE), str(injected_file)]
        job = self._start([*program, *self._settings(run)], name)
        if "not possible here: " in job.output:
            reason = re.search(r"not possible here: (.*)", job.output)
            return Drilled(name, impossible=reason[1] if reason else "")
        orphans = self._orphans(run, SECONDS_UNTIL_MENDED if name == "cut_link" else SECONDS_FOR_ORPHANS_TO_END)
        failures = [f"processes are left: {'; '.join(orphans)}"] if orphans else []
        seconds, verdict = self._judge(fault, rank, job, injected_file, failures)
        redone = None
        if injected_file.exists():
            redone = self._go_on(fault, run, job, reference, failures)
        return Drilled(name, failures, None, seconds, job.code, verdict, redone, orphans)

    def _judge(
        self, fault: Fault, rank: int, job: Job, injected_file: Path, failures: list[str]
    ) -> tuple[float | None, str]:
        """Seconds from the fault to the verdict, and its text."""
        if not injected_file.exists():
            failures.append(f"the job ended with {job.code} before the fault: {job.output[-500:]}")
            return None, ""
        pattern = re.compile(fault.verdict.replace("{rank}", str(rank)))
        told = [(moment, line) for moment, line in job.lines if pattern.search(line)]
        if not told:
            failures.append(f"no verdict like {pattern.pattern!r}")
        if fault.codes is not None and job.code not in fault.codes:
            failures.append(f"it ended with {job.code}, not with {sorted(fault.codes)}")
        if job.code in (None, 0) and fault.codes is None:
            failures.append(f"it ended with {job.code}")
        seconds = (told[0][0] if told else job.ended) - float(injected_file.read_text())
        if seconds > self.limit_seconds + SECONDS_ABOVE_LIMIT:
            failures.append(f"the verdict took {seconds:.1f} s")
        return seconds, told[0][1].strip() if told else ""

    def _go_on(self, fault: Fault, run: Path, job: Job, reference: str, failures: list[str]) -> int | None:
        """Updates that had to be done again, until the run was through; is it the run that had no fault?"""
        redone = 0
        if job.code != 0:
            if fault.tears:
                _tear(list_checkpoints(run)[-1])
            resumed = self._train(run.name, resume=True)
            if resumed.code != 0:
                failures.append(f"going on ended with {resumed.code}: {resumed.output[-1500:]}")
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
        """Start `program` on all ranks, and wait for its end; the output goes to a log, too."""
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
        """What is left of a job on any node, once `seconds` have passed or nothing is."""
        deadline = time.monotonic() + seconds
        while left_behind(f"--run_dir {run}") and time.monotonic() < deadline:
            time.sleep(0.2)
        counted = self._start(["-m", "lockstep.drill.processes", f"--run_dir {run}"], f"{run.name}-left")
        if counted.code != 0:
            return [f"they could not be counted: {counted.output[-300:]}"]
        return sorted({line.strip() for _, line in counted.lines if f"--run_dir {run}" in line})


def _kill(pid: int) -> None:
    """A job that does not end, with all that it has started here."""
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


def _tear(checkpoint: Path) -> None:
    """Half of a file is gone, as after a power cut on a file system that lies about what it has written."""
    file = next(iter(sorted(checkpoint.glob("*.safetensors"))))
    with file.open("rb+") as opened:
        opened.truncate(file.stat().st_size // 2)
