"""Checks this machine, or every node of a job, for what would break or slow down a training; in 10 seconds at most.

    env/run lockstep doctor                            this machine, or a login node
    env/run mpirun -np 4 lockstep doctor               every rank and node, as a training would be started
    srun --mpi=pmix -n 8 env/run lockstep doctor       the same in Slurm
    env/run lockstep doctor --json report.json         also as JSON (--json true: to standard output, and no text)
    env/run lockstep doctor --folder /scratch/me/runs  the folder that runs will be written to (default: runs)

It prints what it found, what to do about it, and the line that starts a training well here. It ends with 0 if there
is no fault (warnings are allowed), else with UNHEALTHY of docs/exit-codes.md. docs/doctor.md lists all checks.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from lockstep.doctor.facts import Facts
from lockstep.doctor.report import as_json, as_text, diagnose, is_healthy, launch_line
from lockstep.doctor.supervisor import GIVE_UP_AT, LOCAL_FACTS_UNTIL, collect_facts
from lockstep.runtime.command_line import command_parser
from lockstep.runtime.errors import ExitCode, StorageError, run_alone
from lockstep.runtime.launcher import detect_launcher, mpi_misses_processes, reports_errors

STARTED = time.monotonic() - time.process_time()  # about when this process began
WAIT_UNTIL = GIVE_UP_AT + 0.5
WAIT_UNTIL_IF_ALONE = LOCAL_FACTS_UNTIL + 2.0  # the reporting rank measures nothing with others, and ends sooner
TO_STANDARD_OUTPUT = "true"


def run() -> None:
    """Raises StorageError if the JSON cannot be written."""
    options = _parse_args()
    with collect_facts(options.folder, STARTED) as facts:
        code = report(facts, options.json) if is_reporting(facts) else wait_for_report(facts)
    sys.exit(code)


def _parse_args() -> argparse.Namespace:
    parser = command_parser("doctor", __doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="folder for runs (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write JSON; `true`: to standard output, and no text")
    with contextlib.ExitStack() as stack:
        if detect_launcher(os.environ).rank != 0:  # usage and errors are printed once
            null = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
        return parser.parse_args()


def is_reporting(facts: Facts) -> bool:
    """Whether this process prints the report: it is rank 0, or, if MPI did not start, the launcher's rank 0."""
    if facts.mpi is None:
        return facts.launcher.rank == 0
    return reports_errors(facts.launcher, facts.mpi.rank, facts.mpi.size)


def wait_for_report(facts: Facts) -> ExitCode:
    """Return this process's exit code, after waiting for the report if something is wrong.

    A launcher may kill all processes as soon as one of them ends with an error.
    """
    is_lost = facts.mpi is not None and mpi_misses_processes(facts.launcher, facts.mpi.size)
    if not is_lost and not facts.trouble and facts.can_finalize:
        return ExitCode.DONE
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ExitCode.UNHEALTHY))
    time.sleep(max(0.0, STARTED + (WAIT_UNTIL_IF_ALONE if is_lost else WAIT_UNTIL) - time.monotonic()))
    return ExitCode.UNHEALTHY


def report(facts: Facts, json_file: str | None) -> ExitCode:
    """Print the report and write the JSON; return the exit code. Raises StorageError if that cannot be written."""
    findings = diagnose(facts)
    code = ExitCode.DONE if is_healthy(findings) else ExitCode.UNHEALTHY
    line, seconds = launch_line(facts, findings), time.monotonic() - STARTED
    content = json.dumps(as_json(facts, findings, line, seconds, code), indent=2)
    print(content if json_file == TO_STANDARD_OUTPUT else as_text(facts, findings, line, seconds), flush=True)
    if json_file and json_file != TO_STANDARD_OUTPUT:
        try:
            Path(json_file).write_text(content + "\n")
        except OSError as error:
            raise StorageError(f"--json {json_file}: {error.strerror}") from error
    return code


def main() -> None:
    run_alone(run)
