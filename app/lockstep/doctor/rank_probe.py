"""Measure what only the ranks together can show: each one's speed, the links and clocks of nodes, the shared folder.

Importing this module starts MPI and makes the process a rank.
"""

import os
import secrets
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lockstep.comm.mpi_library import MPI, mpi_built_with, mpi_version
from lockstep.doctor.deadline_comm import DeadlineComm, MissingRanksError, spin_until_done
from lockstep.doctor.facts import Clock, Folder, Link, LocalFacts, MpiFacts, RankFacts, Speed
from lockstep.doctor.folder import compare_views
from lockstep.doctor.local_facts import MPI_LIBRARIES, loaded_files
from lockstep.runtime.affinity import Core, Cpus, pin, share_cores

CLOCK_TAG, FACTS_TAG, ALL_TAG, LEADERS_TAG, LINK_TAG = 1, 2, 3, 4, 100  # links: this one and those above
SECONDS_TO_COMPUTE = 0.5
MATRIX_SIZE = 192
MAX_ROUNDS = 6
SECONDS_FOR_LINKS = 2.4
NUM_PINGS, SECONDS_TO_REPEAT = 20, 0.1
SMALLEST_BYTES, LARGEST_BYTES = 1 << 18, 1 << 23
NUM_TRIES, SECONDS_TO_SEND = 2, 0.25


@dataclass(frozen=True)
class Plan:
    """Who measures what, decided by rank 0 from the facts of all ranks.

    Attributes:
        nodes: the ranks of each node, by its name; the first of them is the node's leader.
        shares: the CPUs of each rank, as Lockstep divides them.
        trial: a temporary folder to create in the shared folder; None if a node cannot write there.
    """

    nodes: dict[str, list[int]]
    shares: dict[int, Cpus]
    trial: Path | None


def run_rank_probe(connection: Connection, gather_until: float, measure_until: float) -> None:
    """Collective: measure together with the other ranks, and send the results as parts of `Facts`.

    Rank 0 sends those of all ranks. Before each step, `activity` says what comes next, so that the supervisor can name
    the step that hangs.

    Args:
        connection: to the supervisor, which sends this process's `LocalFacts` as soon as it has them.
        gather_until: when to give up waiting for the facts of all ranks, as `time.monotonic` counts.
        measure_until: when all measurements must be done.
    """
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    mpi = MpiFacts(rank, size, mpi_version(), mpi_built_with(), loaded_files(*MPI_LIBRARIES))
    connection.send({"mpi": mpi})
    prepare_to_compute()
    local: LocalFacts = connection.recv()
    connection.send({"activity": "waiting for all ranks to answer"})
    facts_comm = DeadlineComm(range(size), FACTS_TAG, gather_until)
    all_comm = DeadlineComm(range(size), ALL_TAG, measure_until)
    try:
        facts = _gather_facts(connection, facts_comm, RankFacts(local, mpi))
        plan: Plan = all_comm.broadcast(make_plan(facts) if facts else None)
        names, leaders = list(plan.nodes), [ranks[0] for ranks in plan.nodes.values()]

        connection.send({"activity": "computing, all at once"})
        pin(plan.shares[rank])
        all_comm.barrier()
        speeds = all_comm.gather(measure_speed())
        connection.send({"speeds": {rank: speed for rank, speed in speeds.items() if speed}})

        connection.send({"activity": "comparing clocks"})
        if rank in leaders:
            connection.send({"clocks": compare_clocks(leaders, names, measure_until)})

        connection.send({"activity": "measuring links"})
        ends = leaders if len(leaders) > 1 else leaders + plan.nodes[names[0]][1:2]  # of one node: two of its ranks
        end_names = names if len(leaders) > 1 else names * len(ends)
        links = all_comm.gather(measure_links(ends, end_names, measure_until) if rank in ends else ([], True))
        connection.send({"links": [link for found, _ in links.values() for link in found]})

        connection.send({"activity": "checking whether all nodes see the same files in the shared folder"})
        local_views = []
        if plan.trial and len(leaders) > 1 and rank in leaders:
            leaders_comm = DeadlineComm(leaders, LEADERS_TAG, measure_until)
            local_views = compare_views(plan.trial, leaders.index(rank), names, leaders_comm.barrier)
            leaders_comm.wait_for_sends()
        views = all_comm.gather(local_views)
        connection.send({"views": [view for found in views.values() for view in found]})
        can_finalize = all_comm.broadcast(all(is_complete for _, is_complete in links.values()))
        for comm in (facts_comm, all_comm):
            comm.wait_for_sends()
        connection.send({"activity": "", "can_finalize": can_finalize})
    except MissingRanksError as error:
        connection.send({"missing": error.ranks if rank == 0 else (), "can_finalize": False})
        can_finalize = False
    if can_finalize:
        MPI.Finalize()
    else:
        signal.pause()  # if this rank exited now, MPI or the launcher would kill the ranks that still have to report


