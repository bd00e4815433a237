"""Signals and the end of the job's time become one stop, which all ranks agree on between two updates.

A handler only sets a flag: nothing is saved where a signal happens to fall. No signal need come, either: a run knows
when its job ends, and how long it takes to save, and stops early enough by itself.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from lockstep.runtime.errors import LockstepError

if TYPE_CHECKING:
    from lockstep.comm.cluster import Cluster

# In a vote the largest number wins: a signal beats the clock, and that beats hosts that come or go (elastic.py).
HOSTS_CHANGED, END_OF_TIME, SIGNALLED = 1, 2, 3  # the last one plus the signal's number
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
END_TIME_VARIABLES = ("SLURM_JOB_END_TIME", "LOCKSTEP_JOB_END_TIME")  # Slurm's own (since 23.02); slurm/common.sh's


class StopRequests:
    """What this process was asked for by signals, from now on. A second Ctrl-C is no request: it ends the process."""

    def __init__(self, say: Callable[[str], object] = lambda _: None) -> None:
        """
        Args:
            say: to whoever has pressed Ctrl-C.
        """
        self.received = 0
        self._say = say
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = max(self.received, number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._say("saving after this update, then leaving; Ctrl-C again leaves at once")


class StopVote:
    """One vote of all ranks for each update, which costs none of them a wait: it is begun at one boundary between
    updates and read at the next, when every rank has long been there.
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
        """Collective, once an update: why all ranks stop here; None if they go on.

        Args:
            seconds_to_save: what this rank needs to end in good order, from a boundary on.
        """
        now = time.time()
        if self._last_boundary:
            self._longest_update = max(self._longest_update, now - self._last_boundary)
        self._last_boundary = now
        agreed = self.close()
        if agreed:
            return self._reason_of(agreed)
        self._pending = self._cluster.begin_max(self._wish(seconds_to_save))
        return None

    def close(self) -> int:
        """Collective: read the vote that is still out, if there is one."""
        pending, self._pending = self._pending, None
        return pending() if pending else 0

    def _reason_of(self, agreed: int) -> str:
        return "the end of the job's time" if agreed == END_OF_TIME else signal.Signals(agreed - SIGNALLED).name

    def _wish(self, seconds_to_save: float) -> int:
        if self._requests.received:
            return SIGNALLED + self._requests.received
        if self._end_time is None:
            return 0
        # This vote is read after one update; if it came a moment too early, the next one after two.
        seconds_needed = 2 * self._longest_update + seconds_to_save
        return END_OF_TIME if time.time() + seconds_needed >= self._end_time else 0


@contextmanager
def voting(stop: StopVote | None) -> Iterator[None]:
    """When all ranks leave together, the vote that is still out is read first."""
    try:
        yield
    except LockstepError as error:
        if stop and error.shared:
            stop.close()
        raise
    if stop:
        stop.close()


def end_time(after_minutes: float | None, started: float, environment: Mapping[str, str] | None = None) -> float | None:
    """When this run must have ended: when the scheduler ends the job, or `after_minutes`; None if neither is known.

    Args:
        started: seconds since the epoch, as is what is returned.
    """
    environment = os.environ if environment is None else environment
    told = [environment[name] for name in END_TIME_VARIABLES if environment.get(name, "").isdigit()]
    ends = [float(told[0])] if told else []
    ends += [started + 60 * after_minutes] if after_minutes is not None else []
    return min(ends, default=None)
