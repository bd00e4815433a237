"""All ranks of one job: how it starts, is split and ends.

Beside this file only collectives.py, the backends, horovod_library.py and elastic.py import Horovod.
"""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lockstep.comm.mpi_library import MPI, mpi_version  # isort: skip  before Horovod
import horovod.torch as hvd
import torch

from lockstep.comm.backend import GlooBackend, MpiBackend
from lockstep.comm.collectives import Collectives
from lockstep.comm.horovod_library import start_horovod
from lockstep.comm.messages import Messages
from lockstep.comm.rendezvous import is_elastic, rank_from_environment, wait_for_workers
from lockstep.runtime.affinity import allowed_cpus, pin_all_threads
from lockstep.runtime.devices import bind_to_cores, check_gpus, choose_device, gpu_name
from lockstep.runtime.errors import ExitCode, SettingsError
from lockstep.runtime.flight_recorder import FlightRecorder
from lockstep.runtime.installation import read_installation
from lockstep.runtime.launcher import check_launcher, detect_launcher, missing_launcher_warning
from lockstep.runtime.resources import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Cluster(Collectives):
    """All ranks of the job, and the collectives over them.

    Attributes:
        local_rank: 0 ... local_size - 1 on this node.
        local_size: the number of ranks on this node.
        is_elastic: ranks may be lost or added while the job runs: see elastic.py.

    A cluster that `split` returns numbers its own ranks from 0; its collectives are over those ranks alone.
    """

    local_rank: int
    local_size: int
    is_elastic: bool = False

    @staticmethod
    def start() -> "Cluster":
        """Collective: join the job that a launcher started, or be its only rank, on cores and a GPU of its own."""
        keep_freed_memory()
        num_mpi_ranks = MPI.COMM_WORLD.size
        launcher = detect_launcher(os.environ)
        check_launcher(launcher, num_mpi_ranks, mpi_version(), read_installation().mpirun)
        if remark := missing_launcher_warning(launcher, num_mpi_ranks):
            print(remark, file=sys.stderr, flush=True)
        return Cluster._start_gloo() if launcher.is_gloo else Cluster._start_mpi()

    @staticmethod
    def _start_mpi() -> "Cluster":
        mpi = MPI.COMM_WORLD
        if mpi.size > 1 and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            message = (
                "MPI was initialised without THREAD_MULTIPLE, which Horovod's thread needs: let mpi4py initialise it"
            )
            raise SettingsError(message).as_shared()
        node = mpi.Split_type(MPI.COMM_TYPE_SHARED)
        device = choose_device(node.allgather, node.rank, with_gpus=hvd.nccl_built())
        bind_to_cores(node.allgather, node.rank, device)  # before Horovod's thread starts, which inherits the binding
        start_horovod(device)
        if hvd.size() != mpi.size:
            if hvd.rank() != 0:
                sys.exit(ExitCode.SETTINGS)
            raise SettingsError(
                f"Horovod sees {hvd.size()} ranks and MPI sees {mpi.size}: the launcher is not of the MPI that "
                f"Lockstep was built with ({mpi_version()}). Use that MPI's mpirun, or horovodrun without --gloo."
            ).as_shared()
        check_gpus(mpi.allgather(gpu_name(device, MPI.Get_processor_name())))
        return Cluster(backend=MpiBackend(mpi), device=device, local_rank=node.rank, local_size=node.size)

    @staticmethod
    def _start_gloo() -> "Cluster":
        elastic = is_elastic()
        if elastic:
            wait_for_workers()
        local_rank = int(os.environ["HOROVOD_LOCAL_RANK"])
        # The other ranks cannot be asked before Horovod runs: assume that all ranks of a node see the same GPUs.
        device = choose_device(lambda mine: [mine] * (local_rank + 1), local_rank, with_gpus=hvd.nccl_built())
        backend = GlooBackend(lambda: start_horovod(device))
        cluster = Cluster(
            backend=backend, device=device, local_rank=local_rank, local_size=hvd.local_size(), is_elastic=elastic
        )
        return cluster if elastic else cluster.bind_to_cores()  # each elastic generation binds anew

    def next_generation(self) -> "Cluster":
        """Collective over the workers that are left and the new ones: the cluster of the next elastic generation.

        Raises:
            SystemExit: the others go on without this worker.
        """
        self.backend.disconnect()
        wait_for_workers(needs_rank=True)
        with rank_from_environment():
            backend = GlooBackend(lambda: start_horovod(self.device))
        return replace(self, backend=backend, recorder=FlightRecorder())

    def bind_to_cores(self) -> "Cluster":
        """Collective, of a Gloo job: bind this rank to its share of the cores of its node."""
        node = platform.node()
        ranks_here = [rank for rank, other in enumerate(self.all_gather_object(node)) if other == node]
        local_rank = ranks_here.index(self.rank)

        def all_gather(value: Any) -> list[Any]:
            values = self.all_gather_object(value)
            return [values[rank] for rank in ranks_here]

        bind_to_cores(all_gather, local_rank, self.device)
        pin_all_threads(allowed_cpus())  # Horovod's thread runs already
        check_gpus(self.all_gather_object(gpu_name(self.device, node)))
        return replace(self, local_rank=local_rank, local_size=len(ranks_here))

    @staticmethod
    def alone() -> "Cluster":
        """A cluster of this rank only, in any job: for a reference computation without the other ranks."""
        return Cluster(backend=MpiBackend(MPI.COMM_SELF), device=torch.device("cpu"), local_rank=0, local_size=1)

    def split(self, groups: Sequence[Sequence[int]]) -> "Cluster":
        """Collective: the cluster of the ranks in my group; every rank is in one of `groups`, which are equally large.

        Horovod is restarted with a process set for each group: sets that are added to a running Horovod cost a
        collective in each of its cycles. Clusters of an earlier split become invalid.
        """
        mpi = self._require_mpi("a group of ranks talks among itself")
        group = next(group for group in groups if self.rank in group)
        process_set = hvd.global_process_set
        if 1 < len(group) < self.size:
            sets = [hvd.ProcessSet(list(ranks)) for ranks in groups]
            self.backend.disconnect()
            start_horovod(self.device, sets)
            process_set = sets[list(groups).index(group)]
        backend = MpiBackend(MPI.Intracomm(mpi.Split(min(group), self.rank)))
        return replace(self, backend=backend, process_set=process_set)

    def require_mpi(self, why: str) -> Messages:
        """Messages between two ranks, which only MPI has.

        Raises:
            SettingsError: on every rank: this is a Gloo job; `why` says what needs MPI.
        """
        return Messages(self._require_mpi(why), self.recorder)

    def _require_mpi(self, why: str) -> MPI.Intracomm:
        if self.backend.mpi is None:
            message = f"{why}, which needs MPI: start this with mpirun, or with horovodrun without --gloo"
            raise SettingsError(message).as_shared()
        return self.backend.mpi

    def leave(self) -> None:
        """Collective: stop Horovod when every rank is ready to. With MPI, `start` can be called again."""
        self.backend.leave()

    def stop(self) -> None:
        """Collective: leave the job for good."""
        self.leave()
        MPI.Finalize()

    @contextmanager
    def without_horovod(self) -> Iterator[None]:
        """Collective: stop Horovod and its thread inside the context, to measure without them."""
        self._require_mpi("to measure without Horovod, the ranks must meet without it")
        self.backend.disconnect()
        yield
        self.barrier()
        start_horovod(self.device)

    def prepare_timeline(self) -> None:
        """Collective: restart Horovod such that `start_timeline` can be called later. The timeline's writer keeps a
        thread of rank 0 until the end. Does nothing in Gloo jobs, which cannot restart Horovod.

        Raises:
            SettingsError: on every rank: HOROVOD_TIMELINE is set, so that Horovod already writes one.
        """
        self.on_root(_check_timeline)
        if self.backend.can_restart and self.size > 1:
            self.backend.disconnect()
            os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"
            start_horovod(self.device)

    def start_timeline(self, file: Path) -> None:
        """Write to `file`, on rank 0, what Horovod does with each tensor and when each rank had it ready, if
        `prepare_timeline` was called. Not a collective.
        """
        if self.is_root and "HOROVOD_TIMELINE" in os.environ:
            hvd.start_timeline(str(file))

    def stop_timeline(self) -> None:
        """Complete the timeline's file. Not a collective."""
        if self.is_root and "HOROVOD_TIMELINE" in os.environ:
            hvd.stop_timeline()


def _check_timeline() -> None:
    if "HOROVOD_TIMELINE" in os.environ:
        raise SettingsError("profile is set, and so is HOROVOD_TIMELINE: Horovod keeps one timeline; leave one out")
