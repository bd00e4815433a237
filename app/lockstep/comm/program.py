"""How every Lockstep program begins and ends: join the job, run, and leave it with one message and one exit code.

Inside a user's own program there is a session instead: errors are raised, and the process is restored.
"""

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
from types import FrameType
from typing import NoReturn

import torch

from lockstep.comm.cluster import Cluster
from lockstep.comm.horovod_library import horovod_runs, stop_horovod
from lockstep.comm.mpi_library import MPI, abort_job, rank_in_job, size_of_job
from lockstep.comm.rendezvous import is_elastic
from lockstep.comm.stop import SIGNALS
from lockstep.runtime.affinity import allowed_cpus, pin_all_threads
from lockstep.runtime.command_line import suggest
from lockstep.runtime.errors import ExitCode, LockstepError, SettingsError, StalledError
from lockstep.runtime.launcher import detect_launcher, mpi_misses_processes, reports_errors
from lockstep.runtime.user_code import is_theirs, where

JOIN_SECONDS = 300.0
REPORT_SECONDS = 3.0  # for the process that prints an error: launchers end all processes as soon as one has left
STALL_SIGNAL = signal.SIGALRM  # carries a stall from the watchdog's thread to the main thread

_gloo_has_run = False


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
    if isinstance(error, Exception) and is_theirs(error):
        abort(f"an error in your own code: {where(error)}", ExitCode.USER_CODE)
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


# -- inside a user's own program ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def session() -> Iterator[Cluster]:
    """Collective: the cluster of all ranks of this job, as long as the context lasts. MPI is not finalised.

    On leaving, Horovod is stopped, and the process is restored (see `restored_process`).

    Raises:
        LockstepError: as raised inside. In a job of several ranks an error that only this rank has cannot be raised,
            because the others would wait for it in a collective: its message is printed, and the job is aborted.
        SettingsError: a session within another one, or a second one of a Gloo job, whose ranks cannot meet again.
    """
    _check_start()
    with restored_process():
        cluster = None
        try:
            with deadline_to_join():
                cluster = Cluster.start()
            yield cluster
        except SystemExit:  # an elastic worker that the others go on without
            raise
        except BaseException as error:
            if _others_wait() and not (isinstance(error, LockstepError) and error.shared):
                abort_for(error)
            raise
        finally:
            if cluster is None:
                stop_horovod()
            else:
                cluster.leave()


def stall_handler(cluster: Cluster) -> Callable[[str], None] | None:
    """What the watchdog calls instead of ending the process: only one rank in its main thread can raise a stall."""
    can_raise = cluster.size == 1 and not cluster.is_elastic and _in_main_thread()
    return _Stall().raise_it if can_raise else None


class _Stall:
    """Raises a StalledError in the main thread, when the watchdog's thread asks for it."""

    def __init__(self) -> None:
        self._text: str | None = None
        self._previous = signal.signal(STALL_SIGNAL, self._raise)

    def raise_it(self, text: str) -> None:
        self._text = text
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, STALL_SIGNAL)  # unlike interrupt_main, it also ends a system call

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._text is not None:
            raise StalledError(self._text)
        if callable(self._previous):  # an alarm of the user's own
            self._previous(number, frame)


def _others_wait() -> bool:
    """Whether there are other ranks, which may wait for this one in a collective."""
    launcher = detect_launcher(os.environ)
    return is_elastic() or size_of_job() > 1 or (launcher.is_gloo and launcher.size > 1)


def _check_start() -> None:
    global _gloo_has_run  # a fact of the process
    if MPI.Is_finalized():
        raise SettingsError("MPI is finalised in this process: no run can begin in it").as_shared()
    if horovod_runs():
        message = "Horovod runs in this process already: end that run first, or leave the cluster that was started"
        raise SettingsError(message).as_shared()
    if detect_launcher(os.environ).is_gloo:
        if _gloo_has_run:
            message = "this job was started by Gloo, whose ranks can meet once only: for several runs use mpirun"
            raise SettingsError(message).as_shared()
        _gloo_has_run = True


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    """Restore on leaving what a run changes in the process: signal handlers, CPU binding, the number of threads,
    deterministic mode, random state and environment.
    """
    environment, cpus, num_threads = dict(os.environ), allowed_cpus(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, allow_tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, STALL_SIGNAL)}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        if allowed_cpus() != cpus:
            pin_all_threads(cpus)
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns_only)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, allow_tf32
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if _in_main_thread():  # last: until here a second Ctrl-C leaves at once
            for number, handler in handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
