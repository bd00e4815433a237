"""The ranks of one job and their collectives over tensors, by Horovod (NCCL rings on GPUs, MPI on CPUs): the only file
that imports Horovod.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from app.cluster.mpi import MPI, Ranks, mpi_version  # isort: skip  before Horovod
import horovod.torch as hvd
import torch
from torch import Tensor

from app.cluster.affinity import threads_at_lowest_priority
from app.cluster.devices import bind_to_cores, choose_device, gpu_name
from app.cluster.failure import ExitCode, SettingsError
from app.cluster.memory import keep_freed_memory


@dataclass(frozen=True)
class Cluster(Ranks):
    """This rank's place among all ranks of the job, and the collectives over them.

    Attributes:
        local_rank: 0 ... local_size - 1 on this node.
        local_size: the number of ranks on this node.
        device: where this rank computes.

    The ranks of a cluster that `split` gives are counted within it; its collectives are over its ranks alone.
    """

    local_rank: int
    local_size: int
    device: torch.device
    _set: hvd.ProcessSet = field(default=hvd.global_process_set, repr=False)

    @staticmethod
    def start() -> "Cluster":
        """Collective: join the job that a launcher started, or be the only rank; on cores and a GPU of its own."""
        keep_freed_memory()
        mpi = MPI.COMM_WORLD
        node = mpi.Split_type(MPI.COMM_TYPE_SHARED)
        device = choose_device(node.allgather, node.rank, with_gpus=hvd.nccl_built())
        bind_to_cores(node.allgather, node.rank, device)  # before Horovod's thread starts, which stays with its rank
        _start_horovod(device)
        if hvd.size() != mpi.size:
            if hvd.rank() != 0:
                sys.exit(ExitCode.SETTINGS)
            raise SettingsError(
                f"Horovod sees {hvd.size()} ranks and MPI sees {mpi.size}: the launcher is not of the MPI that "
                f"Lockstep was built with ({mpi_version()}). Use that MPI's mpirun, or horovodrun without --gloo."
            ).on_all_ranks()
        gpus = [gpu for gpu in mpi.allgather(gpu_name(device, MPI.Get_processor_name())) if gpu]
        if shared_gpus := [gpu for gpu, num_ranks in Counter(gpus).items() if num_ranks > 1]:
            raise SettingsError(
                f"several ranks share {shared_gpus[0]}, which NCCL refuses: start one rank for each GPU, or hide the "
                "GPUs to compute on the CPU: CUDA_VISIBLE_DEVICES= mpirun ..."
            ).on_all_ranks()
        return Cluster(mpi.rank, mpi.size, mpi, node.rank, node.size, device)

    @staticmethod
    def alone() -> "Cluster":
        """A cluster of this rank only, whatever the job: for a reference that no other rank takes part in."""
        return Cluster(0, 1, MPI.COMM_SELF, 0, 1, torch.device("cpu"))

    def split(self, groups: Sequence[Sequence[int]]) -> "Cluster":
        """Collective: the cluster of the ranks in my group; every rank is in one of `groups`, which are equally large.

        Horovod starts anew with a process set for each group: sets that are added later would cost a collective in
        each of its cycles. Clusters of an earlier split are invalid from then on.
        """
        group = next(group for group in groups if self.rank in group)
        mine = hvd.global_process_set
        if 1 < len(group) < self.size:
            sets = [hvd.ProcessSet(list(ranks)) for ranks in groups]
            hvd.shutdown()
            _start_horovod(self.device, sets)
            mine = sets[list(groups).index(group)]
        mpi = MPI.Intracomm(self._mpi.Split(min(group), self.rank))
        return replace(self, rank=mpi.rank, size=mpi.size, _mpi=mpi, _set=mine)

    def stop(self) -> None:
        """Collective: leave the job in good order."""
        hvd.shutdown()
        MPI.Finalize()

    @contextmanager
    def without_horovod(self) -> Iterator[None]:
        """Collective: Horovod's thread rests inside, and its collectives cannot be used: for measuring without it."""
        hvd.shutdown()
        yield
        self.barrier()
        _start_horovod(self.device)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: `tensor` summed over all ranks, in place. `name` must be the same on every rank."""
        return hvd.allreduce_(tensor, op=hvd.Sum, name=name, process_set=self._set) if self.size > 1 else tensor

    def begin_sum_(self, tensor: Tensor, name: str) -> Callable[[], None]:
        """Collective: as `sum_`, but goes on at once; the sum is there when the returned function has been called."""
        if self.size == 1:
            return lambda: None
        handle = hvd.allreduce_async_(tensor, op=hvd.Sum, name=name, process_set=self._set)
        return lambda: hvd.synchronize(handle)

    def adasum_(self, tensors: Sequence[Tensor], name: str) -> None:
        """Collective: combine each tensor over the ranks, in place, by Adasum (Maleki et al. 2020, section 3).

        The number of ranks must be a power of two.
        """
        if self.size > 1:
            hvd.grouped_allreduce_(tensors, op=hvd.Adasum, name=name, process_set=self._set)

    def all_to_all(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: part r of `tensor` (size * n,) goes to rank r; returns what came, in the order of the ranks."""
        return hvd.alltoall(tensor, name=name, process_set=self._set) if self.size > 1 else tensor

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: every rank's `tensor` (n,), one after the other in the order of the ranks, (size * n,)."""
        return hvd.allgather(tensor, name=name, process_set=self._set) if self.size > 1 else tensor

    def begin_all_gather_(self, whole: Tensor, part: Tensor, name: str) -> Callable[[], None]:
        """Collective: `whole` (size * n,) becomes every rank's `part` (n,), once the returned function has been called.

        `part` must not lie in `whole`.
        """
        if self.size == 1:
            whole.copy_(part)
            return lambda: None
        # Not hvd.allgather_async, which makes a new tensor for the result.
        handle = hvd.mpi_ops._allgather_async(part, whole, name, self._set)
        return lambda: hvd.synchronize(handle)

    def begin_reduce_scatter(self, tensor: Tensor, scratch: Tensor, name: str) -> Callable[[], Tensor]:
        """Collective: `tensor` (size * n,) is to be summed over all ranks; the returned function gives what adds up to
        this rank's part of the sum, (k, n), in the order of the ranks. Until then `tensor` must stay as it is.

        Args:
            scratch: as large as `tensor`; what is returned may lie in it.
        """
        if self.size == 1:
            return lambda: tensor.view(1, -1)
        if tensor.device.type == "cuda":
            handle = hvd.reducescatter_async(tensor, op=hvd.Sum, name=name, process_set=self._set)
            return lambda: hvd.synchronize(handle).view(1, -1)
        # As many bytes in one step. Open MPI's own takes 1.5 to 2 times as long, and 2.5 times the tensor's memory.
        # Not hvd.alltoall_async, which makes a new tensor for the result, in its own thread's memory.
        splits, received_splits = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
        handle = hvd.mpi_ops._alltoall_async(tensor, splits, scratch, received_splits, name, self._set)
        return lambda: hvd.synchronize(handle)[0].view(self.size, -1)

    def broadcast_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Collective over the whole job, not over a group of it: rank 0's `tensors` overwrite every other rank's."""
        if self.size == 1:
            return
        sent = {name: tensor.contiguous() for name, tensor in tensors.items()}  # Horovod refuses channels-last ones
        hvd.broadcast_parameters(sent, root_rank=0)
        for name, tensor in tensors.items():
            if sent[name] is not tensor:
                tensor.copy_(sent[name])


def horovod_operations() -> list[str]:
    """What Horovod was built with."""
    built = {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": hvd.nccl_built()}
    return [name for name, is_built in built.items() if is_built]


def gpu_left_idle() -> bool:
    """There is a GPU, but Horovod was built without NCCL, so that ranks compute on the CPU."""
    return torch.cuda.is_available() and not hvd.nccl_built()


def _start_horovod(device: torch.device, sets: Sequence[hvd.ProcessSet] = ()) -> None:
    # Tensors that happen to be ready together would be fused: added up in another order from run to run, and copied
    # into a buffer of 128 MiB.
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    if device.type == "cuda":
        hvd.init(process_sets=sets)  # NCCL's own threads are children of Horovod's: they keep their priority
    else:
        # How often its thread looks for work, in milliseconds: at Horovod's own 1 an all-reduce begins half of that
        # late. That looking takes no time from the rank is seen to by `threads_at_lowest_priority`.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
        with threads_at_lowest_priority():
            hvd.init(process_sets=sets)
