"""Elastic jobs, whose workers come and go: `horovodrun --min-np 2 --max-np 3 --host-discovery-script ./hosts.sh ...`.

A *generation* is the workers that train together until one of them is lost or the launcher has found others; those who
are left, and whoever is new, are the next one. A process that stays goes on in memory. The machinery is Horovod's.
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

CUT_SHORT = (HorovodInternalError, HostsUpdatedInterrupt)
"""What is raised on each rank of a generation that is no more: in a collective, or between two updates."""


class HostUpdates(State):  # type: ignore[misc]
    """What the launcher has told this worker of hosts that it has found, or lost, since the generation was made up.

    Nothing of the run is saved or restored here: an update that fails has not changed the model yet.
    """

    def __init__(self) -> None:
        super().__init__(bcast_object=None, get_rank=None)

    @property
    def is_any(self) -> bool:
        return not self._host_messages.empty()

    def forget(self) -> None:
        """A generation is about to be made up of all the hosts that there are."""
        while self.is_any:
            self._host_messages.get()

    def save(self) -> None:
        pass

    def restore(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def on_reset(self) -> None:
        """Not Horovod's own, which would forget what came while the generation was made up."""


class GenerationVote(StopVote):
    """A vote that also ends the work of a generation, when hosts have come or gone."""

    def __init__(self, cluster: Cluster, requests: StopRequests, end_time: float | None, hosts: HostUpdates) -> None:
        super().__init__(cluster, requests, end_time)
        self._hosts = hosts

    def _wish(self, seconds_to_save: float) -> int:
        return super()._wish(seconds_to_save) or (HOSTS_CHANGED if self._hosts.is_any else 0)

    def _reason_of(self, agreed: int) -> str:
        """Raises HostsUpdatedInterrupt on every rank, between two updates, where the next generation takes over."""
        if agreed == HOSTS_CHANGED:
            raise HostsUpdatedInterrupt(skip_sync=False)
        return super()._reason_of(agreed)


def run_elastic(first: Cluster, train: Callable[[Cluster, HostUpdates], None], leave: Callable[[], None]) -> None:
    """Collective over whoever is there: call `train` with one generation after the other, until it returns.

    Args:
        first: this worker among those it was started with.
        leave: called when a generation is no more.

    Raises:
        SystemExit: the others go on without this worker.
    """
    cluster = first
    cpus = allowed_cpus()
    hosts = HostUpdates()
    mates: list[psutil.Process] = []

    def train_one_generation(hosts: HostUpdates) -> None:
        nonlocal mates
        pin_all_threads(cpus)  # the generation before was another number of ranks
        mates = _on_this_node(cluster.all_gather_object((platform.node(), os.getpid())))
        train(cluster.bind_to_cores(), hosts)

    def begin_next_generation() -> None:
        nonlocal cluster
        leave()
        hosts.forget()
        _end_stopped(mates)
        cluster = cluster.next_generation()

    run_fn(train_one_generation, begin_next_generation)(hosts)


def _on_this_node(workers: Sequence[tuple[str, int]]) -> list[psutil.Process]:
    """Those of `workers`, (node, process id), that are here and alive."""
    found = []
    for node, pid in workers:
        if node == platform.node():
            with suppress(psutil.Error):
                found.append(psutil.Process(pid))
    return found


def _end_stopped(workers: Sequence[psutil.Process]) -> None:
    """A worker that was stopped (SIGSTOP) is neither dead nor alive: the others would wait for it for ever."""
    for worker in workers:
        with suppress(psutil.Error):
            if worker.status() == psutil.STATUS_STOPPED:
                print(f"lockstep: process {worker.pid} is stopped, and is ended", file=sys.stderr, flush=True)
                worker.kill()
