"""What the ranks of a job tell each other over MPI.

It does what Horovod has no call for: small Python objects, a model's parts to and from rank 0, messages from one rank
to another. Both share one MPI: this is imported before Horovod, because mpi4py asks MPI for `THREAD_MULTIPLE`, which
Horovod's background thread needs.
"""

import ctypes
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lockstep.comm.mpi_library import MPI as MPI
from lockstep.comm.mpi_library import abort_job as abort_job
from lockstep.comm.mpi_library import mpi_version as mpi_version
from lockstep.comm.mpi_library import rank_in_job as rank_in_job
from lockstep.runtime.errors import LockstepError
from lockstep.runtime.flight_recorder import FlightRecorder

T = TypeVar("T")

THREADS_TAG = 1  # of messages between the ranks' background threads
PARTS_TAG = 5

MOST_AT_ONCE = 2**30
"""Bytes of a message, and elements of a collective over tensors: MPI and Horovod count both in 32 bits, so that what is
larger goes in pieces."""


@dataclass(frozen=True)
class Ranks:
    """This rank's place among others, and what they tell each other.

    Attributes:
        rank: 0 ... size - 1.
        size: the number of ranks.
        recorder: of what this rank is at.
    """

    rank: int
    size: int
    _mpi: MPI.Intracomm = field(repr=False)
    recorder: FlightRecorder = field(default_factory=FlightRecorder, repr=False, kw_only=True)

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Collective: wait for every rank."""
        with self.recorder.waiting("barrier"):
            self._mpi.Barrier()

    # -- objects ---------------------------------------------------------------------------------------------------

    def on_root(self, function: Callable[[], T]) -> T:
        """Collective: rank 0 calls `function`, every rank returns what it returned (which must be picklable).

        A `LockstepError` or `SystemExit` on rank 0 is raised on every rank, as a shared one.
        """
        mine = _attempt(function) if self.is_root else None
        with self.recorder.waiting("broadcast of rank 0's answer"):
            answer: T | LockstepError | SystemExit = self._mpi.bcast(mine)
        return _value_of(answer)

    def on_root_only(self, function: Callable[[], T]) -> T | None:
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
        with self.recorder.waiting("gathering of objects"):
            return self._mpi.allgather(value)

    def begin_max(self, value: int) -> Callable[[], int]:
        """Collective: goes on at once; the returned function gives the largest of all ranks' values."""
        if self.size == 1:
            return lambda: value
        mine, largest = array("q", [value]), array("q", [0])
        request = self._mpi.Iallreduce(mine, largest, MPI.MAX)

        def wait() -> int:
            with self.recorder.waiting("vote on going on"):
                request.Wait()
            return int(largest[0] if mine else 0)  # both live until then

        return wait

    # -- parts of tensors ------------------------------------------------------------------------------------------

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        """Collective: every rank's flat `part` (lengths may differ) on rank 0, in the order of the ranks; else none."""
        mine = part.detach().cpu()
        with self.recorder.waiting("gathering of parts"):
            lengths = self._mpi.gather(len(mine))
            if lengths is None:
                MPI.Request.Waitall([self._mpi.Isend(piece, 0, PARTS_TAG) for piece in _pieces_of(mine)])
                return []
            parts = [mine, *(torch.empty(length, dtype=mine.dtype) for length in lengths[1:])]
            MPI.Request.Waitall(
                [
                    self._mpi.Irecv(piece, rank, PARTS_TAG)
                    for rank, of_rank in enumerate(parts[1:], start=1)
                    for piece in _pieces_of(of_rank)
                ]
            )
        return parts

    # -- from one rank to another ----------------------------------------------------------------------------------

    def begin_send(self, tensor: Tensor, to: int, tag: int) -> "Message":
        """Send `tensor`, which must stay as it is until the message is done."""
        tensor = tensor.contiguous()
        if tensor.device.type == "cuda":
            tensor = tensor if mpi_reads_gpu_memory() else tensor.cpu()
            torch.cuda.current_stream().synchronize()  # MPI knows nothing of what is still being computed
        requests = [self._mpi.Isend(piece, to, tag) for piece in _pieces_of(tensor)]
        return Message(requests, tensor, tensor, f"message to rank {to}", self.recorder)

    def begin_receive(self, tensor: Tensor, source: int, tag: int) -> "Message":
        """Post `tensor`, which is contiguous, for the next message with `tag` from rank `source`."""
        staged = tensor
        if tensor.device.type == "cuda":
            if mpi_reads_gpu_memory():
                torch.cuda.current_stream().synchronize()  # its memory may be what queued work still uses
            else:
                staged = torch.empty_like(tensor, device="cpu", pin_memory=True)
        requests = [self._mpi.Irecv(piece, source, tag) for piece in _pieces_of(staged)]
        return Message(requests, tensor, staged, f"message from rank {source}", self.recorder)

    def begin_send_object(self, value: object, to: int, tag: int) -> Callable[[], object]:
        """Send a small `value`; the returned function waits until it has left."""
        wait: Callable[[], object] = self._mpi.isend(value, to, tag).wait
        return wait

    def has_message(self, tag: int) -> bool:
        """An object with `tag` is here. Does not wait."""
        return bool(self._mpi.iprobe(MPI.ANY_SOURCE, tag))

    def receive_object(self, tag: int) -> tuple[int, Any]:
        """Wait for the next object with `tag`: the rank that has sent it, and it."""
        status = MPI.Status()
        value = self._mpi.recv(source=MPI.ANY_SOURCE, tag=tag, status=status)
        return status.Get_source(), value

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

    _requests: list[MPI.Request]
    _tensor: Tensor
    _staged: Tensor
    _name: str
    _recorder: FlightRecorder

    @property
    def is_done(self) -> bool:
        """It has left, or come. Does not wait."""
        return bool(MPI.Request.Testall(self._requests))

    def wait(self) -> Tensor:
        """Until it has left, or come; then the tensor."""
        with self._recorder.waiting(self._name):
            MPI.Request.Waitall(self._requests)
        return self._tensor if self._staged is self._tensor else self._tensor.copy_(self._staged)


@cache
def mpi_reads_gpu_memory() -> bool:
    """MPI can send from and receive into the memory of GPUs."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)  # of Open MPI, MPICH, MVAPICH
    return bool(query and query())


def _pieces_of(tensor: Tensor) -> list[Any]:
    """The content of `tensor` as bytes that MPI can send or fill, in one piece or more."""
    pieces = tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(MOST_AT_ONCE)
    return [piece.numpy() if piece.device.type == "cpu" else piece for piece in pieces]  # mpi4py knows a GPU's tensors


def _attempt(function: Callable[[], T]) -> T | LockstepError | SystemExit:
    try:
        return function()
    except (LockstepError, SystemExit) as error:
        return error


def _value_of(answer: T | LockstepError | SystemExit) -> T:
    if isinstance(answer, LockstepError):
        raise answer.as_shared()
    if isinstance(answer, SystemExit):
        raise answer
    return answer
