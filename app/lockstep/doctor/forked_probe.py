"""Run a task in a forked process with a deadline, so that a hanging MPI or file system cannot block the caller."""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

LAST_OUTPUT_BYTES = 2000
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ForkedProbe:
    """A forked copy of this process that runs one task and exchanges objects with this one over a pipe.

    Create it before this process has threads. The child keeps all inherited file descriptors open (Hydra and srun tell
    a process its rank through one) except standard output and error: a launcher waits until these are closed.
    """

    def __init__(self, task: Callable[[Connection], object]) -> None:
        """
        Args:
            task: gets the child's end of the pipe.
        """
        self._connection, child_connection = Pipe()
        self._stderr = os.memfd_create("stderr")
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _run(task, child_connection, self._stderr)
        child_connection.close()

    def receive(self, seconds: float) -> Any:
        """Return the next object that the child sends.

        Raises:
            TimeoutError: none came within `seconds`.
            EOFError: the child has ended.
        """
        if not self._connection.poll(max(0.0, seconds)):
            raise TimeoutError
        return self._connection.recv()

    def send(self, value: object) -> None:
        """Send `value` to the child. Raises OSError if it has ended."""
        self._connection.send(value)

    def last_output(self) -> str:
        """The end of the child's standard error."""
        size = os.fstat(self._stderr).st_size
        return os.pread(self._stderr, LAST_OUTPUT_BYTES, max(0, size - LAST_OUTPUT_BYTES)).decode(errors="replace")

    def end(self, seconds: float = 0.0) -> None:
        """Wait `seconds` for the child to end, then kill it.

        A child that is blocked in disk I/O cannot be killed; it is not waited for.
        """
        deadline = time.monotonic() + seconds
        with suppress(ChildProcessError):
            while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
                if time.monotonic() >= deadline:
                    os.kill(self._pid, signal.SIGKILL)
                    break
                time.sleep(0.005)
        self._connection.close()


def _run(task: Callable[[Connection], object], connection: Connection, stderr: int) -> NoReturn:
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # end together with the parent
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(stderr, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        task(connection)
    except BaseException:
        # Not sys.excepthook: once MPI is started, it aborts the whole job.
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(0)
