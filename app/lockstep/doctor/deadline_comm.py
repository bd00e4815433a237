"""Messages between ranks that give up at a deadline. MPI's own blocking calls have no timeout.

Waiting sleeps rather than spins, so that it does not disturb what is being measured.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.comm.mpi_library import MPI

SECONDS_BETWEEN_POLLS = 0.001


class MissingRanksError(TimeoutError):
    """Some ranks sent nothing before the deadline.

    Attributes:
        ranks: the silent ranks.
        found: what came from the others, by rank.
    """

    def __init__(self, ranks: Sequence[int], found: Mapping[int, Any] | None = None) -> None:
        super().__init__(f"nothing came from ranks {list(ranks)}")
        self.ranks = ranks
        self.found = found or {}


class DeadlineComm:
    """Collectives among some ranks, with a deadline.

    Every method may raise MissingRanksError. MPI must not be finalized after that: messages are still under way.
    """

    def __init__(self, ranks: Sequence[int], tag: int, deadline: float) -> None:
        """
        Args:
            ranks: the members; the first one is the root.
            tag: the MPI tag of all messages between them.
            deadline: as `time.monotonic` counts.
        """
        self._ranks, self._tag, self._deadline = ranks, tag, deadline
        self._rank = MPI.COMM_WORLD.rank
        self._sent: list[MPI.Request] = []

    @property
    def is_root(self) -> bool:
        return self._rank == self._ranks[0]

    def gather(self, value: Any) -> dict[int, Any]:
        """Collective: return every member's value, by rank, on the root; an empty dict elsewhere."""
        if not self.is_root:
            self._send(value, self._ranks[0])
            return {}
        found = {self._rank: value}
        missing = list(self._ranks[1:])
        while missing:
            arrived = [rank for rank in missing if MPI.COMM_WORLD.iprobe(rank, self._tag)]
            found.update((rank, MPI.COMM_WORLD.recv(source=rank, tag=self._tag)) for rank in arrived)
            missing = [rank for rank in missing if rank not in found]
            if not arrived:
                self._sleep(missing, found)
        return found

    def broadcast(self, value: Any = None) -> Any:
        """Collective: return the root's value on every member."""
        root = self._ranks[0]
        if self.is_root:
            for rank in self._ranks[1:]:
                self._send(value, rank)
            return value
        while not MPI.COMM_WORLD.iprobe(root, self._tag):
            self._sleep([root])
        return MPI.COMM_WORLD.recv(source=root, tag=self._tag)

    def barrier(self) -> None:
        """Collective: wait for every member."""
        self.gather(None)
        self.broadcast()

    def wait_for_sends(self) -> None:
        """Wait until all messages of this rank have been sent."""
        for request in self._sent:
            while not request.test()[0]:
                self._sleep([])

    def _send(self, value: Any, rank: int) -> None:
        self._sent.append(MPI.COMM_WORLD.isend(value, rank, self._tag))

    def _sleep(self, missing: Sequence[int], found: Mapping[int, Any] | None = None) -> None:
        if time.monotonic() > self._deadline:
            raise MissingRanksError(missing, found)
        time.sleep(SECONDS_BETWEEN_POLLS)


def spin_until_done(requests: Sequence[MPI.Request], other: int, deadline: float) -> None:
    """Wait for all `requests` without sleeping, for exact timing. Raises MissingRanksError."""
    while not MPI.Request.Testall(requests):
        if time.monotonic() > deadline:
            raise MissingRanksError([other])
        os.sched_yield()
