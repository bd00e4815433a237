"""Work in a process of its own, with a deadline: whatever hangs there (MPI, a file system) hangs without us."""

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

LAST_WORDS_BYTES = 2000
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Aside:
    """A forked copy of this process that is at one task, and with which it exchanges objects.

    It is made before this process has threads. It keeps open what it has inherited (Hydra and srun tell a process its
    rank through a descriptor), but has no part in this process's output: a launcher waits for all who hold that.
    """

    def __init__(self, task: Callable[[Connection], object]) -> None:
        """
        Args:
            task: is given the other end of the line.
        """
        self._line, its_line = Pipe()
        self._stderr = os.memfd_create("stderr")
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _work(task, its_line, self._stderr)
        its_line.close()

    def receive(self, seconds: float) -> Any:
        """The next object that it sends.

        Raises:
            TimeoutError: none came in time.
            EOFError: it has ended.
        """
        if not self._line.poll(max(0.0, seconds)):
            raise TimeoutError
        return self._line.recv()

    def send(self, value: object) -> None:
        """Raises OSError if it has ended."""
        self._line.send(value)

    def last_words(self) -> str:
        """The end of what it has written to standard error."""
        size = os.fstat(self._stderr).st_size
        return os.pread(self._stderr, LAST_WORDS_BYTES, max(0, size - LAST_WORDS_BYTES)).decode(errors="replace")

    def end(self, seconds: float = 0.0) -> None:
        """Kill it, if it does not end in time. One that waits for a disk cannot be killed, and is left to itself."""
        deadline = time.monotonic() + seconds
        with suppress(ChildProcessError):
            while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
                if time.monotonic() >= deadline:
                    os.kill(self._pid, signal.SIGKILL)
                    break
                time.sleep(0.005)
        self._line.close()


def _work(task: Callable[[Connection], object], line: Connection, stderr: int) -> NoReturn:
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the one that asked
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(stderr, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        task(line)
    except BaseException:
        # Not by sys.excepthook, which ends the whole job once MPI is there.
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(0)
