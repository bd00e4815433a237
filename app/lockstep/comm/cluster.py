"""The ranks of one job: how it begins, is divided and ends.

Beside this file only collectives.py, horovod_library.py, gloo.py and elastic.py import Horovod.
"""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from lockstep.comm.ranks import MPI, mpi_version  # isort: skip  before Horovod
import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from lockstep.comm.collectives import Collectives
from lockstep.comm.gloo import GlooCommunicator
from lockstep.comm.horovod_library import start_horovod
from lockstep.comm.rendezvous import find_place, is_elastic, place_is_known
from lockstep.runtime.affinity import allowed_cpus, pin_all_threads
from lockstep.runtime.devices import bind_to_cores, check_gpus, choose_device, gpu_name
from lockstep.runtime.errors import ExitCode, SettingsError
from lockstep.runtime.flight_recorder import FlightRecorder
from lockstep.runtime.installation import read_installation
from lockstep.runtime.launcher import check_launcher, detect_launcher, remark_on
from lockstep.runtime.memory import keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Cluster(Collectives):
    """This rank's place among all ranks of the job, and the collectives over them.

    Attributes:
        local_rank: 0 ... local_size - 1 on this node.
        local_size: the number of ranks on this node.
        device: where this rank computes.
        is_elastic: other ranks may be lost or added: see elastic.py.

    The ranks of a cluster that `split` gives are counted within it; its collectives are over its ranks alone.
    """

    local_rank: int
    local_size: int
    device: torch.device
    _set: hvd.ProcessSet = field(default=hvd.global_process_set, repr=False)
    is_elastic: bool = False

    @staticmethod
    def start() -> "Cluster":
        """Collective: join the job that a launcher started, or be the only rank; on cores and a GPU of its own."""
        keep_freed_memory()
        mpi = MPI.COMM_WORLD
        launcher = detect_launcher(os.environ)
        check_launcher(launcher, mpi.size, mpi_version(), read_installation().mpirun)
        if remark := remark_on(launcher, mpi.size):
            print(remark, file=sys.stderr, flush=True)
        if launcher.is_gloo:
            cluster = Cluster._join_gloo()
            return cluster if cluster.is_elastic else cluster.settle()
        node = mpi.Split_type(MPI.COMM_TYPE_SHARED)
        device = choose_device(node.allgather, node.rank, with_gpus=hvd.nccl_built())
        bind_to_cores(node.allgather, node.rank, device)  # before Horovod's thread starts, which stays with its rank
        start_horovod(device)
        if hvd.size() != mpi.size:
            if hvd.rank() != 0:
                sys.exit(ExitCode.SETTINGS)
            raise SettingsError(
                f"Horovod sees {hvd.size()} ranks and MPI sees {mpi.size}: the launcher is not of the MPI that "
                f"Lockstep was built with ({mpi_version()}). Use that MPI's mpirun, or horovodrun without --gloo."
            ).as_shared()
        check_gpus(mpi.allgather(gpu_name(device, MPI.Get_processor_name())))
        return Cluster(mpi.rank, mpi.size, mpi, node.rank, node.size, device)

    @staticmethod
    def _join_gloo() -> "Cluster":
        """Collective: join a job of which MPI knows nothing, so far without cores of this rank's own."""
        elastic = is_elastic()
        if elastic:
            find_place()
        local_rank = int(os.environ["HOROVOD_LOCAL_RANK"])
        # Nobody can be asked yet: ranks of one host are taken to see the same GPUs.
        device = choose_device(lambda mine: [mine] * (local_rank + 1), local_rank, with_gpus=hvd.nccl_built())
        ranks = cast(MPI.Intracomm, GlooCommunicator(lambda: start_horovod(device)))
        return Cluster(ranks.rank, ranks.size, ranks, local_rank, hvd.local_size(), device, is_elastic=elastic)

    def rejoin(self) -> "Cluster":
        """Collective over whoever is left and whoever comes: what `start` gave, once the ranks have changed.

        Raises:
            SystemExit: the others go on without this one.
        """
        assert isinstance(self._mpi, GlooCommunicator)
        self._mpi.hang_up()
        find_place(asks=True)
        with place_is_known():
            ranks = cast(MPI.Intracomm, GlooCommunicator(lambda: start_horovod(self.device)))
        return replace(self, rank=ranks.rank, size=ranks.size, _mpi=ranks, recorder=FlightRecorder())

    def settle(self) -> "Cluster":
        """Collective, of a Gloo job: cores of this rank's own, among the ranks that share its node."""
        node = platform.node()
        mates = [rank for rank, other in enumerate(self.all_gather_object(node)) if other == node]
        local_rank = mates.index(self.rank)

        def all_gather(value: Any) -> list[Any]:
            values = self.all_gather_object(value)
            return [values[mate] for mate in mates]

        bind_to_cores(all_gather, local_rank, self.device)
        pin_all_threads(allowed_cpus())  # Horovod's runs already
        check_gpus(self.all_gather_object(gpu_name(self.device, node)))
        return replace(self, local_rank=local_rank, local_size=len(mates))

    @staticmethod
    def alone() -> "Cluster":
        """A cluster of this rank only, whatever the job: for a reference that no other rank takes part in."""
        return Cluster(0, 1, MPI.COMM_SELF, 0, 1, torch.device("cpu"))

    def split(self, groups: Sequence[Sequence[int]]) -> "Cluster":
        """Collective: the cluster of the ranks in my group; every rank is in one of `groups`, which are equally large.

        Horovod starts anew with a process set for each group: sets that are added later would cost a collective in
        each of its cycles. Clusters of an earlier split are invalid from then on.
        """
        self.require_mpi("the stages of a pipeline send each other messages")
        group = next(group for group in groups if self.rank in group)
        mine = hvd.global_process_set
        if 1 < len(group) < self.size:
            sets = [hvd.ProcessSet(list(ranks)) for ranks in groups]
            hvd.shutdown()
            start_horovod(self.device, sets)
            mine = sets[list(groups).index(group)]
        mpi = MPI.Intracomm(self._mpi.Split(min(group), self.rank))
        return replace(self, rank=mpi.rank, size=mpi.size, _mpi=mpi, _set=mine)

    def require_mpi(self, why: str) -> None:
        """Raises SettingsError, on every rank, where Gloo has started the job; `why` says what needs MPI."""
        if isinstance(self._mpi, GlooCommunicator):
            message = f"{why}, which needs MPI: start this with mpirun, or with horovodrun without --gloo"
            raise SettingsError(message).as_shared()

    def stop(self) -> None:
        """Collective: leave the job in good order."""
        if isinstance(self._mpi, GlooCommunicator) and hvd.is_initialized():
            with suppress(HorovodInternalError):
                self.barrier()  # horovodrun ends all others as soon as one has left: rank 0 has something to tell
        hvd.shutdown()
        MPI.Finalize()

    @contextmanager
    def without_horovod(self) -> Iterator[None]:
        """Collective: Horovod's thread rests inside, and its collectives cannot be used: for measuring without it."""
        self.require_mpi("to measure without Horovod, the ranks must meet without it")
        hvd.shutdown()
        yield
        self.barrier()
        start_horovod(self.device)

    def prepare_timeline(self) -> None:
        """Collective: Horovod starts anew, ready for `start_timeline`: only so can one begin later. Its writer takes a
        thread of rank 0's until the end. Nothing happens in Gloo jobs, which could not meet again.

        Raises:
            SettingsError: on every rank: one is being kept for somebody else.
        """
        self.on_root(_check_timeline)
        if not isinstance(self._mpi, GlooCommunicator) and self.size > 1:
            hvd.shutdown()
            os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"
            start_horovod(self.device)

    def start_timeline(self, file: Path) -> None:
        """From here on Horovod on rank 0 writes to `file` what becomes of each tensor, and when each rank had it ready,
        if `prepare_timeline` was called. Not a collective.
        """
        if self.is_root and "HOROVOD_TIMELINE" in os.environ:
            hvd.start_timeline(str(file))

    def stop_timeline(self) -> None:
        """The file is complete when it returns."""
        if self.is_root and "HOROVOD_TIMELINE" in os.environ:
            hvd.stop_timeline()

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        if isinstance(self._mpi, GlooCommunicator):
            return self._mpi.gather_parts(part.detach().cpu())
        return super().gather_parts(part)

    def most_elements(self, dtype: torch.dtype) -> int:
        most = super().most_elements(dtype)
        return max(1, most // dtype.itemsize) if isinstance(self._mpi, GlooCommunicator) else most  # it counts bytes

    def gather_from_thread(self, value: T, seconds_a_look: float = 0.005) -> list[T]:
        if isinstance(self._mpi, GlooCommunicator):
            return self._mpi.gather_from_thread(value)
        return super().gather_from_thread(value, seconds_a_look)


def _check_timeline() -> None:
    if "HOROVOD_TIMELINE" in os.environ:
        raise SettingsError("profile is set, and so is HOROVOD_TIMELINE: Horovod keeps one timeline; leave one out")
