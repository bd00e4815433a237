"""Messages between ranks that give up at a deadline, and that sleep while they wait, so as not to disturb what is
being measured. MPI's own calls do neither.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.comm.mpi_library import MPI

SECONDS_A_LOOK = 0.001


class MissingError(TimeoutError):
    """Ranks from which nothing came in time.

    Attributes:
        ranks: who.
        found: what came from the others, by rank.
    """

    def __init__(self, ranks: Sequence[int], found: Mapping[int, Any] | None = None) -> None:
        super().__init__(f"nothing came from ranks {list(ranks)}")
        self.ranks = ranks
        self.found = found or {}


class Quiet:
    """What some ranks tell each other. All of it raises MissingError, and then MPI must not be finalized: what was
    begun is still under way.
    """

    def __init__(self, members: Sequence[int], tag: int, deadline: float) -> None:
        """
        Args:
            members: the ranks; the first of them is where all comes together.
            tag: of all messages between them.
            deadline: as `time.monotonic` counts.
        """
        self._members, self._tag, self._deadline = members, tag, deadline
        self._rank = MPI.COMM_WORLD.rank
        self._sent: list[MPI.Request] = []

    @property
    def is_first(self) -> bool:
        return self._rank == self._members[0]

    def gather(self, value: Any) -> dict[int, Any]:
        """Collective: every member's value, by rank, on the first one; elsewhere nothing."""
        if not self.is_first:
            self._send(value, self._members[0])
            return {}
        found = {self._rank: value}
        missing = list(self._members[1:])
        while missing:
            here = [rank for rank in missing if MPI.COMM_WORLD.iprobe(rank, self._tag)]
            found.update((rank, MPI.COMM_WORLD.recv(source=rank, tag=self._tag)) for rank in here)
            missing = [rank for rank in missing if rank not in found]
            if not here:
                self._sleep(missing, found)
        return found

    def tell(self, value: Any = None) -> Any:
        """Collective: the first one's value, on every member."""
        first = self._members[0]
        if self.is_first:
            for rank in self._members[1:]:
                self._send(value, rank)
            return value
        while not MPI.COMM_WORLD.iprobe(first, self._tag):
            self._sleep([first])
        return MPI.COMM_WORLD.recv(source=first, tag=self._tag)

    def meet(self) -> None:
        """Collective: wait for every member."""
        self.gather(None)
        self.tell()

    def finish(self) -> None:
        """Until what this rank has sent has left."""
        for request in self._sent:
            while not request.test()[0]:
                self._sleep([])

    def _send(self, value: Any, rank: int) -> None:
        self._sent.append(MPI.COMM_WORLD.isend(value, rank, self._tag))

    def _sleep(self, missing: Sequence[int], found: Mapping[int, Any] | None = None) -> None:
        if time.monotonic() > self._deadline:
            raise MissingError(missing, found)
        time.sleep(SECONDS_A_LOOK)


def spin(requests: Sequence[MPI.Request], other: int, deadline: float) -> None:
    """Until all are done, as soon as can be. Raises MissingError."""
    while not MPI.Request.Testall(requests):
        if time.monotonic() > deadline:
            raise MissingError([other])
        os.sched_yield()
