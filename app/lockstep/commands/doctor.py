"""Looks at this machine, or at every node of a job, for what would spoil a training; in 10 seconds at most.

    env/run lockstep doctor                            this machine, or a login node
    env/run mpirun -np 4 lockstep doctor               every rank and node, as a training would be started
    srun --mpi=pmix -n 8 env/run lockstep doctor       the same in Slurm
    env/run lockstep doctor --json report.json         for programs, too (--json true: on standard output instead)
    env/run lockstep doctor --folder /scratch/me/runs  the folder that runs will be written to (default: runs)

It says what it found, what to do, and the line that starts a training well here. It ends with 0 if nothing is wrong
(warnings are no fault), else with UNHEALTHY of docs/exit-codes.md. docs/doctor.md lists what it looks at.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from lockstep.doctor.diagnosis import diagnose, is_healthy
from lockstep.doctor.examining import GIVE_UP_AT, LOOK_UNTIL, examining
from lockstep.doctor.facts import Facts
from lockstep.doctor.launch_line import launch_line
from lockstep.doctor.report import as_json, as_text
from lockstep.runtime.errors import ExitCode, StorageError, run_alone
from lockstep.runtime.launcher import detect_launcher, mpi_misses_processes, reports_errors

STARTED = time.monotonic() - time.process_time()  # about when this process began
SILENT_UNTIL = GIVE_UP_AT + 0.5
LOST_UNTIL = LOOK_UNTIL + 2.0  # with no other rank to meet, the speaker needs no longer
TO_STANDARD_OUTPUT = "true"


def run() -> None:
    """Raises StorageError if the JSON cannot be written."""
    options = parse_options()
    with examining(options.folder, STARTED) as facts:
        code = tell(facts, options.json) if is_this_one_to_speak(facts) else let_another_speak(facts)
    sys.exit(code)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lockstep doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="that runs will be written to")
    parser.add_argument("--json", metavar="FILE", help="write it there, too; `true`: to standard output, and no text")
    with contextlib.ExitStack() as stack:
        if detect_launcher(os.environ).rank != 0:
            null = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
        return parser.parse_args()


def is_this_one_to_speak(facts: Facts) -> bool:
    """Rank 0; where MPI did not start, the launcher's."""
    if facts.joined is None:
        return facts.launcher.rank == 0
    return reports_errors(facts.launcher, facts.joined.rank, facts.joined.size)


def let_another_speak(facts: Facts) -> ExitCode:
    """The first one to leave may have the launcher end all, with its own code."""
    is_lost = facts.joined is not None and mpi_misses_processes(facts.launcher, facts.joined.size)
    if not is_lost and not facts.trouble and facts.can_be_left:
        return ExitCode.DONE
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ExitCode.UNHEALTHY))
    time.sleep(max(0.0, STARTED + (LOST_UNTIL if is_lost else SILENT_UNTIL) - time.monotonic()))
    return ExitCode.UNHEALTHY


def tell(facts: Facts, json_file: str | None) -> ExitCode:
    findings = diagnose(facts)
    code = ExitCode.DONE if is_healthy(findings) else ExitCode.UNHEALTHY
    line, seconds = launch_line(facts, findings), time.monotonic() - STARTED
    report = json.dumps(as_json(facts, findings, line, seconds, code), indent=2)
    print(report if json_file == TO_STANDARD_OUTPUT else as_text(facts, findings, line, seconds), flush=True)
    if json_file and json_file != TO_STANDARD_OUTPUT:
        try:
            Path(json_file).write_text(report + "\n")
        except OSError as error:
            raise StorageError(f"--json {json_file}: {error.strerror}") from error
    return code


def main() -> None:
    run_alone(run)
