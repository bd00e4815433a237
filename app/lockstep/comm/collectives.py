"""Collectives over tensors, by Horovod: NCCL rings on GPUs, MPI or Gloo on CPUs.

Horovod counts elements in 32 bits: what is larger goes in pieces.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lockstep.comm import ranks as mpi  # isort: skip  before Horovod
import horovod.torch as hvd
import torch
from torch import Tensor


class Collectives(mpi.Ranks):
    """
    Attributes:
        device: where this rank computes.
    """

    device: torch.device
    _set: hvd.ProcessSet

    def most_elements(self, dtype: torch.dtype) -> int:  # noqa: ARG002
        """How many elements of a type one collective may hold, over all ranks."""
        return mpi.MOST_AT_ONCE

    # -- tensors ---------------------------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: `tensor` summed over all ranks, in place. `name` must be the same on every rank."""
        if self.size > 1:
            with self.recorder.waiting(f"{name} all-reduce"):
                for piece_name, piece in self._pieces(tensor, name):
                    hvd.allreduce_(piece, op=hvd.Sum, name=piece_name, process_set=self._set)
        return tensor

    def begin_sum_(self, tensor: Tensor, name: str) -> Callable[[], None]:
        """Collective: as `sum_`, but goes on at once; the sum is there when the returned function has been called."""
        if self.size == 1:
            return lambda: None
        handles = [
            hvd.allreduce_async_(piece, op=hvd.Sum, name=piece_name, process_set=self._set)
            for piece_name, piece in self._pieces(tensor, name)
        ]
        return lambda: self._finish(handles, f"{name} all-reduce")

    def adasum_(self, tensors: Sequence[Tensor], name: str) -> None:
        """Collective: combine each tensor over the ranks, in place, by Adasum (Maleki et al. 2020, section 3).

        The number of ranks must be a power of two.
        """
        if self.size > 1:
            with self.recorder.waiting(f"{name} Adasum"):
                hvd.grouped_allreduce_(tensors, op=hvd.Adasum, name=name, process_set=self._set)

    def all_to_all(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: part r of `tensor` (size * n,) goes to rank r; returns what came, in the order of the ranks."""
        if self.size == 1:
            return tensor
        with self.recorder.waiting(f"{name} all-to-all"):
            received: Tensor = hvd.alltoall(tensor, name=name, process_set=self._set)
        return received

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: every rank's `tensor` (n,), one after the other in the order of the ranks, (size * n,)."""
        if self.size == 1:
            return tensor
        with self.recorder.waiting(f"{name} all-gather"):
            gathered: Tensor = hvd.allgather(tensor, name=name, process_set=self._set)
        return gathered

    def begin_all_gather_(self, whole: Tensor, part: Tensor, name: str) -> Callable[[], None]:
        """Collective: `whole` (size * n,) becomes every rank's `part` (n,), once the returned function has been called.

        `part` must not lie in `whole`.
        """
        if self.size == 1:
            whole.copy_(part)
            return lambda: None
        if whole.numel() > self.most_elements(whole.dtype):
            rows, columns = whole.view(self.size, -1), max(1, self.most_elements(whole.dtype) // self.size)
            for index, (piece, place) in enumerate(zip(part.split(columns), rows.split(columns, 1), strict=True)):
                place.copy_(self.all_gather(piece, f"{name}.{index}").view(self.size, -1))
            return lambda: None
        # Not hvd.allgather_async, which makes a new tensor for the result.
        handle = hvd.mpi_ops._allgather_async(part, whole, name, self._set)
        return lambda: self._finish([handle], f"{name} all-gather")

    def begin_reduce_scatter(self, tensor: Tensor, scratch: Tensor, name: str) -> Callable[[], Tensor]:
        """Collective: `tensor` (size * n,) is to be summed over all ranks; the returned function gives what adds up to
        this rank's part of the sum, (k, n), in the order of the ranks. Until then `tensor` must stay as it is.

        Args:
            scratch: as large as `tensor`; what is returned may lie in it.
        """
        if self.size == 1:
            return lambda: tensor.view(1, -1)
        if tensor.numel() > self.most_elements(tensor.dtype):
            rows, columns = scratch.view(self.size, -1), max(1, self.most_elements(tensor.dtype) // self.size)
            pieces = zip(tensor.view(self.size, -1).split(columns, 1), rows.split(columns, 1), strict=True)
            for index, (piece, place) in enumerate(pieces):
                place.copy_(self.all_to_all(piece.reshape(-1).contiguous(), f"{name}.{index}").view(self.size, -1))
            return lambda: rows
        if tensor.device.type == "cuda":
            handle = hvd.reducescatter_async(tensor, op=hvd.Sum, name=name, process_set=self._set)
            return lambda: self._finish([handle], f"{name} reduce-scatter")[0].view(1, -1)
        # As many bytes in one step. Open MPI's own takes 1.5 to 2 times as long, and 2.5 times the tensor's memory.
        # Not hvd.alltoall_async, which makes a new tensor for the result, in its own thread's memory.
        splits, received_splits = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
        handle = hvd.mpi_ops._alltoall_async(tensor, splits, scratch, received_splits, name, self._set)
        return lambda: self._finish([handle], f"{name} reduce-scatter")[0][0].view(self.size, -1)

    def broadcast_parameters(self, tensors: Mapping[str, Tensor], root: int = 0) -> None:
        """Collective over the whole job, not over a group of it: rank `root`'s `tensors` overwrite the other ranks'."""
        if self.size == 1:
            return
        sent = {name: tensor.contiguous() for name, tensor in tensors.items()}  # Horovod refuses channels-last ones
        with self.recorder.waiting("broadcast of parameters"):
            pieces = [piece for name, tensor in sent.items() for piece in self._pieces(tensor, name)]
            hvd.broadcast_parameters(dict(pieces), root_rank=root)
        for name, tensor in tensors.items():
            if sent[name] is not tensor:
                tensor.copy_(sent[name])

    def _pieces(self, tensor: Tensor, name: str) -> list[tuple[str, Tensor]]:
        """`tensor` with its name, or views of it that one collective can hold, each with a name of its own."""
        most = self.most_elements(tensor.dtype)
        if tensor.numel() <= most:
            return [(name, tensor)]
        return [(f"{name}.{index}", piece) for index, piece in enumerate(tensor.view(-1).split(most))]

    def _finish(self, handles: Sequence[Any], collective: str) -> Any:
        """Wait for Horovod's `handles`, on the record; what each gives."""
        with self.recorder.waiting(collective):
            return [hvd.synchronize(handle) for handle in handles]
