"""Tries the folder that runs are written to: on each node alone, then whether all nodes see the same there."""

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
SECONDS_A_LOOK = 0.005


def try_folder(folder: Path) -> Folder:
    """Whether runs can be written to `folder`, which is made if it is missing, with all that a checkpoint needs."""
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    kind = file_system_of(path)
    trial = path / f".lockstep-doctor-{secrets.token_hex(4)}"
    doing = "make a folder"
    try:
        trial.mkdir()
        doing = "write"
        started = time.monotonic()
        with (trial / "new").open("wb") as file:
            file.write(os.urandom(FSYNC_BYTES))
            file.flush()
            doing = "make it safe (fsync)"
            os.fsync(file.fileno())
            fsync_seconds = time.monotonic() - started
            clock_ahead = os.fstat(file.fileno()).st_mtime - time.time()
            has_locks = _has_locks(file.fileno())
        doing = "rename"
        (trial / "old").write_bytes(b"old")
        (trial / "new").replace(trial / "old")
        doing = "read back"
        if (trial / "old").stat().st_size != FSYNC_BYTES:
            return Folder(str(path), kind, "what was renamed is not what was written")
        room = os.statvfs(path)
    except OSError as error:
        return Folder(str(path), kind, f"cannot {doing}: {error.strerror}")
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return Folder(
        path=str(path),
        kind=kind,
        wrong="",
        fsync_seconds=fsync_seconds,
        has_locks=has_locks,
        free=room.f_bavail * room.f_frsize,
        free_files=room.f_favail if room.f_files else None,
        clock_ahead=clock_ahead,
    )


def file_system_of(path: Path) -> str:
    """The kind of the one that `path` lies on, such as `nfs4`."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    points = {mount[1].encode().decode("unicode_escape"): mount[2] for mount in mounts}
    around = [str(parent) for parent in (path.resolve(), *path.resolve().parents)]
    return next((points[parent] for parent in around if parent in points), "unknown")


def see_the_same(trial: Path, node: int, names: Sequence[str], all_are_here: Callable[[], object]) -> list[View]:
    """On every node at once: write a file, see the first node's, and on the first, everybody's; then the same with
    files that replace them.

    Args:
        trial: a folder that is made for it, and removed.
        node: which of `names` this is.
        all_are_here: a barrier, which says that all have written.
    """
    others = range(1, len(names)) if node == 0 else range(1)
    seen: list[dict[int, float]] = []
    try:
        with suppress(OSError):
            trial.mkdir(parents=True, exist_ok=True)
        for version in ("new", "replaced"):
            with suppress(OSError):
                _write_whole(trial, node, version)
            all_are_here()
            seen.append(_seconds_until_seen(trial, seen[0] if seen else others, version))
            all_are_here()
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return [View(names[node], names[other], *(when.get(other) for when in seen)) for other in others]


def _write_whole(trial: Path, node: int, version: str) -> None:
    new = trial / f"{node}.new"
    new.write_text(version)
    new.replace(trial / str(node))


def _seconds_until_seen(trial: Path, others: Iterable[int], version: str) -> dict[int, float]:
    """Of those of `others` whose file was seen to be `version` in time."""
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
            time.sleep(SECONDS_A_LOOK)
    return seen


def _has_locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
