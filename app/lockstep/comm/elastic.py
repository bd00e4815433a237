"""Elastic jobs, which lose and gain workers while they run.

    horovodrun --min-np 2 --max-np 3 --host-discovery-script ./hosts.sh ...

A *generation* is the workers that train together until one of them is lost or the launcher has found other hosts. The
workers that are left and the new ones form the next generation. A process that stays keeps its model in memory.
Horovod's `run_fn` calls one generation after the other.
"""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from lockstep.comm.cluster import Cluster  # isort: skip  it imports MPI, before Horovod
import psutil
from horovod.common.elastic import State, run_fn
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

from lockstep.comm.stop import HOSTS_CHANGED, StopRequests, StopVote
from lockstep.runtime.affinity import allowed_cpus, pin_all_threads

GENERATION_ENDED = (HorovodInternalError, HostsUpdatedInterrupt)
"""Raised on each rank when its generation ends: in a collective (rank lost), or between two updates (hosts changed)."""


class HostUpdates(State):  # type: ignore[misc]
    """The launcher's messages to this worker about hosts found or lost since its generation began.

    Saves and restores nothing, unlike Horovod's other states: an update that fails has not changed the model yet.
    """

    def __init__(self) -> None:
        super().__init__(bcast_object=None, get_rank=None)

    @property
    def any_pending(self) -> bool:
        return not self._host_messages.empty()

    def clear(self) -> None:
        """Drop the messages so far: the next generation is formed from all hosts that are known now."""
        while self.any_pending:
            self._host_messages.get()

    def save(self) -> None:
        pass

    def restore(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def on_reset(self) -> None:
        """Overrides Horovod's, which would drop messages that came while the generation was formed."""


class GenerationVote(StopVote):
    """A stop vote that also ends the generation when hosts were found or lost."""

    def __init__(self, cluster: Cluster, requests: StopRequests, end_time: float | None, hosts: HostUpdates) -> None:
        super().__init__(cluster, requests, end_time)
        self._hosts = hosts

    def _own_vote(self, seconds_to_save: float) -> int:
        return super()._own_vote(seconds_to_save) or (HOSTS_CHANGED if self._hosts.any_pending else 0)

    def _reason_of(self, agreed: int) -> str:
        """Raises HostsUpdatedInterrupt on every rank, between two updates, if hosts were found or lost."""
        if agreed == HOSTS_CHANGED:
            raise HostsUpdatedInterrupt(skip_sync=False)
        return super()._reason_of(agreed)


def run_elastic(first: Cluster, train: Callable[[Cluster, HostUpdates], None], leave: Callable[[], None]) -> None:
    """Collective over all workers: call `train` with the cluster of each generation, until it returns.

    Args:
        first: the cluster of the first generation.
        leave: called when a generation has ended.

    Raises:
        SystemExit: the others go on without this worker.
    """
    cluster = first
    cpus = allowed_cpus()
    hosts = HostUpdates()
    workers_here: list[psutil.Process] = []

    def train_one_generation(hosts: HostUpdates) -> None:
        nonlocal workers_here
        pin_all_threads(cpus)  # undo the last generation's binding, for another number of ranks
        workers_here = _on_this_node(cluster.all_gather_object((platform.node(), os.getpid())))
        train(cluster.bind_to_cores(), hosts)

    def begin_next_generation() -> None:
        nonlocal cluster
        leave()
        hosts.clear()
        _kill_suspended(workers_here)
        cluster = cluster.next_generation()

    run_fn(train_one_generation, begin_next_generation)(hosts)


def _on_this_node(workers: Sequence[tuple[str, int]]) -> list[psutil.Process]:
    """The processes of those `workers`, (node, process id), that are alive on this node."""
    found = []
    for node, pid in workers:
        if node == platform.node():
            with suppress(psutil.Error):
                found.append(psutil.Process(pid))
    return found


def _kill_suspended(workers: Sequence[psutil.Process]) -> None:
    """End workers that are suspended (SIGSTOP): they never leave, and the others would wait for them."""
    for worker in workers:
        with suppress(psutil.Error):
            if worker.status() == psutil.STATUS_STOPPED:
                print(f"lockstep: process {worker.pid} is stopped, and is ended", file=sys.stderr, flush=True)
                worker.kill()
