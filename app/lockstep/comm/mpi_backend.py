"""The backend of jobs whose ranks MPI has started."""

import time
from array import array
from collections.abc import Callable
from typing import TypeVar

from lockstep.comm import backend  # isort: skip  MPI before Horovod
import horovod.torch as hvd
import torch
from torch import Tensor

from lockstep.comm.messages import pieces_of
from lockstep.comm.mpi_library import MPI

T = TypeVar("T")

THREADS_TAG = 1  # of messages between the ranks' background threads
PARTS_TAG = 5
POLL_SECONDS = 0.005


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
        return backend.MAX_PER_CALL

    def disconnect(self) -> None:
        hvd.shutdown()

    def leave(self) -> None:
        hvd.shutdown()
