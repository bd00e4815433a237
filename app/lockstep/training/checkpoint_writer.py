"""Writes checkpoints while training goes on."""

import threading
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.comm.cluster import Cluster
from lockstep.parallel.tensor_slices import State
from lockstep.runtime.errors import StorageError
from lockstep.settings import CheckpointSettings
from lockstep.training.checkpoint import FOLDER, Written, commit, discard, discard_leftovers, write_parts
from lockstep.training.run_folder import flush_folder, storage_errors

GUESSED_BYTES_PER_SECOND = 1e8  # of one rank, to a shared folder


class CheckpointWriter:
    """Writes the checkpoints of one run; each rank writes what it holds.

    Unless the settings say otherwise, a thread writes. It first copies the tensors, while the next forward and backward
    pass only read them: call `wait_for_copy` before anything changes them. An error of the thread is raised by the next
    call.

    Attributes:
        seconds_waited: by `wait_for_copy`, in all.
    """

    def __init__(self, run: Path, settings: CheckpointSettings, cluster: Cluster) -> None:
        """Collective.

        Raises:
            StorageError: on every rank: the folder cannot be made.
        """
        self._folder = run / FOLDER
        self._settings = settings
        self._cluster = cluster
        self._snapshot: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._longest_seconds = 0.0
        self.seconds_waited = 0.0
        self._copied = threading.Event()
        self._copied.set()
        cluster.on_root(self._prepare)

    def _prepare(self) -> None:
        with storage_errors():
            self._folder.mkdir(exist_ok=True)
            flush_folder(self._folder.parent)
            discard_leftovers(self._folder)

    def save(
        self,
        step: int,
        state: State,
        counters: Mapping[str, Any],
        volatile: Collection[str] = (),
        best: Collection[int] = (),
    ) -> None:
        """Collective: write a checkpoint after `step` updates.

        Args:
            state: what this rank saves, on any device.
            counters: whatever else JSON can hold; rank 0's count.
            volatile: names of tensors that a forward pass may change; they are copied before this returns.
            best: earlier checkpoints, by their updates, that are kept beside the latest.

        Raises:
            StorageError: on the rank that could not write this or the last checkpoint, and on rank 0; earlier ones are
                intact.
        """
        self.wait()
        if not self._settings.asynchronous:  # without a copy
            self._write(step, state, dict(counters), best)
            return
        now = {name: part for name, part in state.items() if name in volatile}
        self._copied.clear()
        copied_now = self._copy(now)
        later = {name: part for name, part in state.items() if name not in volatile}
        self._writing = self._thread.submit(self._copy_and_write, step, copied_now, later, dict(counters), best)

    def seconds_to_save(self, num_bytes: int) -> float:
        """Estimate how long a checkpoint takes: the longest so far, or a guess from its size."""
        return self._longest_seconds or 1.0 + num_bytes / GUESSED_BYTES_PER_SECOND

    def wait_for_copy(self) -> None:
        """Wait until the tensors of the last `save` are copied."""
        if not self._copied.is_set():
            started = time.perf_counter()
            self._copied.wait()
            self.seconds_waited += time.perf_counter() - started

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            StorageError: the last checkpoint could not be written.
        """
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def _copy(self, state: State) -> State:
        """Copy into the same memory each time: fresh pages would cost ten times the copy."""
        for name, part in state.items():
            if name not in self._snapshot or self._snapshot[name].shape != part.values.shape:
                like = torch.empty_like(part.values, device="cpu", memory_format=torch.contiguous_format)
                self._snapshot[name] = like
            self._snapshot[name].copy_(part.values)
        return {name: replace(part, values=self._snapshot[name]) for name, part in state.items()}

    def _copy_and_write(
        self, step: int, copied: State, later: State, counters: Mapping[str, Any], best: Collection[int]
    ) -> None:
        try:
            state = {**copied, **self._copy(later)}
        finally:
            self._copied.set()
        self._write(step, state, counters, best)

    def _write(self, step: int, state: State, counters: Mapping[str, Any], best: Collection[int]) -> None:
        """Collective, from this thread: write on all ranks, then commit on rank 0."""
        started = time.perf_counter()
        mine: Written | StorageError
        try:
            mine = write_parts(self._folder, step, state, self._cluster.rank)
        except StorageError as error:
            mine = error
        of_ranks = self._cluster.gather_from_thread(mine)
        for rank, written in enumerate(of_ranks):
            if isinstance(written, StorageError):
                discard(self._folder, step)
                raise StorageError(f"rank {rank} could not write its part of a checkpoint: {written}")
        if self._cluster.is_root:
            parts = [written for written in of_ranks if isinstance(written, Written)]
            commit(self._folder, step, parts, counters, self._settings.keep, best)
        elif isinstance(mine, StorageError):
            raise mine
        self._longest_seconds = max(self._longest_seconds, time.perf_counter() - started)
