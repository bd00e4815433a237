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

from lockstep.comm.cluster import Cluster
from lockstep.comm.mpi_library import abort_job, rank_in_job, size_of_job
from lockstep.runtime.errors import ExitCode, LockstepError
from lockstep.runtime.hints import suggest
from lockstep.runtime.launcher import detect_launcher, is_speaker, ranks_are_lost

SECONDS_TO_MEET = 300.0
SECONDS_TO_SPEAK = 3.0  # for one of several that MPI knows nothing of: the first to leave makes a launcher end the rest


def run_program(main: Callable[[Cluster], None]) -> None:
    """Collective: run `main` on every rank and exit; an error on any rank is told once and ends all ranks."""
    cluster: Cluster | None = None
    try:
        with _deadline_to_meet():
            cluster = Cluster.start()
        main(cluster)
    except SystemExit as request:  # --help and --print_config, agreed by all ranks
        _leave(cluster, request.code)
    except LockstepError as error:
        if not error.shared:
            _abort(str(error), error.exit_code)
        launcher = detect_launcher(os.environ)
        if is_speaker(launcher, rank_in_job(), size_of_job()):
            tell(str(error))
        elif ranks_are_lost(launcher, size_of_job()):
            _let_another_speak(error.exit_code)
        _leave(cluster, error.exit_code)
    except KeyboardInterrupt:
        _abort("interrupted", ExitCode.INTERRUPTED)
    except BaseException as error:
        delay = 2.0 if type(error).__name__ == "HorovodInternalError" else 0.0  # the echo of another rank's failure
        _abort(f"\n{traceback.format_exc()}", ExitCode.BUG, delay)
    else:
        _leave(cluster, ExitCode.DONE)


@contextlib.contextmanager
def _deadline_to_meet() -> Iterator[None]:
    """The ranks must come together in time; after that the run's own watchdog sees to it that they get on."""

    def give_up() -> None:
        doctor = suggest("doctor")
        why = f"the ranks have not all come together within {SECONDS_TO_MEET:.0f} s; {doctor} tells why"
        try:
            _abort(f"{platform.node()}: {why}", ExitCode.STALLED)
        finally:
            os._exit(ExitCode.STALLED)

    timer = threading.Timer(SECONDS_TO_MEET, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(cluster: Cluster | None, code: object) -> None:
    # A launcher that ends the rest as soon as one has left with an error: each still leaves with its own code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if cluster is not None:
        cluster.stop()
    sys.exit(code)  # type: ignore[arg-type]


def _let_another_speak(code: ExitCode) -> None:
    """A launcher that ends all processes as soon as one has left ends this one with its own code."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(SECONDS_TO_SPEAK)


def _abort(message: str, code: ExitCode, delay_seconds: float = 0.0) -> None:
    """Tell this rank's `message` and end the whole job.

    When several ranks fail at once, the lowest of them speaks and its abort silences the others: each waits a little
    longer than the one before it (1.0 s for rank 15, 3.0 s for rank 4095).
    """
    rank = rank_in_job()  # now: that of an elastic job may have changed
    time.sleep(delay_seconds + 0.25 * math.log2(1 + rank))
    tell(f"rank {rank}: {message}")
    abort_job(code)
    sys.exit(code)


def tell(message: str) -> None:
    """One message to the person, on standard error."""
    print(f"lockstep: {message.rstrip()}", file=sys.stderr, flush=True)
