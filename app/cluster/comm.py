"""The ranks of one job and their collectives: the only file that imports Horovod or mpi4py.

Horovod moves tensors (NCCL rings on GPUs, MPI on CPUs). mpi4py moves small Python objects and the merged model's
parts, for which Horovod has no gather. Both share one MPI: mpi4py is imported first because it asks MPI for
`THREAD_MULTIPLE`, which Horovod's background thread needs.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

# Open MPI reads these when it is loaded; a value that the site has set wins.
# Ranks often outnumber cores, or share them with Horovod's thread: a waiting rank must give its core away, or an
# all-reduce of 2 ms takes 50 ms.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
# Over TCP, on one connection, each message's announcement waits behind the rank's own data: 60 ms in place of 40 for
# the seed's gradient at 1 Gbit/s. Other networks take no notice.
os.environ.setdefault("OMPI_MCA_btl_tcp_links", "2")

from mpi4py import MPI  # isort: skip
import horovod.torch as hvd
import torch
from torch import Tensor

from app.cluster.affinity import (
    Cpus,
    allowed_cpus,
    choose_gpus,
    cpus_near,
    num_cores,
    pin,
    read_topology,
    share_cores,
    threads_at_lowest_priority,
)
from app.cluster.failure import ExitCode, LockstepError, SettingsError
from app.cluster.memory import keep_freed_memory

T = TypeVar("T")


def _end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    abort_job(ExitCode.BUG)


# From here on this process is an MPI rank: an error while it imports the rest must not leave the others waiting.
sys.excepthook = _end_job


@dataclass(frozen=True)
class Cluster:
    """This rank's place among all ranks, and the collectives over them.

    Attributes:
        rank: 0 ... size - 1 over the whole job.
        size: the number of ranks of the job.
        local_rank: 0 ... local_size - 1 on this node.
        local_size: the number of ranks on this node.
        device: where this rank computes.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    _mpi: MPI.Intracomm = field(repr=False)

    @staticmethod
    def start() -> "Cluster":
        """Collective: join the job that a launcher started, or be the only rank; on cores and a GPU of its own."""
        keep_freed_memory()
        mpi = MPI.COMM_WORLD
        node = mpi.Split_type(MPI.COMM_TYPE_SHARED)
        device = _choose_device(node)
        _bind_to_cores(node, device)  # before Horovod's thread starts, which stays with its rank
        _start_horovod(device)
        if hvd.size() != mpi.size:
            if hvd.rank() != 0:
                sys.exit(ExitCode.SETTINGS)
            raise SettingsError(
                f"Horovod sees {hvd.size()} ranks and MPI sees {mpi.size}: the launcher is not of the MPI that "
                f"Lockstep was built with ({mpi_version()}). Use that MPI's mpirun, or horovodrun without --gloo."
            ).on_all_ranks()
        gpus = [gpu for gpu in mpi.allgather(_gpu_name(device)) if gpu]
        if shared_gpus := [gpu for gpu, num_ranks in Counter(gpus).items() if num_ranks > 1]:
            raise SettingsError(
                f"several ranks share {shared_gpus[0]}, which NCCL refuses: start one rank for each GPU, or hide the "
                "GPUs to compute on the CPU: CUDA_VISIBLE_DEVICES= mpirun ..."
            ).on_all_ranks()
        return Cluster(mpi.rank, mpi.size, node.rank, node.size, device, mpi)

    @staticmethod
    def alone() -> "Cluster":
        """A cluster of this rank only, whatever the job: for a reference that no other rank takes part in."""
        return Cluster(0, 1, 0, 1, torch.device("cpu"), MPI.COMM_SELF)

    @property
    def is_root(self) -> bool:
        return self.rank == 0

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

    def barrier(self) -> None:
        """Collective: wait for every rank."""
        self._mpi.Barrier()

    # -- objects ---------------------------------------------------------------------------------------------------

    def on_root(self, function: Callable[[], T]) -> T:
        """Collective: rank 0 calls `function`, every rank returns what it returned (which must be picklable).

        A `LockstepError` or `SystemExit` on rank 0 is raised on every rank, as a shared one.
        """
        answer: T | LockstepError | SystemExit = self._mpi.bcast(_attempt(function) if self.is_root else None)
        return _value_of(answer)

    def on_root_alone(self, function: Callable[[], T]) -> T | None:
        """Collective: as `on_root`, but what rank 0 found stays there; None elsewhere."""
        found: list[T] = []
        self.on_root(lambda: found.append(function()))
        return found[0] if found else None

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """Collective: every rank calls `function`; if it fails on some, all raise the first failing rank's error."""
        mine = _attempt(function)
        node = MPI.Get_processor_name()
        failures = self.all_gather_object((node, mine) if isinstance(mine, LockstepError | SystemExit) else None)
        failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
        if not failed:
            return _value_of(mine)
        rank, (node, error) = next(iter(failed.items()))
        if len(failed) < self.size:
            error.args = (f"rank {rank} on {node}: {error}",)
        return _value_of(error)

    def all_gather_object(self, value: T) -> list[T]:
        """Collective: every rank's `value`, in the order of the ranks."""
        return self._mpi.allgather(value)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: `tensor` summed over all ranks, in place. `name` must be the same on every rank."""
        return hvd.allreduce_(tensor, op=hvd.Sum, name=name) if self.size > 1 else tensor

    def begin_sum_(self, tensor: Tensor, name: str) -> Callable[[], None]:
        """Collective: as `sum_`, but goes on at once; the sum is there when the returned function has been called."""
        if self.size == 1:
            return lambda: None
        handle = hvd.allreduce_async_(tensor, op=hvd.Sum, name=name)
        return lambda: hvd.synchronize(handle)

    def adasum_(self, tensors: Sequence[Tensor], name: str) -> None:
        """Collective: combine each tensor over the ranks, in place, by Adasum (Maleki et al. 2020, section 3).

        The number of ranks must be a power of two.
        """
        if self.size > 1:
            hvd.grouped_allreduce_(tensors, op=hvd.Adasum, name=name)

    def all_to_all(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: part r of `tensor` (size * n,) goes to rank r; returns what came, in the order of the ranks."""
        return hvd.alltoall(tensor, name=name) if self.size > 1 else tensor

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: every rank's `tensor` (n,), one after the other in the order of the ranks, (size * n,)."""
        return hvd.allgather(tensor, name=name) if self.size > 1 else tensor

    def broadcast_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Collective: rank 0's `tensors` overwrite every other rank's."""
        if self.size == 1:
            return
        sent = {name: tensor.contiguous() for name, tensor in tensors.items()}  # Horovod refuses channels-last ones
        hvd.broadcast_parameters(sent, root_rank=0)
        for name, tensor in tensors.items():
            if sent[name] is not tensor:
                tensor.copy_(sent[name])

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        """Collective: every rank's flat `part` (lengths may differ) on rank 0, in the order of the ranks; else none."""
        mine = part.detach().cpu().contiguous().view(torch.uint8).numpy()
        num_bytes = self._mpi.gather(mine.size)
        if num_bytes is None:
            self._mpi.Gatherv(mine, None)
            return []
        gathered = torch.empty(sum(num_bytes), dtype=torch.uint8)
        self._mpi.Gatherv(mine, (gathered.numpy(), num_bytes))
        return [chunk.view(part.dtype) for chunk in gathered.split(num_bytes)]


