"""Votes of all ranks to stop between two updates, because of a signal or because the job's time ends.

A signal handler only sets a flag; the run saves after the update. Without any signal, a run that knows when its job
ends stops early enough to save by itself.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from lockstep.runtime.errors import LockstepError

if TYPE_CHECKING:
    from lockstep.comm.cluster import Cluster

# The largest vote wins: a signal over the end of time, and both over hosts that were found or lost (elastic.py).
HOSTS_CHANGED, END_OF_TIME, SIGNALLED = 1, 2, 3  # the last one plus the signal's number
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
END_TIME_VARIABLES = ("SLURM_JOB_END_TIME", "LOCKSTEP_JOB_END_TIME")  # Slurm's own (since 23.02); slurm/common.sh's


class StopRequests:
    """The stop signals that this process receives from now on. A second Ctrl-C ends the process at once."""

    def __init__(self, say: Callable[[str], object] = lambda _: None) -> None:
        """
        Args:
            say: prints a message for the user who has pressed Ctrl-C.
        """
        self.received = 0
        self._say = say
        if threading.current_thread() is threading.main_thread():  # no other thread can handle signals
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = max(self.received, number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._say("saving after this update, then leaving; Ctrl-C again leaves at once")


class StopVote:
    """One vote of all ranks for each update. No rank waits for it: it is started after one update and read after the
    next, when every rank has long cast its vote.
    """

    def __init__(self, cluster: "Cluster", requests: StopRequests, end_time: float | None) -> None:
        """
        Args:
            end_time: when the job ends, in seconds since the epoch.
        """
        self._cluster = cluster
        self._requests = requests
        self._end_time = end_time
        self._pending: Callable[[], int] | None = None
        self._last_boundary = 0.0
        self._longest_update = 0.0

    def reason(self, seconds_to_save: float) -> str | None:
        """Collective, after each update: why all ranks stop here; None if they go on.

        Args:
            seconds_to_save: how long this rank takes to save and leave.
        """
        now = time.time()
        if self._last_boundary:
            self._longest_update = max(self._longest_update, now - self._last_boundary)
        self._last_boundary = now
        agreed = self.close()
        if agreed:
            return self._reason_of(agreed)
        self._pending = self._cluster.begin_max(self._own_vote(seconds_to_save))
        return None

    def close(self) -> int:
        """Collective: read the pending vote, if there is one; its result, or 0."""
        pending, self._pending = self._pending, None
        return pending() if pending else 0

    def _reason_of(self, agreed: int) -> str:
        return "the end of the job's time" if agreed == END_OF_TIME else signal.Signals(agreed - SIGNALLED).name

    def _own_vote(self, seconds_to_save: float) -> int:
        if self._requests.received:
            return SIGNALLED + self._requests.received
        if self._end_time is None:
            return 0
        # This vote is read after the next update. If it is still 0, the next vote is read after two.
        seconds_needed = 2 * self._longest_update + seconds_to_save
        return END_OF_TIME if time.time() + seconds_needed >= self._end_time else 0


@contextmanager
def closing_vote(stop: StopVote | None) -> Iterator[None]:
    """Read the pending vote when all ranks leave the context together."""
    try:
        yield
    except LockstepError as error:
        if stop and error.shared:
            stop.close()
        raise
    if stop:
        stop.close()


def end_time(after_minutes: float | None, started: float, environment: Mapping[str, str] | None = None) -> float | None:
    """When this run must end: at the end of its job or `after_minutes`, whichever is earlier; None without either.

    Args:
        started: when the run began, in seconds since the epoch, like the result.
    """
    environment = os.environ if environment is None else environment
    end_times = [environment[name] for name in END_TIME_VARIABLES if environment.get(name, "").isdigit()]
    ends = [float(end_times[0])] if end_times else []
    ends += [started + 60 * after_minutes] if after_minutes is not None else []
    return min(ends, default=None)
