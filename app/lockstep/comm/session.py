"""A cluster inside a user's own program: errors are raised instead of ending the process, and its state is restored."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from lockstep.comm.cluster import Cluster  # isort: skip  MPI before Horovod
import torch

from lockstep.comm.horovod_library import horovod_runs, stop_horovod
from lockstep.comm.mpi_library import MPI, size_of_job
from lockstep.comm.program import abort_for, deadline_to_join
from lockstep.comm.rendezvous import is_elastic
from lockstep.comm.stop import SIGNALS
from lockstep.runtime.affinity import allowed_cpus, pin_all_threads
from lockstep.runtime.errors import LockstepError, SettingsError, StalledError
from lockstep.runtime.launcher import detect_launcher

STALL_SIGNAL = signal.SIGALRM  # carries a stall from the watchdog's thread to the main thread

_gloo_has_run = False


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
