"""What the ranks of a job send each other beside Horovod's collectives over tensors, and how.

Small Python objects, votes, and a model's parts on their way to rank 0 go over MPI, or over Horovod itself in jobs that
`horovodrun --gloo` has started, of which MPI knows nothing.
"""

import os
import socket
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lockstep.comm.mpi_library import MPI  # isort: skip  before Horovod
import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

T = TypeVar("T")

MAX_PER_CALL = 2**30
"""Bytes of one message, and elements of one collective over tensors: MPI and Horovod count both in 32 bits. What is
larger is sent in pieces."""
THREADS_TAG = 1  # of messages between the ranks' background threads
PARTS_TAG = 5
POLL_SECONDS = 0.005
NUM_PENDING_VOTES = 4  # Horovod tells collectives that are pending at the same time apart by their names


class Backend(Protocol):
    """The ranks of a cluster, and all that MPI and Gloo do differently for them.

    The calls of one thread must be made in the same order on every rank. `gather_from_thread` is for a second thread.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def mpi(self) -> MPI.Intracomm | None:
        """The communicator for messages between two ranks and for splitting the ranks; None for Gloo, which has neither
        (see `Cluster.require_mpi`).
        """

    @property
    def can_restart(self) -> bool:
        """Horovod can be stopped and started again while the job runs."""

    def barrier(self) -> None:
        """Collective: wait for every rank."""

    def broadcast_object(self, value: T) -> T:
        """Collective: rank 0's picklable `value`, on every rank."""

    def all_gather_object(self, value: T) -> list[T]:
        """Collective: every rank's picklable `value`, in the order of the ranks."""

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        """Collective: every rank's flat CPU tensor `part` (lengths may differ), in the order of the ranks, on rank 0;
        an empty list elsewhere.
        """

    def begin_max(self, value: int) -> Callable[[], int]:
        """Collective: start to find the maximum over all ranks; the returned function waits for it and returns it."""

    def gather_from_thread(self, value: T) -> list[T]:
        """Collective over one background thread of each rank, while the main threads use the backend too: every rank's
        `value` on rank 0, an empty list elsewhere.
        """

    def max_elements(self, dtype: torch.dtype) -> int:
        """How many elements one Horovod collective may hold, over all ranks."""

    def disconnect(self) -> None:
        """Stop Horovod on this rank and close its connections, without waiting for ranks that may be lost."""

    def leave(self) -> None:
        """Collective: leave the job when every rank is ready to."""


class MpiBackend:
    """Calls over an MPI communicator; see `Backend`."""

    can_restart = True

    def __init__(self, mpi: MPI.Intracomm) -> None:
        self.mpi = mpi
        self.rank, self.size = mpi.rank, mpi.size

    def barrier(self) -> None:
        self.mpi.Barrier()

    def broadcast_object(self, value: T) -> T:
        sent: T = self.mpi.bcast(value)
        return sent

    def all_gather_object(self, value: T) -> list[T]:
        return self.mpi.allgather(value)

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        lengths = self.mpi.gather(len(part))
        if lengths is None:
            MPI.Request.Waitall([self.mpi.Isend(piece, 0, PARTS_TAG) for piece in pieces_of(part)])
            return []
        parts = [part, *(torch.empty(length, dtype=part.dtype) for length in lengths[1:])]
        MPI.Request.Waitall(
            [
                self.mpi.Irecv(piece, rank, PARTS_TAG)
                for rank, of_rank in enumerate(parts[1:], start=1)
                for piece in pieces_of(of_rank)
            ]
        )
        return parts

    def begin_max(self, value: int) -> Callable[[], int]:
        mine, largest = array("q", [value]), array("q", [0])
        request = self.mpi.Iallreduce(mine, largest, MPI.MAX)

        def wait() -> int:
            request.Wait()
            return int(largest[0] if mine else 0)  # refers to both buffers, which must live until here

        return wait

    def gather_from_thread(self, value: T) -> list[T]:
        """It sleeps between polls: MPI's own waiting would take a core from the threads that compute."""
        if self.rank > 0:
            request = self.mpi.isend(value, 0, THREADS_TAG)
            while not request.test()[0]:
                time.sleep(POLL_SECONDS)
            return []
        values = [value]
        for rank in range(1, self.size):
            while not self.mpi.iprobe(rank, THREADS_TAG):
                time.sleep(POLL_SECONDS)
            values.append(self.mpi.recv(source=rank, tag=THREADS_TAG))
        return values

    def max_elements(self, dtype: torch.dtype) -> int:  # noqa: ARG002
        return MAX_PER_CALL

    def disconnect(self) -> None:
        hvd.shutdown()

    def leave(self) -> None:
        hvd.shutdown()


