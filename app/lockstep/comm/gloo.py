"""What the ranks of a Gloo job tell each other: the calls of an MPI communicator, over Horovod's own collectives."""

import os
import socket
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lockstep.comm import ranks as mpi  # isort: skip  before Horovod
import horovod.torch as hvd
import torch
from torch import Tensor

T = TypeVar("T")

NUM_VOTES = 4  # names in turn for votes that are out at the same time


class GlooCommunicator:
    """Stands in for mpi4py's communicator of all ranks, in the calls that `Ranks` makes; they are named as there.

    The calls of one thread are made in the same order on every rank. Another thread's have names of their own.
    """

    def __init__(self, start: Callable[[], None]) -> None:
        """Collective: `start` starts Horovod."""
        before = _open_sockets()
        start()
        self._sockets = set(_open_sockets().values()) - set(before.values())
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()
        self._num_votes = 0

    def hang_up(self) -> None:
        """Stop Horovod here, and end its connections: it leaves most of them open, and a rank that waits for this one
        to pass on what a third has sent would learn of that one's loss after 30 seconds.
        """
        hvd.shutdown()
        for descriptor, name in _open_sockets().items():
            if name in self._sockets:
                with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)

    def Barrier(self) -> None:
        self.allgather(None)

    def bcast(self, value: T, root: int = 0) -> T:
        sent: T = hvd.broadcast_object(value, root, name="objects.broadcast")
        return sent

    def allgather(self, value: T) -> list[T]:
        gathered: list[T] = hvd.allgather_object(value, name="objects.gathering")
        return gathered

    def gather(self, value: T) -> list[T] | None:
        gathered = self.allgather(value)
        return gathered if self.rank == 0 else None

    def gather_parts(self, mine: Tensor) -> list[Tensor]:
        """As that of `Ranks`; but every rank gets all parts: Horovod has no call that gives them to one alone."""
        lengths = self.allgather(len(mine))
        parts = [torch.empty(length if self.rank == 0 else 0, dtype=mine.dtype) for length in lengths]
        most = max(1, mpi.MOST_AT_ONCE // (self.size * mine.element_size()))  # elements of each rank's
        for start in range(0, max(lengths), most):
            gathered = hvd.allgather(mine[start : start + most].view(torch.uint8), name="parts.gathering")
            if self.rank == 0:
                pieces = [part[start : start + most] for part in parts]
                for piece, came in zip(pieces, gathered.view(mine.dtype).split([*map(len, pieces)]), strict=True):
                    piece.copy_(came)
        return parts if self.rank == 0 else []

    def Iallreduce(self, mine: "array[int]", largest: "array[int]", _: object) -> "Vote":
        """The maximum alone."""
        self._num_votes += 1
        name = f"vote.{self._num_votes % NUM_VOTES}"
        handle = hvd.allreduce_async_(torch.tensor(mine.tolist()), op=hvd.Max, name=name)
        return Vote(lambda: hvd.synchronize(handle), largest)

    def gather_from_thread(self, value: T) -> list[T]:
        gathered: list[T] = hvd.allgather_object(value, name="thread.gathering")
        return gathered if self.rank == 0 else []


@dataclass(frozen=True)
class Vote:
    """An MPI request, as far as it is needed."""

    _wait: Callable[[], Any]
    _largest: "array[int]"

    def Wait(self) -> None:
        for index, value in enumerate(self._wait().tolist()):
            self._largest[index] = value


def _open_sockets() -> dict[int, str]:
    """The sockets of this process: descriptor -> a name that no other one gets."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the listing itself
            found[int(link.name)] = str(link.readlink())
    return {descriptor: name for descriptor, name in found.items() if name.startswith("socket:")}
