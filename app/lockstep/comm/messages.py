"""Messages from one rank to another, over MPI: tensors, and small Python objects."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lockstep.comm.backend import pieces_of
from lockstep.comm.mpi_library import MPI
from lockstep.runtime.flight_recorder import FlightRecorder


@dataclass(frozen=True)
class Messages:
    """Sends and receives among the ranks of one communicator. See `Cluster.require_mpi`."""

    _mpi: MPI.Intracomm
    _recorder: FlightRecorder

    def begin_send(self, tensor: Tensor, to: int, tag: int) -> "Message":
        """Start to send `tensor`, which must not change until the message is done."""
        tensor = tensor.contiguous()
        if tensor.device.type == "cuda":
            tensor = tensor if mpi_reads_gpu_memory() else tensor.cpu()
            torch.cuda.current_stream().synchronize()  # MPI does not wait for kernels that still write the tensor
        requests = [self._mpi.Isend(piece, to, tag) for piece in pieces_of(tensor)]
        return Message(requests, tensor, tensor, f"message to rank {to}", self._recorder)

    def begin_receive(self, tensor: Tensor, source: int, tag: int) -> "Message":
        """Start to receive the next message with `tag` from rank `source` into `tensor`, which is contiguous."""
        staged = tensor
        if tensor.device.type == "cuda":
            if mpi_reads_gpu_memory():
                torch.cuda.current_stream().synchronize()  # queued kernels may still read this memory
            else:
                staged = torch.empty_like(tensor, device="cpu", pin_memory=True)
        requests = [self._mpi.Irecv(piece, source, tag) for piece in pieces_of(staged)]
        return Message(requests, tensor, staged, f"message from rank {source}", self._recorder)

    def begin_send_object(self, value: object, to: int, tag: int) -> Callable[[], object]:
        """Start to send a small picklable `value`; the returned function waits until it is sent."""
        wait: Callable[[], object] = self._mpi.isend(value, to, tag).wait
        return wait

    def has_object(self, tag: int) -> bool:
        """Whether an object with `tag` has arrived from any rank. Does not wait."""
        return bool(self._mpi.iprobe(MPI.ANY_SOURCE, tag))

    def receive_object(self, tag: int) -> tuple[int, Any]:
        """Wait for the next object with `tag`: the rank that has sent it, and the object."""
        status = MPI.Status()
        value = self._mpi.recv(source=MPI.ANY_SOURCE, tag=tag, status=status)
        return status.Get_source(), value


@dataclass(frozen=True)
class Message:
    """A tensor that is being sent or received."""

    _requests: list[MPI.Request]
    _tensor: Tensor
    _staged: Tensor
    _name: str
    _recorder: FlightRecorder

    @property
    def is_done(self) -> bool:
        """Whether it is sent, or received. Does not wait."""
        return bool(MPI.Request.Testall(self._requests))

    def wait(self) -> Tensor:
        """Wait until it is sent, or received; the tensor."""
        with self._recorder.waiting(self._name):
            MPI.Request.Waitall(self._requests)
        return self._tensor if self._staged is self._tensor else self._tensor.copy_(self._staged)


@cache
def mpi_reads_gpu_memory() -> bool:
    """Whether MPI can send from and receive into the memory of GPUs."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)  # of Open MPI, MPICH, MVAPICH
    return bool(query and query())
