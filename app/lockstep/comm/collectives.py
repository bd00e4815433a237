"""Collectives over all ranks of a cluster: of small Python objects by its backend, of tensors by Horovod.

Horovod uses NCCL on GPUs, and MPI or Gloo on CPUs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lockstep.comm.mpi_library import MPI  # isort: skip  before Horovod
import horovod.torch as hvd
import torch
from torch import Tensor

from lockstep.comm.backend import Backend
from lockstep.runtime.errors import LockstepError
from lockstep.runtime.flight_recorder import FlightRecorder

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """This rank among all ranks of a cluster, and the collectives over them.

    Attributes:
        backend: how its ranks reach each other beside Horovod's collectives over tensors.
        process_set: Horovod's name for its ranks.
        device: where this rank computes.
        recorder: records what this rank is doing, and what it waits for.
    """

    backend: Backend = field(repr=False)
    process_set: hvd.ProcessSet = field(default=hvd.global_process_set, repr=False)
    device: torch.device
    recorder: FlightRecorder = field(default_factory=FlightRecorder, repr=False)

    @property
    def rank(self) -> int:
        """0 ... size - 1."""
        return self.backend.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.backend.size

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Collective: wait for every rank."""
        with self.recorder.waiting("barrier"):
            self.backend.barrier()

    # -- objects ---------------------------------------------------------------------------------------------------

    def on_root(self, function: Callable[[], T]) -> T:
        """Collective: call `function` on rank 0, and return its (picklable) result on every rank.

        A `LockstepError` or `SystemExit` on rank 0 is raised on every rank, as a shared one.
        """
        mine = _result_or_error(function) if self.is_root else None
        with self.recorder.waiting("broadcast of rank 0's answer"):
            result: T | LockstepError | SystemExit = self.backend.broadcast_object(mine)  # type: ignore[assignment]
        return _return_or_raise(result)

    def on_root_only(self, function: Callable[[], T]) -> T | None:
        """Collective: as `on_root`, but the result, which need not be picklable, stays on rank 0; None elsewhere."""
        results: list[T] = []
        self.on_root(lambda: results.append(function()))
        return results[0] if results else None

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """Collective: call `function` on every rank; if it fails on some, raise the lowest one's error on all."""
        mine = _result_or_error(function)
        node = MPI.Get_processor_name()
        failures = self.all_gather_object((node, mine) if isinstance(mine, LockstepError | SystemExit) else None)
        failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
        if not failed:
            return _return_or_raise(mine)
        rank, (node, error) = next(iter(failed.items()))
        if len(failed) < self.size:
            error.args = (f"rank {rank} on {node}: {error}",)
        return _return_or_raise(error)

    def all_gather_object(self, value: T) -> list[T]:
        """Collective: every rank's `value`, in the order of the ranks."""
        with self.recorder.waiting("gathering of objects"):
            return self.backend.all_gather_object(value)

    def begin_max(self, value: int) -> Callable[[], int]:
        """Collective: start to find the maximum over all ranks; the returned function waits for it and returns it."""
        if self.size == 1:
            return lambda: value
        wait = self.backend.begin_max(value)

        def finish() -> int:
            with self.recorder.waiting("vote on going on"):
                return wait()

        return finish

    def gather_from_thread(self, value: T) -> list[T]:
        """Collective over one background thread of each rank, while the main threads use the cluster too: every rank's
        `value` on rank 0, an empty list elsewhere.
        """
        return self.backend.gather_from_thread(value)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def max_elements(self, dtype: torch.dtype) -> int:
        """How many elements one collective may hold, over all ranks; what is larger is sent in pieces."""
        return self.backend.max_elements(dtype)

    def gather_parts(self, part: Tensor) -> list[Tensor]:
        """Collective: every rank's flat `part` (lengths may differ) on rank 0, in the order of the ranks, on the CPU.

        Other ranks get an empty list.
        """
        mine = part.detach().cpu()
        with self.recorder.waiting("gathering of parts"):
            return self.backend.gather_parts(mine)

    def sum_(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: sum `tensor` over all ranks, in place. `name` must be the same on every rank."""
        if self.size > 1:
            with self.recorder.waiting(f"{name} all-reduce"):
                for piece_name, piece in self._pieces(tensor, name):
                    hvd.allreduce_(piece, op=hvd.Sum, name=piece_name, process_set=self.process_set)
        return tensor

    def begin_sum_(self, tensor: Tensor, name: str) -> Callable[[], None]:
        """Collective: as `sum_`, but do not wait: the returned function waits until `tensor` holds the sum."""
        if self.size == 1:
            return lambda: None
        handles = [
            hvd.allreduce_async_(piece, op=hvd.Sum, name=piece_name, process_set=self.process_set)
            for piece_name, piece in self._pieces(tensor, name)
        ]
        return lambda: self._finish(handles, f"{name} all-reduce")

    def adasum_(self, tensors: Sequence[Tensor], name: str) -> None:
        """Collective: combine each tensor over the ranks, in place, by Adasum (Maleki et al. 2020, section 3).

        The number of ranks must be a power of two.
        """
        if self.size > 1:
            with self.recorder.waiting(f"{name} Adasum"):
                hvd.grouped_allreduce_(tensors, op=hvd.Adasum, name=name, process_set=self.process_set)

    def all_to_all(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: send part r of `tensor` (size * n,) to rank r; the received parts, in the order of the ranks."""
        if self.size == 1:
            return tensor
        with self.recorder.waiting(f"{name} all-to-all"):
            received: Tensor = hvd.alltoall(tensor, name=name, process_set=self.process_set)
        return received

    def all_gather(self, tensor: Tensor, name: str) -> Tensor:
        """Collective: concatenate every rank's `tensor` (n,), in the order of the ranks: (size * n,)."""
        if self.size == 1:
            return tensor
        with self.recorder.waiting(f"{name} all-gather"):
            gathered: Tensor = hvd.allgather(tensor, name=name, process_set=self.process_set)
        return gathered

    def begin_all_gather_(self, whole: Tensor, part: Tensor, name: str) -> Callable[[], None]:
        """Collective: start to gather every rank's `part` (n,) into `whole` (size * n,), which is complete once the
        returned function has been called. The two must not overlap.
        """
        if self.size == 1:
            whole.copy_(part)
            return lambda: None
        if whole.numel() > self.max_elements(whole.dtype):
            rows, columns = whole.view(self.size, -1), max(1, self.max_elements(whole.dtype) // self.size)
            for index, (piece, place) in enumerate(zip(part.split(columns), rows.split(columns, 1), strict=True)):
                place.copy_(self.all_gather(piece, f"{name}.{index}").view(self.size, -1))
            return lambda: None
        # hvd.allgather_async would allocate a new tensor for the result.
        handle = hvd.mpi_ops._allgather_async(part, whole, name, self.process_set)
        return lambda: self._finish([handle], f"{name} all-gather")

    def begin_reduce_scatter(self, tensor: Tensor, scratch: Tensor, name: str) -> Callable[[], Tensor]:
        """Collective: start to sum `tensor` (size * n,) over all ranks; the returned function gives the addends of this
        rank's part of the sum, (k, n), in the order of the ranks. Until then `tensor` must not change.

        Args:
            scratch: as large as `tensor`; the addends may be views of it.
        """
        if self.size == 1:
            return lambda: tensor.view(1, -1)
        if tensor.numel() > self.max_elements(tensor.dtype):
            rows, columns = scratch.view(self.size, -1), max(1, self.max_elements(tensor.dtype) // self.size)
            pieces = zip(tensor.view(self.size, -1).split(columns, 1), rows.split(columns, 1), strict=True)
            for index, (piece, place) in enumerate(pieces):
                place.copy_(self.all_to_all(piece.reshape(-1).contiguous(), f"{name}.{index}").view(self.size, -1))
            return lambda: rows
        if tensor.device.type == "cuda":
            handle = hvd.reducescatter_async(tensor, op=hvd.Sum, name=name, process_set=self.process_set)
            return lambda: self._finish([handle], f"{name} reduce-scatter")[0].view(1, -1)
        # An all-to-all sends as many bytes, in one step. Open MPI's own reduce-scatter takes 1.5 to 2 times as long and
        # 2.5 times the tensor's memory. hvd.alltoall_async would allocate a new tensor in Horovod's thread.
        splits, received_splits = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
        handle = hvd.mpi_ops._alltoall_async(tensor, splits, scratch, received_splits, name, self.process_set)
        return lambda: self._finish([handle], f"{name} reduce-scatter")[0][0].view(self.size, -1)

    def broadcast_parameters(self, tensors: Mapping[str, Tensor], root: int = 0) -> None:
        """Collective over the whole job, not over a split: overwrite all other ranks' `tensors` by rank `root`'s."""
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
        """Cut `tensor` into named views, each of which one collective can hold."""
        most = self.max_elements(tensor.dtype)
        if tensor.numel() <= most:
            return [(name, tensor)]
        return [(f"{name}.{index}", piece) for index, piece in enumerate(tensor.view(-1).split(most))]

    def _finish(self, handles: Sequence[Any], collective: str) -> Any:
        """Wait for Horovod's `handles`; the result of each."""
        with self.recorder.waiting(collective):
            return [hvd.synchronize(handle) for handle in handles]


def _result_or_error(function: Callable[[], T]) -> T | LockstepError | SystemExit:
    try:
        return function()
    except (LockstepError, SystemExit) as error:
        return error


def _return_or_raise(result: T | LockstepError | SystemExit) -> T:
    if isinstance(result, LockstepError):
        raise result.as_shared()
    if isinstance(result, SystemExit):
        raise result
    return result