def _gather_facts(connection: Connection, comm: DeadlineComm, mine: RankFacts) -> dict[int, RankFacts]:
    """Collective: gather every rank's facts on rank 0. Even if some are missing, the supervisor gets the others'."""
    try:
        facts: dict[int, RankFacts] = comm.gather(mine)
    except MissingRanksError as error:
        connection.send({"ranks": error.found})
        raise
    connection.send({"ranks": facts})
    return facts


def make_plan(facts: dict[int, RankFacts]) -> Plan:
    nodes: dict[str, list[int]] = {}
    for rank, rank_facts in sorted(facts.items()):
        nodes.setdefault(rank_facts.local.node, []).append(rank)
    shares: dict[int, Cpus] = {}
    for ranks in nodes.values():
        cores: dict[int, Core] = {}
        for rank in ranks:
            cores.update(facts[rank].local.cores)
        shares.update(zip(ranks, share_cores([facts[rank].local.cpus for rank in ranks], cores), strict=True))
    facts_of_leaders = [facts[ranks[0]].local.node_facts for ranks in nodes.values()]
    folders = [found.folder for found in facts_of_leaders if found]
    all_work = len(folders) == len(nodes) and all(isinstance(each, Folder) and not each.wrong for each in folders)
    first = folders[0] if folders else None
    trial = None
    if all_work and isinstance(first, Folder):
        trial = Path(first.path) / f".lockstep-doctor-{secrets.token_hex(4)}"
    return Plan(nodes, shares, trial)


# -- speed -------------------------------------------------------------------------------------------------------------


@cache
def prepare_to_compute() -> Any:
    """The matrix to multiply. Imports numpy, limited to one thread; None if it cannot be imported."""
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"))
    try:
        import numpy as np

        return np.full((MATRIX_SIZE, MATRIX_SIZE), 1 / MATRIX_SIZE, dtype=np.float32)
    except (ImportError, AttributeError):  # PYTHONPATH has another package of this name
        return None


def measure_speed() -> Speed | None:
    """Measure how fast this thread multiplies matrices; all ranks do so at once, as in training. None without numpy."""
    matrix = prepare_to_compute()
    if matrix is None:
        return None
    wall, cpu, num_products = time.perf_counter(), time.thread_time(), 0
    while (seconds := time.perf_counter() - wall) < SECONDS_TO_COMPUTE:
        matrix = matrix @ matrix
        num_products += 1
    cpu_seconds = max(time.thread_time() - cpu, 1e-6)
    return Speed(num_products * 2 * MATRIX_SIZE**3 / cpu_seconds, min(1.0, cpu_seconds / seconds))


# -- clocks ------------------------------------------------------------------------------------------------------------


def compare_clocks(leaders: Sequence[int], names: Sequence[str], deadline: float) -> dict[str, Clock]:
    """Collective over `leaders`, one rank per node: on the first, how far every other node's clock is ahead.

    The shortest of several round trips is used: it bounds best when the other clock was read.

    Args:
        names: of the nodes.
    """
    if MPI.COMM_WORLD.rank != leaders[0]:
        return _answer_with_time(leaders[0], deadline)
    return {name: _compare_clock(leader, deadline) for leader, name in zip(leaders[1:], names[1:], strict=True)}


def _compare_clock(leader: int, deadline: float) -> Clock:
    best: Clock | None = None
    for is_last in _repeat(NUM_PINGS):
        answer = bytearray(8)
        before = time.time_ns()
        spin_until_done([MPI.COMM_WORLD.Isend(bytes([is_last]), leader, CLOCK_TAG)], leader, deadline)
        spin_until_done([MPI.COMM_WORLD.Irecv(answer, leader, CLOCK_TAG)], leader, deadline)
        after = time.time_ns()
        there = int.from_bytes(answer, "little")
        clock = Clock((there - (before + after) / 2) / 1e9, (after - before) / 2e9)
        best = clock if best is None or clock.error < best.error else best
    assert best
    return best


def _answer_with_time(root: int, deadline: float) -> dict[str, Clock]:
    is_last = bytearray(1)
    while not is_last[0]:
        spin_until_done([MPI.COMM_WORLD.Irecv(is_last, root, CLOCK_TAG)], root, deadline)
        now = time.time_ns().to_bytes(8, "little")
        spin_until_done([MPI.COMM_WORLD.Isend(now, root, CLOCK_TAG)], root, deadline)
    return {}


