"""How every Lockstep program begins and ends: join the job, run, and leave it with one message and one exit code."""

import contextlib
import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from lockstep.comm.cluster import Cluster
from lockstep.comm.mpi_library import abort_job, rank_in_job, size_of_job
from lockstep.runtime.errors import ExitCode, LockstepError
from lockstep.runtime.hints import suggest
from lockstep.runtime.launcher import detect_launcher, mpi_misses_processes, reports_errors

JOIN_SECONDS = 300.0
REPORT_SECONDS = 3.0  # for the process that prints an error: launchers end all processes as soon as one has left


def run_program(main: Callable[[Cluster], object]) -> None:
    """Collective: run `main` on every rank and exit; an error on any rank is printed once and ends all ranks."""
    cluster: Cluster | None = None
    try:
        with deadline_to_join():
            cluster = Cluster.start()
        main(cluster)
    except SystemExit as request:  # --help and --print_config, on all ranks
        _leave(cluster, request.code)
    except LockstepError as error:
        if not error.shared:
            abort_for(error)
        launcher = detect_launcher(os.environ)
        if reports_errors(launcher, rank_in_job(), size_of_job()):
            tell(str(error))
        elif mpi_misses_processes(launcher, size_of_job()):
            _wait_for_report(error.exit_code)
        _leave(cluster, error.exit_code)
    except BaseException as error:
        abort_for(error)
    else:
        _leave(cluster, ExitCode.DONE)


@contextlib.contextmanager
def deadline_to_join() -> Iterator[None]:
    """Abort if the ranks have not all joined in time. After that the run's watchdog notices stalls."""

    def give_up() -> None:
        doctor = suggest("doctor")
        why = f"the ranks have not all come together within {JOIN_SECONDS:.0f} s; {doctor} tells why"
        try:
            abort(f"{platform.node()}: {why}", ExitCode.STALLED)
        finally:
            os._exit(ExitCode.STALLED)

    timer = threading.Timer(JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(cluster: Cluster | None, code: object) -> None:
    # Launchers end the other processes as soon as one has left with an error: each still exits with its own code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if cluster is not None:
        cluster.stop()
    sys.exit(code)  # type: ignore[arg-type]


def _wait_for_report(code: ExitCode) -> None:
    """Leave time for another process to print the error. If the launcher ends this one meanwhile, exit with `code`."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(REPORT_SECONDS)


def abort_for(error: BaseException) -> NoReturn:
    """Print an error of this rank alone, which is being handled, and end the whole job."""
    if isinstance(error, LockstepError):
        abort(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        abort("interrupted", ExitCode.INTERRUPTED)
    # A HorovodInternalError mostly follows from another rank's error, which should be printed first.
    delay = 2.0 if type(error).__name__ == "HorovodInternalError" else 0.0
    abort(f"\n{traceback.format_exc()}", ExitCode.BUG, delay)


def abort(message: str, code: ExitCode, delay_seconds: float = 0.0) -> NoReturn:
    """Print this rank's `message` and end the whole job.

    When several ranks fail at once, only the lowest of them should print: each waits a little longer than the one
    before it (1.0 s for rank 15, 3.0 s for rank 4095), and the first one's abort ends the others.
    """
    rank = rank_in_job()  # asked for now: it changes in an elastic job
    time.sleep(delay_seconds + 0.25 * math.log2(1 + rank))
    tell(f"rank {rank}: {message}")
    abort_job(code)
    sys.exit(code)


def tell(message: str) -> None:
    """Print one message for the user, on standard error."""
    print(f"lockstep: {message.rstrip()}", file=sys.stderr, flush=True)
