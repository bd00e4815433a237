"""What the ranks of a job tell each other over MPI: the only file that imports mpi4py.

It does what Horovod has no call for: small Python objects, a model's parts to and from rank 0, messages from one rank
to another. Both share one MPI: this is imported before Horovod, because mpi4py asks MPI for `THREAD_MULTIPLE`, which
Horovod's background thread needs.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from app.cluster.failure import ExitCode, LockstepError

# Open MPI reads these when it is loaded; a value that the site has set wins.
# Ranks often outnumber cores, or share them with Horovod's thread: a waiting rank must give its core away, or an
# all-reduce of 2 ms takes 50 ms.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
# Over TCP, on one connection, each message's announcement waits behind the rank's own data: 60 ms in place of 40 for
# the seed's gradient at 1 Gbit/s. Other networks take no notice.
os.environ.setdefault("OMPI_MCA_btl_tcp_links", "2")

from mpi4py import MPI as MPI  # for comm.py, which must import it before Horovod

T = TypeVar("T")

THREADS_TAG = 1  # of messages between the ranks' background threads


def _end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    abort_job(ExitCode.BUG)


# From here on this process is an MPI rank: an error while it imports the rest must not leave the others waiting.
sys.excepthook = _end_job


@dataclass(frozen=True)
class Ranks:
    """This rank's place among others, and what they tell each other.

    Attributes:
        rank: 0 ... size - 1.
        size: the number of ranks.
    """

    rank: int
    size: int
    _mpi: MPI.Intracomm = field(repr=False)

    @property
    def is_root(self) -> bool:
        return self.rank == 0

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

    # -- parts of tensors ------------------------------------------------------------------------------------------

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        """Collective: every rank's flat `part` (lengths may differ) on rank 0, in the order of the ranks; else none."""
        mine = _bytes_of(part.detach().cpu())
        num_bytes = self._mpi.gather(mine.size)
        if num_bytes is None:
            self._mpi.Gatherv(mine, None)
            return []
        gathered = torch.empty(sum(num_bytes), dtype=torch.uint8)
        self._mpi.Gatherv(mine, (gathered.numpy(), num_bytes))
        return [chunk.view(part.dtype) for chunk in gathered.split(num_bytes)]

    # -- from one rank to another ----------------------------------------------------------------------------------

    def begin_send(self, tensor: Tensor, to: int, tag: int) -> "Message":
        """Send `tensor`, which must stay as it is until the message is done."""
        tensor = tensor.contiguous()
        if tensor.device.type == "cuda":
            tensor = tensor if mpi_reads_gpu_memory() else tensor.cpu()
            torch.cuda.current_stream().synchronize()  # MPI knows nothing of what is still being computed
        return Message(self._mpi.Isend(_bytes_of(tensor), to, tag), tensor, tensor)

    def begin_receive(self, tensor: Tensor, source: int, tag: int) -> "Message":
        """Post `tensor`, which is contiguous, for the next message with `tag` from rank `source`."""
        staged = tensor
        if tensor.device.type == "cuda":
            if mpi_reads_gpu_memory():
                torch.cuda.current_stream().synchronize()  # its memory may be what queued work still uses
            else:
                staged = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return Message(self._mpi.Irecv(_bytes_of(staged), source, tag), tensor, staged)

    def gather_from_thread(self, value: T, seconds_a_look: float = 0.005) -> list[T]:
        """Collective, from one thread of each rank, while other threads use the cluster: every rank's `value` on rank
        0, nothing elsewhere. It sleeps between looks, to leave the cores to those who compute.
        """
        if not self.is_root:
            request = self._mpi.isend(value, 0, THREADS_TAG)
            while not request.test()[0]:
                time.sleep(seconds_a_look)
            return []
        values = [value]
        for rank in range(1, self.size):
            while not self._mpi.iprobe(rank, THREADS_TAG):
                time.sleep(seconds_a_look)
            values.append(self._mpi.recv(source=rank, tag=THREADS_TAG))
        return values


@dataclass(frozen=True)
class Message:
    """A tensor on its way from one rank to another."""

    _request: MPI.Request
    _tensor: Tensor
    _staged: Tensor

    @property
    def is_done(self) -> bool:
        """It has left, or come. Does not wait."""
        return bool(self._request.Test())

    def wait(self) -> Tensor:
        """Until it has left, or come; then the tensor."""
        self._request.Wait()
        return self._tensor if self._staged is self._tensor else self._tensor.copy_(self._staged)


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


@cache
def mpi_reads_gpu_memory() -> bool:
    """MPI can send from and receive into the memory of GPUs."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)  # of Open MPI, MPICH, MVAPICH
    return bool(query and query())


def _bytes_of(tensor: Tensor) -> Any:
    """The content of `tensor` as bytes that MPI can send or fill."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy() if flat.device.type == "cpu" else flat  # mpi4py knows a GPU's tensors


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