class GlooBackend:
    """Calls over Horovod's collectives; see `Backend`. The ones of a second thread have names of their own."""

    can_restart = False  # Gloo's ranks could not find each other a second time
    mpi = None

    def __init__(self, start: Callable[[], None]) -> None:
        """Collective: `start` starts Horovod."""
        before = _open_sockets()
        start()
        self._sockets = set(_open_sockets().values()) - set(before.values())
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()
        self._num_votes = 0

    def barrier(self) -> None:
        self.all_gather_object(None)

    def broadcast_object(self, value: T) -> T:
        sent: T = hvd.broadcast_object(value, 0, name="objects.broadcast")
        return sent

    def all_gather_object(self, value: T) -> list[T]:
        gathered: list[T] = hvd.allgather_object(value, name="objects.gathering")
        return gathered

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        """Every rank receives all parts, piece by piece: Horovod has no call that gathers on one rank alone."""
        lengths = self.all_gather_object(len(part))
        parts = [torch.empty(length if self.rank == 0 else 0, dtype=part.dtype) for length in lengths]
        max_elements = max(1, MAX_PER_CALL // (self.size * part.element_size()))  # of each rank's part
        for start in range(0, max(lengths), max_elements):
            gathered = hvd.allgather(part[start : start + max_elements].view(torch.uint8), name="parts.gathering")
            if self.rank == 0:
                pieces = [each[start : start + max_elements] for each in parts]
                for piece, received in zip(pieces, gathered.view(part.dtype).split([*map(len, pieces)]), strict=True):
                    piece.copy_(received)
        return parts if self.rank == 0 else []

    def begin_max(self, value: int) -> Callable[[], int]:
        self._num_votes += 1
        name = f"vote.{self._num_votes % NUM_PENDING_VOTES}"
        handle = hvd.allreduce_async_(torch.tensor([value]), op=hvd.Max, name=name)
        return lambda: int(hvd.synchronize(handle))

    def gather_from_thread(self, value: T) -> list[T]:
        gathered: list[T] = hvd.allgather_object(value, name="thread.gathering")
        return gathered if self.rank == 0 else []

    def max_elements(self, dtype: torch.dtype) -> int:
        return max(1, MAX_PER_CALL // dtype.itemsize)  # Gloo counts bytes

    def disconnect(self) -> None:
        """Horovod leaves most of its connections open: a rank that waits for this one to pass on what a third has sent
        would learn of the third one's loss after 30 seconds.
        """
        hvd.shutdown()
        for descriptor, name in _open_sockets().items():
            if name in self._sockets:
                with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        if hvd.is_initialized():
            with suppress(HorovodInternalError):
                self.barrier()  # horovodrun ends all others as soon as one has left, and rank 0 may still have to print
        hvd.shutdown()


def _open_sockets() -> dict[int, str]:
    """The sockets of this process: descriptor -> the kernel's unique name for it."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own descriptor is closed by now
            found[int(link.name)] = str(link.readlink())
    return {descriptor: name for descriptor, name in found.items() if name.startswith("socket:")}


def pieces_of(tensor: Tensor) -> list[Any]:
    """The bytes of `tensor` as one or more buffers that MPI can send or fill."""
    pieces = tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(MAX_PER_CALL)
    return [piece.numpy() if piece.device.type == "cpu" else piece for piece in pieces]  # mpi4py takes a GPU's tensors
