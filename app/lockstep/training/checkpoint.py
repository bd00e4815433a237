"""Checkpoints that do not depend on the number of ranks: tensors by name, and a manifest with the hash of each file.

    checkpoints/000000000126/
        manifest.json                       counters, shapes, the sha256 of each file, and its own
        rank00000-00000.safetensors         what rank 0 held: whole tensors, and slices of tensors
        rank00001-00000.safetensors         ...
A slice is flat and named after its elements, `model/fc1.weight[589824:1179648]`. Every rank writes its own files into a
folder with a temporary name and flushes them to the disk; then rank 0 adds the manifest and renames the folder, so that
a checkpoint is complete or does not exist.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lockstep.parallel.tensor_slices import Shard, State, TensorState, whole_tensors
from lockstep.runtime.errors import StorageError
from lockstep.settings.old_names import NEW_NAMES
from lockstep.training.run_folder import flush_folder, storage_errors

FORMAT = 3
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
MAX_FILE_BYTES = 2**30
TEMPORARY = ".writing-"
NEW_COUNTERS = {"must_stay": "immutable_settings", "window_of_ranks": "metric_sums_of_ranks"}  # old name: new name


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk that was verified: a `SavedState`.

    Attributes:
        step: optimizer steps done.
        counters: everything else that is needed to resume, as it was given to `commit`.
        shapes: of all tensors, by name.
    """

    path: Path
    step: int
    counters: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def load(self) -> dict[str, Tensor]:
        """Read all tensors, onto the CPU."""
        return whole_tensors(self)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read elements start ... stop - 1 of a tensor, (n,), onto the CPU, and no others.

        Raises:
            StorageError: the files do not have them all.
        """
        stop = torch.Size(self.shapes[name]).numel() if stop is None else stop
        parts = self.parts(name, start, stop)
        num_found = sum(len(part) for part in parts)
        if not parts or num_found != stop - start:
            raise StorageError(f"{self.path} holds {num_found} of the elements {start} ... {stop - 1} of {name}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, name: str, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Read the saved slices of a tensor, flat and in order; of each, what lies in start ... stop - 1."""
        parts = []
        for begin, end, file, key in self._places[name]:
            last = end if stop is None else min(stop, end)
            with storage_errors(), safetensors.safe_open(file, framework="pt") as opened:
                values = opened.get_tensor(key).reshape(-1)  # a view of the file: only what is cloned is read
                parts.append(values[max(start - begin, 0) : max(last - begin, 0)].clone())
        return parts

    @cached_property
    def _places(self) -> dict[str, list[tuple[int, int, Path, str]]]:
        """Where the slices of each tensor are, in order: (start, stop, file, key)."""
        places: dict[str, list[tuple[int, int, Path, str]]] = {name: [] for name in self.shapes}
        for file in sorted(self.path.glob("*.safetensors")):
            with storage_errors(), safetensors.safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
            for key in keys:
                name, start, stop = _parse_key(key, self.shapes)
                places[name].append((start, stop, file, key))
        return {name: sorted(of_tensor) for name, of_tensor in places.items()}


