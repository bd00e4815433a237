"""What is measured between ranks: how fast each one computes, the links between nodes, their clocks."""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lockstep.comm.mpi_library import MPI
from lockstep.doctor.deadline_comm import MissingError, spin
from lockstep.doctor.facts import Clock, Link, Speed
from lockstep.doctor.round_robin import plan_rounds

SECONDS_TO_COMPUTE = 0.5
MATRIX_SIZE = 192
MAX_ROUNDS = 6
SECONDS_FOR_LINKS = 2.4
NUM_PINGS, SECONDS_TO_REPEAT = 20, 0.1
SMALLEST_BYTES, LARGEST_BYTES = 1 << 18, 1 << 23
TRIES, SECONDS_TO_SEND = 2, 0.25
CLOCK_TAG, LINK_TAG = 1, 100


@cache
def prepare_to_compute() -> Any:
    """What is multiplied, with numpy loaded for one thread, which takes a moment; None where it does not load."""
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"))
    try:
        import numpy as np

        return np.full((MATRIX_SIZE, MATRIX_SIZE), 1 / MATRIX_SIZE, dtype=np.float32)
    except (ImportError, AttributeError):  # another one on PYTHONPATH
        return None


def measure_speed() -> Speed | None:
    """How fast this thread multiplies matrices. All ranks do so at once, as in training. None without numpy."""
    matrix = prepare_to_compute()
    if matrix is None:
        return None
    wall, cpu, num_products = time.perf_counter(), time.thread_time(), 0
    while (seconds := time.perf_counter() - wall) < SECONDS_TO_COMPUTE:
        matrix = matrix @ matrix
        num_products += 1
    cpu_seconds = max(time.thread_time() - cpu, 1e-6)
    return Speed(num_products * 2 * MATRIX_SIZE**3 / cpu_seconds, min(1.0, cpu_seconds / seconds))


def compare_clocks(heads: Sequence[int], names: Sequence[str], deadline: float) -> dict[str, Clock]:
    """Collective over `heads`, one rank of each node: on the first, how far every other node's clock is ahead.

    Of several round trips the shortest counts: the other clock was read within it.

    Args:
        names: of the nodes.
    """
    if MPI.COMM_WORLD.rank != heads[0]:
        return _tell_time(heads[0], deadline)
    return {name: _compare_clock(head, deadline) for head, name in zip(heads[1:], names[1:], strict=True)}


def measure_links(heads: Sequence[int], names: Sequence[str], deadline: float) -> tuple[list[Link], bool]:
    """Collective over `heads`, one rank of each node: the links that this rank was the first one of, and whether all
    that was begun with the others has ended.

    In each round every node has one partner, and all pairs measure at once: each pair of nodes where they are few, six
    partners for each node where they are many.
    """
    me = heads.index(MPI.COMM_WORLD.rank)
    rounds = plan_rounds(len(heads))[:MAX_ROUNDS]
    links, has_ended = [], True
    for index, pairs in enumerate(rounds):
        pair = next((pair for pair in pairs if me in pair), None)
        if pair is None:
            continue
        first, second = pair
        other = heads[second if me == first else first]
        until = min(deadline, time.monotonic() + SECONDS_FOR_LINKS / len(rounds))
        found = Found()
        try:
            if me == first:
                _drive(other, LINK_TAG + index, until, found)
            else:
                _echo(other, LINK_TAG + index, until)
        except MissingError:
            has_ended = False
        if me == first:
            links.append(Link(names[first], names[second], found.latency, found.rate))
    return links, has_ended


@dataclass
class Found:
    """What is known of a link so far."""

    latency: float | None = None
    rate: float = 0.0


def _compare_clock(head: int, deadline: float) -> Clock:
    best: Clock | None = None
    for is_last in _times(NUM_PINGS):
        theirs = bytearray(8)
        before = time.time_ns()
        spin([MPI.COMM_WORLD.Isend(bytes([is_last]), head, CLOCK_TAG)], head, deadline)
        spin([MPI.COMM_WORLD.Irecv(theirs, head, CLOCK_TAG)], head, deadline)
        after = time.time_ns()
        there = int.from_bytes(theirs, "little")
        clock = Clock((there - (before + after) / 2) / 1e9, (after - before) / 2e9)
        best = clock if best is None or clock.error < best.error else best
    assert best
    return best


def _tell_time(first: int, deadline: float) -> dict[str, Clock]:
    is_last = bytearray(1)
    while not is_last[0]:
        spin([MPI.COMM_WORLD.Irecv(is_last, first, CLOCK_TAG)], first, deadline)
        spin([MPI.COMM_WORLD.Isend(time.time_ns().to_bytes(8, "little"), first, CLOCK_TAG)], first, deadline)
    return {}


def _times(number: int) -> Iterator[bool]:
    """Whether this is the last time: the `number`th, or when `SECONDS_TO_REPEAT` are over."""
    until = time.monotonic() + SECONDS_TO_REPEAT
    for left in reversed(range(number)):
        is_last = left == 0 or time.monotonic() > until
        yield is_last
        if is_last:
            return


def _drive(other: int, tag: int, deadline: float, found: Found) -> None:
    """Measure the link to `other`, which echoes: each message is announced by its size; 0 ends it."""
    found.latency = _round_trip(other, tag, bytearray(1), deadline) / 2  # makes the connection
    pings = [_round_trip(other, tag, bytearray(1), deadline) for _ in _times(NUM_PINGS)]
    found.latency = statistics.median(pings) / 2
    data = memoryview(bytearray(LARGEST_BYTES))
    sizes = [size for size in (SMALLEST_BYTES << power for power in range(32)) if size <= LARGEST_BYTES]
    until = time.monotonic() + SECONDS_TO_SEND
    rates: list[float] = []
    for size in [size for size in sizes for _ in range(TRIES)]:
        rates.append(2 * size * 8 / _round_trip(other, tag, data[:size], deadline))
        # Of the last and largest ones, the best: what delays a message is no property of the link.
        found.rate = max(rates[-TRIES:])
        if time.monotonic() > until:
            break
    _announce(other, tag, 0, deadline)


def _round_trip(other: int, tag: int, data: bytearray | memoryview, deadline: float) -> float:
    """Seconds that `data` takes there and back, its announcement excluded."""
    comm = MPI.COMM_WORLD
    _announce(other, tag, len(data), deadline)
    started = time.perf_counter()
    spin([comm.Isend(data, other, tag)], other, deadline)
    spin([comm.Irecv(data, other, tag)], other, deadline)
    return time.perf_counter() - started


def _announce(other: int, tag: int, size: int, deadline: float) -> None:
    """The other one says that it is ready, so that nothing waits for it later."""
    comm = MPI.COMM_WORLD
    ready = bytearray(1)
    spin([comm.Isend(size.to_bytes(8, "little"), other, tag), comm.Irecv(ready, other, tag)], other, deadline)


def _echo(other: int, tag: int, deadline: float) -> None:
    comm = MPI.COMM_WORLD
    data = bytearray(LARGEST_BYTES)
    while True:
        announced = bytearray(8)
        spin([comm.Irecv(announced, other, tag)], other, deadline)
        size = int.from_bytes(announced, "little")
        view = memoryview(data)[:size]
        coming = comm.Irecv(view, other, tag)
        spin([comm.Isend(b"!", other, tag)], other, deadline)
        if size == 0:
            return
        spin([coming], other, deadline)
        spin([comm.Isend(view, other, tag)], other, deadline)
