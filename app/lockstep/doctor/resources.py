"""What of this node a process may use: CPUs, memory, shared memory, InfiniBand. Sizes are in bytes."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from lockstep.doctor.facts import Unknown

_CGROUPS = Path("/sys/fs/cgroup")


def num_cpus_of_job(environment: Mapping[str, str]) -> int:
    """The CPUs of this node that the job may use; a binding of its processes does not count."""
    if environment.get("SLURM_CPUS_ON_NODE", "").isdigit():
        return int(environment["SLURM_CPUS_ON_NODE"])
    for file in _files_of_cgroups("cpuset", "cpuset.cpus.effective", "cpuset.effective_cpus"):
        ranges = [part.partition("-") for part in file.read_text().strip().split(",") if part]
        if ranges:
            return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)
    return os.cpu_count() or 1


def memory_left() -> int:
    """What all processes of this node can still have, by the kernel and by the limits of this one's cgroups."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    room = int(lines["MemAvailable"].split()[0]) << 10
    folders = {file.parent for file in _files_of_cgroups("memory", "memory.max", "memory.limit_in_bytes")}
    return min([room, *map(room_in, folders)])


def shared_memory() -> tuple[int, int] | Unknown:
    """Size and free space of /dev/shm."""
    try:
        shm = os.statvfs("/dev/shm")
    except OSError as error:
        return Unknown(f"/dev/shm: {error.strerror}")
    return shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize


def infiniband_rates() -> dict[str, float]:
    """Bit/s of each active port of InfiniBand, Omni-Path or RoCE."""
    found = {}
    for port in Path("/sys/class/infiniband").glob("*/ports/*"):
        try:
            if "ACTIVE" in (port / "state").read_text():
                found[f"{port.parents[1].name}:{port.name}"] = float((port / "rate").read_text().split()[0]) * 1e9
        except (OSError, ValueError, IndexError):
            continue
    return found


def room_in(folder: Path) -> int:
    """What a cgroup's limit leaves; without one, as good as endless."""
    try:
        limit = next(folder / name for name in ("memory.max", "memory.limit_in_bytes") if (folder / name).exists())
        used = next(folder / name for name in ("memory.current", "memory.usage_in_bytes") if (folder / name).exists())
        stat = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(stat.get("inactive_file", "0"))  # is given back when it is needed
        return max(0, int(limit.read_text()) - int(used.read_text()) + cache)
    except (OSError, ValueError, StopIteration):
        return sys.maxsize


def _files_of_cgroups(controller: str, *names: str) -> list[Path]:
    """The files of one of `names` of the cgroups that this process is in, the nearest first; of version 1 or 2."""
    found: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        inner = root / path.lstrip("/")
        around = [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
        found += [folder / name for folder in around for name in names if (folder / name).is_file()]
    return found