class InMemoryCheckpoint(TensorState):
    """What a checkpoint holds, in rank 0's memory; the other ranks have names and shapes without values.

    Attributes:
        step, counters: as a checkpoint's.
        path: where it comes from, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], step: int, counters: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.step = step
        self.counters = counters
        self.path = "the memory of the ranks before"


@dataclass(frozen=True)
class Written:
    """What one rank has written of a checkpoint that is not yet committed."""

    files: dict[str, dict[str, Any]]
    shapes: dict[str, tuple[int, ...]]


def write_parts(folder: Path, step: int, state: State, rank: int = 0) -> Written:
    """Write what one rank holds, for `commit`. A rank with nothing to write does not touch the folder.

    Raises:
        StorageError: it could not be written.
    """
    if not state:
        return Written({}, {})
    temporary = folder / f"{TEMPORARY}{step:012d}"
    files = {}
    with storage_errors():
        temporary.mkdir(exist_ok=True)
        for index, tensors in enumerate(_by_file(state)):
            name = f"rank{rank:05d}-{index:05d}.safetensors"
            safetensors.torch.save_file(_without_sharing(tensors), temporary / name)
            files[name] = {"sha256": _flush_and_hash(temporary / name), "bytes": (temporary / name).stat().st_size}
        flush_folder(temporary)
    return Written(files, {name: tuple(part.shape) for name, part in state.items()})


def commit(
    folder: Path,
    step: int,
    written: Sequence[Written],
    counters: Mapping[str, Any],
    keep: int,
    best: Collection[int] = (),
) -> Path:
    """Commit what all ranks have `written` as a checkpoint, and remove earlier ones as `remove_others` does.

    Raises:
        StorageError: it could not be written; nothing of it is left, and earlier ones are intact.
    """
    final = folder / f"{step:012d}"
    temporary = folder / f"{TEMPORARY}{step:012d}"
    manifest = {
        "format": FORMAT,
        "step": step,
        "counters": dict(counters),
        "shapes": {name: shape for of_rank in written for name, shape in of_rank.shapes.items()},
        "files": {name: vouched for of_rank in written for name, vouched in of_rank.files.items()},
    }
    with storage_errors():
        try:
            (temporary / MANIFEST).write_text(json.dumps({**manifest, "sha256": _manifest_hash(manifest)}, indent=1))
            _flush_and_hash(temporary / MANIFEST)
            flush_folder(temporary)
            _remove([final])  # of an attempt that was replaced by one from an earlier checkpoint
            temporary.rename(final)
            flush_folder(folder)
        finally:
            discard(folder, step)
        # Later ones are of an attempt that this one has replaced: they were not intact.
        _remove([path for path in _checkpoints(folder) if int(path.name) > step])
        remove_others(folder, keep, best)
    return final


def remove_others(folder: Path, keep: int, best: Collection[int] = ()) -> None:
    """Remove all checkpoints but the last `keep`, and those of the updates `best`.

    Raises:
        StorageError: they cannot be removed.
    """
    with storage_errors():
        _remove([path for path in _checkpoints(folder)[:-keep] if int(path.name) not in best])


def discard(folder: Path, step: int) -> None:
    """Remove what has been written of a checkpoint that cannot be committed."""
    shutil.rmtree(folder / f"{TEMPORARY}{step:012d}", ignore_errors=True)


def discard_leftovers(folder: Path) -> None:
    """Remove what a killed writer has left incomplete."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(paths: list[Path]) -> None:
    """Rename folders before removing them, so that a kill leaves nothing that looks like a checkpoint."""
    for path in paths:
        if path.exists():
            out_of_sight = path.with_name(f"{TEMPORARY}{path.name}-old")
            path.rename(out_of_sight)
            shutil.rmtree(out_of_sight, ignore_errors=True)


def latest_checkpoint(run: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """Find the last intact checkpoint of `run`; tell of each truncated or altered one after it, and skip it.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        StorageError: there are checkpoints, and none of them is intact.
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


def first_checkpoint(run: Path, steps: Sequence[int]) -> Checkpoint | None:
    """Verify the first checkpoint of `steps` that there is.

    Raises:
        StorageError: it is truncated or was altered.
    """
    paths = (run / FOLDER / f"{step:012d}" for step in steps)
    path = next((path for path in paths if path.exists()), None)
    return verify_checkpoint(path) if path else None


def verify_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint at `path`, and verify the hash of every file.

    Raises:
        StorageError: it is truncated or was altered; names the file.
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
    shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
    return Checkpoint(path, manifest["step"], _with_new_names(manifest["counters"]), shapes)


def _with_new_names(counters: Mapping[str, Any]) -> dict[str, Any]:
    """Rename counters, and settings in them, that the release before called otherwise."""
    renamed = {NEW_COUNTERS.get(name, name): value for name, value in counters.items()}
    if settings := renamed.get("immutable_settings"):
        renamed["immutable_settings"] = {NEW_NAMES.get(name, name): value for name, value in settings.items()}
    return renamed


def list_checkpoints(run: Path) -> list[Path]:
    """List all checkpoints of `run`, intact or not, the oldest first."""
    return _checkpoints(run / FOLDER)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdigit())


def _key(name: str, part: Shard) -> str:
    return name if part.is_whole else f"{name}[{part.start}:{part.start + part.values.numel()}]"


def _parse_key(key: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int, int]:
    """Split a key into the tensor's name, and start and stop of its elements."""
    if key not in shapes and (match := re.fullmatch(r"(.*)\[(\d+):(\d+)\]", key)) and match[1] in shapes:
        return match[1], int(match[2]), int(match[3])
    return key, 0, torch.Size(shapes[key]).numel()


def _by_file(state: State) -> Iterator[dict[str, Tensor]]:
    """Divide `state` into files of at most MAX_FILE_BYTES, or of one tensor."""
    tensors: dict[str, Tensor] = {}
    num_bytes = 0
    for name, part in state.items():
        if tensors and num_bytes + part.values.nbytes > MAX_FILE_BYTES:
            yield tensors
            tensors, num_bytes = {}, 0
        tensors[_key(name, part)] = part.values.detach().cpu().contiguous()
        num_bytes += part.values.nbytes
    if tensors:
        yield tensors


def _without_sharing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that share memory (tied weights), which the format does not allow."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush_and_hash(file: Path) -> str:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()
