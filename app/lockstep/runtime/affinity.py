"""Assign to every rank of a node its own share of the cores, and its own GPU.

Without a binding (`horovodrun` passes `--bind-to none`) the kernel moves ranks between cores, which costs a third of
the speed on a machine without a spare core. Here a *core* is a physical one, and its *CPUs* are the hardware threads
that Linux numbers.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

Cpus = frozenset[int]
Core = tuple[int, int, int]
"""(NUMA node, package, core): sorts neighbouring cores together."""

LOWEST_PRIORITY = 19
_SYSTEM = Path("/sys/devices/system")


def share_cores(pools: Sequence[Cpus], core_of: Mapping[int, Core]) -> list[Cpus]:
    """Divide a node's CPUs among its ranks.

    Ranks with the same pool divide it into runs of whole neighbouring cores, or of CPUs if there are more ranks than
    cores. A rank with a pool of its own keeps it, which respects a launcher's binding. If ranks outnumber the CPUs,
    each keeps the whole pool, and the kernel balances them.

    Args:
        pools: the CPUs that each local rank may run on, by local rank.
        core_of: the core of each CPU.
    """
    shares = list(pools)
    for pool in set(pools):
        ranks = [rank for rank, its_pool in enumerate(pools) if its_pool == pool]
        pieces = _whole_cores(pool, core_of)
        if len(ranks) > len(pieces):
            pieces = [[cpu] for core in pieces for cpu in core]
        if len(ranks) <= len(pieces):
            for index, rank in enumerate(ranks):
                mine = pieces[index * len(pieces) // len(ranks) : (index + 1) * len(pieces) // len(ranks)]
                shares[rank] = frozenset(cpu for piece in mine for cpu in piece)
    return shares


def num_cores(cpus: Cpus, core_of: Mapping[int, Core]) -> int:
    """How many cores `cpus` belong to."""
    return len(_whole_cores(cpus, core_of))


def choose_gpus(visible: Sequence[Sequence[str]]) -> list[int | None]:
    """Choose for each local rank, among the GPUs that it sees, the number of the one that fewest ranks before it use.

    It works whether a scheduler shows all GPUs to all ranks, or to each rank only its own, as number 0.

    Args:
        visible: the UUIDs of the GPUs that each local rank sees, in the order of its device numbers.
    """
    taken: dict[str, int] = {}
    chosen: list[int | None] = []
    for uuids in visible:
        if uuids:
            uuid = min(uuids, key=lambda uuid: taken.get(uuid, 0))
            taken[uuid] = taken.get(uuid, 0) + 1
            chosen.append(uuids.index(uuid))
        else:
            chosen.append(None)
    return chosen


def allowed_cpus() -> Cpus:
    """The CPUs that the calling thread may run on now."""
    return frozenset(os.sched_getaffinity(0))


def pin(cpus: Cpus) -> None:
    """Bind the calling thread, and the threads that it starts later, to `cpus`."""
    with suppress(OSError):  # a container may forbid it; the printed map of CPUs shows the result
        os.sched_setaffinity(0, cpus)


def pin_all_threads(cpus: Cpus) -> None:
    """Bind every present thread of this process to `cpus`."""
    for thread in _threads():
        with suppress(OSError):  # it has ended, or the container forbids it
            os.sched_setaffinity(thread, cpus)


def read_topology(cpus: Cpus) -> dict[int, Core]:
    """The core of each of `cpus`; if Linux does not tell, each counts as a core."""
    return {cpu: _core_of(cpu) for cpu in cpus}


def cpus_near(pci_address: str) -> Cpus:
    """The CPUs of the NUMA node of a GPU, by its address such as `0000:1b:00.0`; none if Linux does not tell."""
    try:
        return _parse_cpu_list(Path(f"/sys/bus/pci/devices/{pci_address}/local_cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()


@contextmanager
def threads_at_lowest_priority() -> Iterator[None]:
    """Give the lowest priority to threads that this process starts inside.

    For Horovod's thread, which polls for work and for the other ranks: at normal priority it takes 1 to 2 % of a core
    from a rank that computes there, at the lowest a tenth of that. While the rank waits for it, the thread has
    the core to itself.
    """
    before = _threads()
    yield
    for thread in _threads() - before:
        with suppress(OSError):  # it has ended, or the container forbids it
            os.setpriority(os.PRIO_PROCESS, thread, LOWEST_PRIORITY)


def format_cpus(cpus: Sequence[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3 and 8."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _whole_cores(cpus: Cpus, core_of: Mapping[int, Core]) -> list[list[int]]:
    cores: dict[Core, list[int]] = {}
    for cpu in sorted(cpus):
        cores.setdefault(core_of[cpu], []).append(cpu)
    return [cores[core] for core in sorted(cores)]


def _core_of(cpu: int) -> Core:
    folder = _SYSTEM / f"cpu/cpu{cpu}"
    try:
        package, core = (int((folder / "topology" / name).read_text()) for name in ("physical_package_id", "core_id"))
    except (OSError, ValueError):
        return (0, 0, cpu)
    nodes = [int(path.name.removeprefix("node")) for path in folder.glob("node[0-9]*")]
    return (min(nodes, default=0), package, core)


def _parse_cpu_list(text: str) -> Cpus:
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def _threads() -> set[int]:
    return {int(thread.name) for thread in Path("/proc/self/task").iterdir()}
