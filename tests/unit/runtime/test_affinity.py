"""The cores and GPUs of ranks, as pure functions of what Linux and the drivers report."""

import os
import subprocess
import sys
import threading

import pytest

from lockstep.runtime.affinity import (
    LOWEST_PRIORITY,
    allowed_cpus,
    choose_gpus,
    format_cpus,
    num_cores,
    read_topology,
    share_cores,
    threads_at_lowest_priority,
)

# Two packages of four cores with two CPUs each, numbered as Linux does: CPU 8 is the second of CPU 0's core.
TOPOLOGY = {cpu: (cpu % 8 // 4, cpu % 8 // 4, cpu % 8) for cpu in range(16)}
ALL = frozenset(range(16))


def test_unbound_ranks_divide_whole_cores_among_neighbours() -> None:
    assert share_cores([ALL] * 2, TOPOLOGY) == [{0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}]
    assert share_cores([ALL] * 8, TOPOLOGY)[3] == {3, 11}
    assert share_cores([ALL], TOPOLOGY) == [ALL]


def test_every_cpu_goes_to_one_rank_where_they_do_not_divide() -> None:
    shares = share_cores([ALL] * 3, TOPOLOGY)
    assert sorted(cpu for share in shares for cpu in share) == sorted(ALL)
    assert [num_cores(share, TOPOLOGY) for share in shares] == [2, 3, 3]


def test_more_ranks_than_cores_get_a_cpu_each_and_more_than_cpus_share_all() -> None:
    assert share_cores([ALL] * 16, TOPOLOGY)[:3] == [{0}, {8}, {1}]
    assert share_cores([ALL] * 17, TOPOLOGY) == [ALL] * 17


def test_a_launchers_own_binding_is_respected() -> None:
    bound = [frozenset({0}), frozenset({5, 6})]
    assert share_cores(bound, TOPOLOGY) == bound
    by_package = [frozenset(range(4)), frozenset(range(4)), frozenset(range(4, 8)), frozenset(range(4, 8))]
    assert share_cores(by_package, TOPOLOGY) == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        ([["a", "b"], ["a", "b"]], [0, 1]),
        ([["a"], ["b"]], [0, 0]),  # a scheduler shows each rank its own as number 0
        ([["a", "b"], ["b", "a"], ["a", "b"]], [0, 0, 0]),  # the third must share: the cluster refuses it
        ([["a", "b"], ["c", "d"]], [0, 0]),
        ([[], []], [None, None]),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own_if_it_can(visible: list[list[str]], chosen: list[int | None]) -> None:
    assert choose_gpus(visible) == chosen


def test_this_machine_has_a_topology() -> None:
    cpus = allowed_cpus()
    assert 1 <= num_cores(cpus, read_topology(cpus)) <= len(cpus)


@pytest.mark.parametrize(("cpus", "text"), [([], ""), ([3], "3"), ([8, 0, 1, 2], "0-2,8"), ([0, 2, 4], "0,2,4")])
def test_cpus_are_formatted_as_ranges(cpus: list[int], text: str) -> None:
    assert format_cpus(cpus) == text


def test_only_threads_started_inside_get_the_lowest_priority() -> None:
    end = threading.Event()
    outside = threading.Thread(target=end.wait)
    outside.start()
    with threads_at_lowest_priority():
        inside = threading.Thread(target=end.wait)
        inside.start()
    try:
        assert inside.native_id is not None
        assert outside.native_id is not None
        assert os.getpriority(os.PRIO_PROCESS, inside.native_id) == LOWEST_PRIORITY
        assert os.getpriority(os.PRIO_PROCESS, outside.native_id) < LOWEST_PRIORITY
    finally:
        end.set()
        inside.join()
        outside.join()


def test_freed_memory_is_used_again_without_page_faults() -> None:
    """In a child process, since it cannot be undone: with 8 MiB blocks, which glibc would map anew each time."""
    code = """
import resource, torch
from lockstep.runtime.resources import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        kept = [torch.ones(2 << 20) for _ in range(3)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""
    before, after = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert int(after) < int(before) / 10
