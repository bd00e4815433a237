"""Who has finished a piece of work first: told by messages, while the others are still at it."""

from lockstep.comm.cluster import Cluster

TAG = 4
WHY_MPI = "ppo.preemption_threshold is set: ranks tell each other when they have finished"


class RolloutPreemption:
    """One round after the other: each rank works, asks now and then how many have finished, and finishes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._messages = cluster.require_mpi(WHY_MPI)
        self._results: dict[int, int] = {}

    def num_finished(self) -> int:
        """How many other ranks have finished this round, as far as is known here. Not a collective, and no wait."""
        while self._messages.has_object(TAG):
            self._receive()
        return len(self._results)

    def finish(self, result: int) -> list[int]:
        """Collective: tell all others, wait for them, and give every rank's result, in the order of the ranks.

        The next round must begin with another collective, so that no message of it comes too early.
        """
        others = [rank for rank in range(self._cluster.size) if rank != self._cluster.rank]
        sent = [self._messages.begin_send_object(result, rank, TAG) for rank in others]
        with self._cluster.recorder.waiting("the others' finish"):
            while len(self._results) < len(others):
                self._receive()
        for wait in sent:
            wait()
        results = {**self._results, self._cluster.rank: result}
        self._results = {}
        return [results[rank] for rank in range(self._cluster.size)]

    def _receive(self) -> None:
        rank, result = self._messages.receive_object(TAG)
        self._results[rank] = result
