"""A cluster inside a user's own program: errors are raised instead of ending the process, and its state is restored."""

import contextlib
import faulthandler
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from lockstep.comm.cluster import Cluster  # isort: skip  MPI before Horovod
import torch

from lockstep.comm.mpi_library import MPI
from lockstep.comm.program import abort, deadline_to_join
from lockstep.comm.stop import SIGNALS
from lockstep.runtime.affinity import allowed_cpus, pin_all_threads
from lockstep.runtime.errors import ExitCode, LockstepError, SettingsError, StalledError
from lockstep.runtime.launcher import detect_launcher

STALL_SIGNAL = signal.SIGALRM  # carries a stall from the watchdog's thread to the main thread

_gloo_has_run = False


@contextlib.contextmanager
def session() -> Iterator[Cluster]:
    """Collective: the cluster of all ranks of this job, as long as the context lasts. MPI is not finalised.

    On leaving, Horovod is stopped, and signal handlers, CPU binding, the number of threads, deterministic mode, random
    state and environment are what they were before.

    Raises:
        LockstepError: as raised inside. In a job of several ranks an error that only this rank has cannot be raised,
            because the others would wait for it in a collective: its message is printed, and the job is aborted.
        SettingsError: a second session of a Gloo job, whose ranks cannot meet again.
    """
    _check_start()
    with _restored_process():
        with deadline_to_join():
            cluster = Cluster.start()
        try:
            yield cluster
        except LockstepError as error:
            if cluster.size > 1 and not error.shared:
                abort(str(error), error.exit_code)
            raise
        except BaseException:
            if cluster.size > 1:
                abort(f"\n{traceback.format_exc()}", ExitCode.BUG)
            raise
        finally:
            cluster.leave()


def stall_handler(cluster: Cluster) -> Callable[[str], None] | None:
    """What the watchdog calls instead of ending the process: only one rank in its main thread can raise a stall."""
    return _Stall().raise_it if cluster.size == 1 and _in_main_thread() else None


class _Stall:
    """Raises a StalledError in the main thread, when the watchdog's thread asks for it."""

    def __init__(self) -> None:
        self._text = ""
        signal.signal(STALL_SIGNAL, self._raise)

    def raise_it(self, text: str) -> None:
        self._text = text
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        signal.pthread_kill(main_thread, STALL_SIGNAL)  # unlike interrupt_main, it also ends a system call

    def _raise(self, _: int, __: FrameType | None) -> None:
        raise StalledError(self._text)


def _check_start() -> None:
    global _gloo_has_run  # a fact of the process
    if MPI.Is_finalized():
        raise SettingsError("MPI is finalised in this process: no run can begin in it").as_shared()
    if detect_launcher(os.environ).is_gloo:
        if _gloo_has_run:
            message = "this job was started by Gloo, whose ranks can meet once only: for several runs use mpirun"
            raise SettingsError(message).as_shared()
        _gloo_has_run = True


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def _restored_process() -> Iterator[None]:
    """Restore on leaving what a run changes in the process."""
    environment, cpus, num_threads = dict(os.environ), allowed_cpus(), torch.get_num_threads()
    deterministic, random_state = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    benchmark, allow_tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, STALL_SIGNAL)}
    try:
        yield
    finally:
        if _in_main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        faulthandler.unregister(signal.SIGUSR2)  # the watchdog's
        pin_all_threads(cpus)
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, allow_tf32
        torch.set_rng_state(random_state)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
