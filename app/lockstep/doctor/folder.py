"""Probe the folder that runs are written to: on each node by itself, then whether all nodes see the same files."""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lockstep.doctor.facts import Folder, View

FSYNC_BYTES = 1 << 20
SECONDS_TO_SEE = 1.0
SECONDS_BETWEEN_POLLS = 0.005


def probe_folder(folder: Path) -> Folder:
    """Try every file operation that a checkpoint needs in `folder`, or in its nearest parent that exists.

    All is done in a temporary folder, which is removed.
    """
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    kind = file_system_of(path)
    trial = path / f".lockstep-doctor-{secrets.token_hex(4)}"
    operation = "make a folder"
    try:
        trial.mkdir()
        operation = "write"
        started = time.monotonic()
        with (trial / "new").open("wb") as file:
            file.write(os.urandom(FSYNC_BYTES))
            file.flush()
            operation = "make it safe (fsync)"
            os.fsync(file.fileno())
            fsync_seconds = time.monotonic() - started
            clock_ahead = os.fstat(file.fileno()).st_mtime - time.time()
            has_locks = _has_locks(file.fileno())
        operation = "rename"
        (trial / "old").write_bytes(b"old")
        (trial / "new").replace(trial / "old")
        operation = "read back"
        if (trial / "old").stat().st_size != FSYNC_BYTES:
            return Folder(str(path), kind, "what was renamed is not what was written")
        space = os.statvfs(path)
    except OSError as error:
        return Folder(str(path), kind, f"cannot {operation}: {error.strerror}")
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return Folder(
        path=str(path),
        kind=kind,
        wrong="",
        fsync_seconds=fsync_seconds,
        has_locks=has_locks,
        free=space.f_bavail * space.f_frsize,
        free_files=space.f_favail if space.f_files else None,
        clock_ahead=clock_ahead,
    )


def file_system_of(path: Path) -> str:
    """The type of the file system that `path` lies on, such as `nfs4`."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    points = {mount[1].encode().decode("unicode_escape"): mount[2] for mount in mounts}
    parents = [str(parent) for parent in (path.resolve(), *path.resolve().parents)]
    return next((points[parent] for parent in parents if parent in points), "unknown")


def compare_views(trial: Path, node: int, names: Sequence[str], barrier: Callable[[], object]) -> list[View]:
    """Collective over one rank per node: write a file, and measure when the other nodes' files become visible.

    The first node looks for every other node's file, and these for the first one's. Then each file is replaced, and the
    same is measured again.

    Args:
        trial: a temporary folder, which is created and removed.
        node: this node's index in `names`.
        barrier: returns once all nodes have called it.
    """
    others = range(1, len(names)) if node == 0 else range(1)
    seen: list[dict[int, float]] = []
    try:
        with suppress(OSError):
            trial.mkdir(parents=True, exist_ok=True)
        for version in ("new", "replaced"):
            with suppress(OSError):
                _write_atomically(trial, node, version)
            barrier()
            seen.append(_seconds_until_seen(trial, seen[0] if seen else others, version))
            barrier()
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return [View(names[node], names[other], *(when.get(other) for when in seen)) for other in others]


def _write_atomically(trial: Path, node: int, version: str) -> None:
    new = trial / f"{node}.new"
    new.write_text(version)
    new.replace(trial / str(node))


def _seconds_until_seen(trial: Path, others: Iterable[int], version: str) -> dict[int, float]:
    """By node of `others`: when its file was seen to hold `version`; without those that were not within
    `SECONDS_TO_SEE`.
    """
    started = time.monotonic()
    seen: dict[int, float] = {}
    missing = list(others)
    while missing and time.monotonic() - started < SECONDS_TO_SEE:
        for other in missing:
            with suppress(OSError):
                if (trial / str(other)).read_text() == version:
                    seen[other] = time.monotonic() - started
        missing = [other for other in missing if other not in seen]
        if missing:
            time.sleep(SECONDS_BETWEEN_POLLS)
    return seen


def _has_locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
