"""The backend of jobs that `horovodrun --gloo` has started: every call is a collective of Horovod's own."""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from lockstep.comm import backend  # isort: skip  MPI before Horovod
import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

T = TypeVar("T")

NUM_PENDING_VOTES = 4  # Horovod tells collectives that are pending at the same time apart by their names


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
        max_elements = max(1, backend.MAX_PER_CALL // (self.size * part.element_size()))  # of each rank's part
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
        return max(1, backend.MAX_PER_CALL // dtype.itemsize)  # Gloo counts bytes

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