def rank_in_job() -> int:
    """This rank, known before the ranks have met."""
    return MPI.COMM_WORLD.rank


def abort_job(exit_code: int) -> None:
    """End every rank of the job at once, from this rank alone. A lone rank just goes on to its own end."""
    if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.size > 1:
        MPI.COMM_WORLD.Abort(exit_code)


def mpi_version() -> str:
    """The MPI library that this process has loaded, such as `Open MPI v5.0.11`."""
    return MPI.Get_library_version().split(",")[0].strip()


def horovod_operations() -> list[str]:
    """What Horovod was built with."""
    built = {"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": hvd.nccl_built()}
    return [name for name, is_built in built.items() if is_built]


def gpu_left_idle() -> bool:
    """There is a GPU, but Horovod was built without NCCL, so that ranks compute on the CPU."""
    return torch.cuda.is_available() and not hvd.nccl_built()


def _start_horovod(device: torch.device) -> None:
    # Only one of the two: Horovod 0.28 that is started again in the same process crashes where both are set.
    if device.type == "cuda":
        # Buckets that happen to be ready together would be fused, and added up in another order from run to run.
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        hvd.init()  # NCCL's own threads are children of Horovod's: they keep their priority
    else:
        # How often its thread looks for work, in milliseconds: at Horovod's own 1 an all-reduce begins half of that
        # late. That looking takes no time from the rank is seen to by `threads_at_lowest_priority`.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
        with threads_at_lowest_priority():
            hvd.init()


def _choose_device(node: MPI.Comm) -> torch.device:
    """Collective over one node: the GPU of this rank; the CPU where there is none or Horovod has no NCCL."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() and hvd.nccl_built() else 0
    visible = [str(torch.cuda.get_device_properties(index).uuid) for index in range(num_gpus)]
    index = choose_gpus(node.allgather(visible))[node.rank]
    if index is None:
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _gpu_name(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"GPU {properties.uuid} ({properties.name}) on {MPI.Get_processor_name()}"


def _cpus_near(device: torch.device) -> Cpus:
    if device.type != "cuda":
        return frozenset()
    gpu: Any = torch.cuda.get_device_properties(device)  # typed without its address
    return cpus_near(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")


def _bind_to_cores(node: MPI.Comm, device: torch.device) -> None:
    """Collective over one node: this rank's share of the cores near its GPU, and a compute thread for each of them."""
    allowed = allowed_cpus()
    pools = node.allgather((allowed & _cpus_near(device)) or allowed)
    topology = read_topology(frozenset().union(*pools))
    shares = share_cores(pools, topology)
    share = shares[node.rank]
    pin(share)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores(share, topology) // shares.count(share)))


def _attempt(function: Callable[[], T]) -> T | LockstepError | SystemExit:
    try:
        return function()
    except (LockstepError, SystemExit) as error:
        return error


def _value_of(answer: T | LockstepError | SystemExit) -> T:
    if isinstance(answer, LockstepError):
        raise answer.on_all_ranks()
    if isinstance(answer, SystemExit):
        raise answer
    return answer