def _repeat(number: int) -> Iterator[bool]:
    """Yield at most `number` times, for at most `SECONDS_TO_REPEAT`: whether this time is the last."""
    until = time.monotonic() + SECONDS_TO_REPEAT
    for left in reversed(range(number)):
        is_last = left == 0 or time.monotonic() > until
        yield is_last
        if is_last:
            return


# -- links -------------------------------------------------------------------------------------------------------------


@dataclass
class LinkMeasurement:
    """What has been measured of a link so far: latency one way in seconds, rate in bit/s."""

    latency: float | None = None
    rate: float = 0.0


def measure_links(leaders: Sequence[int], names: Sequence[str], deadline: float) -> tuple[list[Link], bool]:
    """Collective over `leaders`, one rank per node: the links that this rank has measured, and whether no message is
    left under way.

    In each round every node has one partner, and all pairs measure at once. With few nodes, every pair is measured;
    with many, each node measures with `MAX_ROUNDS` partners.
    """
    index = leaders.index(MPI.COMM_WORLD.rank)
    rounds = round_robin(len(leaders))[:MAX_ROUNDS]
    links, is_complete = [], True
    for number, pairs in enumerate(rounds):
        pair = next((pair for pair in pairs if index in pair), None)
        if pair is None:
            continue
        first, second = pair
        other = leaders[second if index == first else first]
        until = min(deadline, time.monotonic() + SECONDS_FOR_LINKS / len(rounds))
        measured = LinkMeasurement()
        try:
            if index == first:
                _measure_link(other, LINK_TAG + number, until, measured)
            else:
                _echo(other, LINK_TAG + number, until)
        except MissingRanksError:
            is_complete = False
        if index == first:
            links.append(Link(names[first], names[second], measured.latency, measured.rate))
    return links, is_complete


def round_robin(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which each node meets every other one once, by the circle method of tournaments."""
    seats = [*range(num_nodes), *([-1] if num_nodes % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[i], seats[-1 - i]) for i in range(len(seats) // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def _measure_link(other: int, tag: int, deadline: float, measured: LinkMeasurement) -> None:
    """Measure the link to `other`, which echoes. Each message is announced by its size; size 0 ends the measurement.

    `measured` is updated on the way, so that it has something if the deadline comes.
    """
    measured.latency = _round_trip(other, tag, bytearray(1), deadline) / 2  # also sets up the connection
    pings = [_round_trip(other, tag, bytearray(1), deadline) for _ in _repeat(NUM_PINGS)]
    measured.latency = statistics.median(pings) / 2
    data = memoryview(bytearray(LARGEST_BYTES))
    sizes = [size for size in (SMALLEST_BYTES << power for power in range(32)) if size <= LARGEST_BYTES]
    until = time.monotonic() + SECONDS_TO_SEND
    rates: list[float] = []
    for size in [size for size in sizes for _ in range(NUM_TRIES)]:
        rates.append(2 * size * 8 / _round_trip(other, tag, data[:size], deadline))
        # The best of the last, largest messages: a delay of one message is no property of the link.
        measured.rate = max(rates[-NUM_TRIES:])
        if time.monotonic() > until:
            break
    _announce(other, tag, 0, deadline)


def _round_trip(other: int, tag: int, data: bytearray | memoryview, deadline: float) -> float:
    """Seconds that `data` takes there and back, its announcement excluded."""
    comm = MPI.COMM_WORLD
    _announce(other, tag, len(data), deadline)
    started = time.perf_counter()
    spin_until_done([comm.Isend(data, other, tag)], other, deadline)
    spin_until_done([comm.Irecv(data, other, tag)], other, deadline)
    return time.perf_counter() - started


def _announce(other: int, tag: int, size: int, deadline: float) -> None:
    """Send `size`, and wait until `other` has posted its receive, so that the timed message does not wait for it."""
    comm = MPI.COMM_WORLD
    ready = bytearray(1)
    requests = [comm.Isend(size.to_bytes(8, "little"), other, tag), comm.Irecv(ready, other, tag)]
    spin_until_done(requests, other, deadline)


def _echo(other: int, tag: int, deadline: float) -> None:
    comm = MPI.COMM_WORLD
    data = bytearray(LARGEST_BYTES)
    while True:
        announced = bytearray(8)
        spin_until_done([comm.Irecv(announced, other, tag)], other, deadline)
        size = int.from_bytes(announced, "little")
        view = memoryview(data)[:size]
        receive = comm.Irecv(view, other, tag)
        spin_until_done([comm.Isend(b"!", other, tag)], other, deadline)
        if size == 0:
            return
        spin_until_done([receive], other, deadline)
        spin_until_done([comm.Isend(view, other, tag)], other, deadline)
