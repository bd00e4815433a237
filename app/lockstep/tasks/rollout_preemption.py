"""Preemption of slow ranks (Wijmans et al. 2020): ranks tell each other by messages when their rollout is complete."""

from lockstep.comm.cluster import Cluster

TAG = 4
WHY_MPI = "ppo.preemption_threshold is set: ranks tell each other when they have finished"


class RolloutPreemption:
    """Counts, round by round, the ranks that have finished, while the others still work.

    In each round a rank works, calls `num_finished` now and then, and in the end calls `finish` once.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._messages = cluster.require_mpi(WHY_MPI)
        self._results: dict[int, int] = {}

    def num_finished(self) -> int:
        """Count the other ranks that are known to have finished this round. Not a collective, and does not wait."""
        while self._messages.has_object(TAG):
            self._receive()
        return len(self._results)

    def finish(self, result: int) -> list[int]:
        """Collective: send `result` to all other ranks and wait for theirs; returns all results by rank.

        Another collective must come before the next round, so that none of its messages arrives in this one.
        """
        others = [rank for rank in range(self._cluster.size) if rank != self._cluster.rank]
        sent = [self._messages.begin_send_object(result, rank, TAG) for rank in others]
        with self._cluster.recorder.waiting("the other ranks to finish"):
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
