"""What the ranks of a job send each other beside Horovod's collectives over tensors, and how.

Small Python objects, votes, and a model's parts on their way to rank 0 go over MPI (mpi_backend.py), or over Horovod
itself in jobs that `horovodrun --gloo` has started, of which MPI knows nothing (gloo_backend.py).
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lockstep.comm.mpi_library import MPI

T = TypeVar("T")

MAX_PER_CALL = 2**30
"""Bytes of one message, and elements of one collective over tensors: MPI and Horovod count both in 32 bits. What is
larger is sent in pieces."""


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
