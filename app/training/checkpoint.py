"""Checkpoints that know nothing of the number of ranks: tensors by name, and a manifest that vouches for each byte.

    checkpoints/000000000126/
        manifest.json                 counters, the sha256 of each file, and its own
        tensors-00000.safetensors     ...
A checkpoint is written under a temporary name, flushed to the disk and renamed: it is there whole, or not at all.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from app.cluster.failure import StorageError
from app.config import CheckpointSettings
from app.training.run_folder import flush_folder, storage_errors

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
MAX_FILE_BYTES = 2**30
TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk that was found whole.

    Attributes:
        step: optimizer steps done.
        counters: everything else that is needed to go on, as it was given to `CheckpointWriter.save`.
    """

    path: Path
    step: int
    counters: dict[str, Any]

    def load(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU."""
        files = json.loads((self.path / MANIFEST).read_text())["files"]
        return {k: v for name in files for k, v in safetensors.torch.load_file(self.path / name).items()}


class CheckpointWriter:
    """Writes checkpoints of one run from a thread; rank 0 alone has one.

    The thread first copies the tensors into memory of its own, while the next forward and backward pass only read them:
    `wait_for_copy` must stand before whatever changes them. An error of the thread is raised by the next call.
    """

    def __init__(self, run: Path, settings: CheckpointSettings) -> None:
        """Raises StorageError where the folder cannot be made. Removes what a killed writer has left half done."""
        self._folder = run / FOLDER
        self._settings = settings
        self._snapshot: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._copied = threading.Event()
        self._copied.set()
        with storage_errors():
            self._folder.mkdir(exist_ok=True)
            flush_folder(run)
            for leftover in self._folder.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self, step: int, state: Mapping[str, Tensor], counters: Mapping[str, Any], volatile: Collection[str] = ()
    ) -> None:
        """Write a checkpoint after `step` updates, in a thread unless the settings say otherwise.

        Args:
            state: tensors by name, on any device.
            counters: whatever else JSON can hold.
            volatile: names of tensors that a forward pass may change, which are copied before this returns.

        Raises:
            StorageError: this or the checkpoint before could not be written; those before are whole.
        """
        self.wait()
        stable = {name: tensor for name, tensor in state.items() if name not in volatile}
        self._copy({name: state[name] for name in volatile})
        self._copied.clear()
        self._writing = self._thread.submit(self._write, step, stable, list(state), dict(counters))
        if not self._settings.asynchronous:
            self.wait()

    def wait_for_copy(self) -> None:
        """Until nothing needs the tensors of the last `save` any more: a moment."""
        self._copied.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            StorageError: the last checkpoint could not be written.
        """
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Into the same memory each time: fresh pages cost ten times the copy."""
        for name, tensor in tensors.items():
            if name not in self._snapshot or self._snapshot[name].shape != tensor.shape:
                self._snapshot[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
            self._snapshot[name].copy_(tensor)

    def _write(self, step: int, stable: Mapping[str, Tensor], names: list[str], counters: Mapping[str, Any]) -> Path:
        try:
            self._copy(stable)
        finally:
            self._copied.set()
        snapshot = {name: self._snapshot[name] for name in names}
        return write_checkpoint(self._folder, step, snapshot, counters, self._settings.keep)


def write_checkpoint(
    folder: Path, step: int, state: Mapping[str, Tensor], counters: Mapping[str, Any], keep: int
) -> Path:
    """Write one checkpoint to its end and prune those before the last `keep`.

    Raises:
        StorageError: it could not be written; nothing of it is left, and those before are whole.
    """
    final = folder / f"{step:012d}"
    temporary = folder / f"{TEMPORARY}{step:012d}"
    with storage_errors():
        temporary.mkdir()
        try:
            files = {}
            for index, tensors in enumerate(_by_file(state)):
                name = f"tensors-{index:05d}.safetensors"
                safetensors.torch.save_file(tensors, temporary / name)
                files[name] = {"sha256": _flush_and_hash(temporary / name), "bytes": (temporary / name).stat().st_size}
            manifest = {"format": FORMAT, "step": step, "counters": dict(counters), "files": files}
            (temporary / MANIFEST).write_text(json.dumps({**manifest, "sha256": _manifest_hash(manifest)}, indent=1))
            _flush_and_hash(temporary / MANIFEST)
            flush_folder(temporary)
            _remove([final])  # of an attempt that was resumed from before it
            temporary.rename(final)
            flush_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        # What is numbered higher belongs to an attempt that this one has replaced: it was not whole.
        _remove([path for path in _checkpoints(folder) if int(path.name) > step])
        _remove(_checkpoints(folder)[:-keep])
    return final


def _remove(paths: list[Path]) -> None:
    """Out of sight in one move, so that a kill leaves nothing that looks torn; then away."""
    for path in paths:
        if path.exists():
            out_of_sight = path.with_name(f"{TEMPORARY}{path.name}-old")
            path.rename(out_of_sight)
            shutil.rmtree(out_of_sight, ignore_errors=True)


def latest_checkpoint(run: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The last whole checkpoint of `run`, found by content; each torn or altered one after it is told and skipped.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        StorageError: there are checkpoints, and none of them is whole.
    """
    paths = _checkpoints(run / FOLDER)
    for path in reversed(paths):
        try:
            return verify_checkpoint(path)
        except StorageError as error:
            tell(f"skipped: {error}")
    if paths:
        raise StorageError(f"none of the {len(paths)} checkpoints in {run / FOLDER} is whole: the run cannot go on")
    return None


def verify_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every byte of which is as it was written.

    Raises:
        StorageError: it is torn or was altered; names the file.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.pop("sha256") != _manifest_hash(manifest):
            raise StorageError(f"{path / MANIFEST} was altered: its sha256 is another")
        if manifest["format"] != FORMAT:
            raise StorageError(f"{path} has format {manifest['format']}; this Lockstep reads format {FORMAT}")
        for name, vouched in manifest["files"].items():
            num_bytes = (path / name).stat().st_size
            if num_bytes != vouched["bytes"]:
                raise StorageError(f"{path / name} is torn: {num_bytes} of {vouched['bytes']} bytes")
            if _hash(path / name) != vouched["sha256"]:
                raise StorageError(f"{path / name} was altered: its sha256 is another")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} is torn: {error}") from error
    return Checkpoint(path, manifest["step"], manifest["counters"])


def list_checkpoints(run: Path) -> list[Path]:
    """All checkpoints of `run`, whole or not, the oldest first."""
    return _checkpoints(run / FOLDER)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdigit())


def _by_file(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """`state` in files of at most MAX_FILE_BYTES, or of one tensor."""
    files: list[dict[str, Tensor]] = [{}]
    num_bytes = 0
    for name, tensor in state.items():
        if files[-1] and num_bytes + tensor.nbytes > MAX_FILE_BYTES:
            files.append({})
            num_bytes = 0
        files[-1][name] = tensor
        num_bytes += tensor.nbytes
    return files


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush_and_hash(file: Path) -> str:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()
