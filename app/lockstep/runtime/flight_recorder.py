"""The flight recorder: what each rank is doing, in a small memory-mapped file that remains however the process ends.

    recorder/rank00003.bin        what rank 3 did last; `lockstep postmortem RUN` shows this of all ranks
    recorder/rank00003.stacks     its Python stacks, written when the watchdog notices a stall
    recorder/verdict.txt          the watchdog's verdict (comm/watchdog.py)

Writing costs a microsecond and no system call: the page belongs to the kernel, which writes it to the disk later.
"""

import mmap
import os
import platform
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLDER = "recorder"
STARTING = "starting"
WAITING = "waiting"

_IDENTITY = struct.Struct("<4sIII64s")  # magic, rank, size, process id, host
_PHASE = struct.Struct("<QdQ48s")  # number of events, time of the last one, update, phase
_WAIT = struct.Struct("<dQ64s")  # since when it waits (0: it does not), number of collectives, the last one's name
_NOTICE = struct.Struct("<d128s")  # when its watchdog noticed a stall (0: not), and ranks in a bad state
_MAGIC = b"LSB1"
_PHASE_AT = _IDENTITY.size
_WAIT_AT = _PHASE_AT + _PHASE.size
_NOTICE_AT = _WAIT_AT + _WAIT.size
SIZE = _NOTICE_AT + _NOTICE.size


@dataclass(frozen=True)
class Heartbeat:
    """The content of one rank's record. Times are seconds since the epoch, by the clock of that rank's node.

    Attributes:
        num_events: how many times the rank has written.
        since: when its current phase, or its current wait in a collective, began.
        update: the update it is in, counted from 1; 0 before the first.
        phase: what it is doing, apart from waiting.
        collective: the last one entered, such as `gradient.0 all-reduce`.
        is_waiting: whether it is still in that collective.
        num_collectives: how many it has entered.
        noticed: when its watchdog noticed a stall; 0 if it did not.
        seen: the ranks of its node whose process was then stopped or gone, each with its state.
    """

    rank: int
    size: int
    pid: int
    host: str
    num_events: int
    since: float
    update: int
    phase: str
    collective: str
    is_waiting: bool
    num_collectives: int
    noticed: float
    seen: str


class FlightRecorder:
    """Records what this rank is doing: into a file after `write_to`, and how long it did it.

    Attributes:
        num_events: grows with every call; the watchdog takes a constant number for a stall.
        seconds: time spent in each phase, and under `waiting` in the collectives of all phases. On GPUs, queued work
            counts for the phase in which the host waits for it.
        history: if set to a list, every change is appended: time, new phase, and the collective if it is a wait.
    """

    def __init__(self) -> None:
        self._record: bytearray | mmap.mmap = bytearray(SIZE)
        self._descriptor: int | None = None
        self.num_events = 0
        self.seconds: dict[str, float] = {}
        self.history: list[tuple[float, str, str]] | None = None
        self._phase = STARTING
        self._current = self._phase
        self._update = 0
        self._num_collectives = 0
        self._since = time.time()

    @property
    def is_starting(self) -> bool:
        """Whether the first phase has not begun yet."""
        return self._phase == STARTING

    def write_to(self, path: Path, rank: int, size: int) -> None:
        """Write the record to the file at `path` from now on. Raises OSError if it cannot be made."""
        with path.open("wb+") as file:
            file.write(bytes(mmap.PAGESIZE))  # allocates blocks: writing to a hole on a full disk would end in SIGBUS
            file.flush()
            self._record = mmap.mmap(file.fileno(), mmap.PAGESIZE)
            self._descriptor = os.dup(file.fileno())
        _IDENTITY.pack_into(self._record, 0, _MAGIC, rank, size, os.getpid(), platform.node().encode())
        self.enter(self._phase)

    def close(self) -> None:
        """Release the file; what is recorded later is still written to it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def enter(self, phase: str, update: int | None = None) -> None:
        """Begin `phase`, of `update` (counted from 1) or of the same update as before."""
        self._account(phase)
        self._phase = phase
        if update is not None:
            self._update = update
        self._write_phase()

    def beat(self) -> None:
        """Record that the current phase makes progress."""
        self._account(self._phase)
        self._write_phase()

    @contextmanager
    def waiting(self, collective: str) -> Iterator[None]:
        """Record that the rank waits for other ranks in `collective`."""
        self._account(WAITING, collective)
        self._num_collectives += 1
        self._write_phase()
        name = collective.encode()
        _WAIT.pack_into(self._record, _WAIT_AT, self._since, self._num_collectives, name)
        try:
            yield
        finally:
            self._account(self._phase)
            _WAIT.pack_into(self._record, _WAIT_AT, 0.0, self._num_collectives, name)
            self._write_phase()

    @contextmanager
    def charge_all_to(self, phase: str) -> Iterator[None]:
        """Begin `phase` and charge all time inside to it, waits included: these say nothing about slow ranks."""
        self.enter(phase)
        before, began = dict(self.seconds), self._since
        yield
        self.beat()
        self.seconds = {**before, phase: before.get(phase, 0.0) + self._since - began}

    def take_seconds(self) -> dict[str, float]:
        """Return `seconds` up to now, and start again from 0."""
        self.beat()
        taken, self.seconds = self.seconds, {}
        return taken

    def record_stall(self, seen: str) -> None:
        """Record that the watchdog has noticed a stall, and flush the record to disk, for the other nodes to read."""
        _NOTICE.pack_into(self._record, _NOTICE_AT, time.time(), seen.encode())
        if self._descriptor is not None:
            os.fsync(self._descriptor)  # unlike the map's own flush, it releases the interpreter's lock

    def _account(self, next_phase: str, collective: str = "") -> None:
        now = time.time()
        if self.history is not None:
            self.history.append((now, next_phase, collective))
        self.seconds[self._current] = self.seconds.get(self._current, 0.0) + now - self._since
        self._current, self._since = next_phase, now
        self.num_events += 1

    def _write_phase(self) -> None:
        phase = self._phase.encode()
        _PHASE.pack_into(self._record, _PHASE_AT, self.num_events, self._since, self._update, phase)


def record_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05d}.bin"


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Read the records of all ranks in `folder`, in rank order; files that are no record are skipped."""
    found = []
    for file in sorted(folder.glob("rank*.bin")):
        try:
            found.append(_parse(file.read_bytes()))
        except (OSError, ValueError, struct.error):
            continue
    return found


def stragglers(seconds_of_ranks: Sequence[Mapping[str, float]]) -> tuple[int, float]:
    """The slowest rank, which waits least for the others, and the fraction of all ranks' time spent waiting for it.

    Args:
        seconds_of_ranks: each rank's `FlightRecorder.seconds`.
    """
    waits = [seconds.get(WAITING, 0.0) for seconds in seconds_of_ranks]
    total = sum(sum(seconds.values()) for seconds in seconds_of_ranks)
    slowest = min(range(len(waits)), key=waits.__getitem__)
    return slowest, (sum(waits) - len(waits) * waits[slowest]) / max(total, 1e-9)


def _parse(record: bytes) -> Heartbeat:
    magic, rank, size, pid, host = _IDENTITY.unpack_from(record)
    if magic != _MAGIC:
        raise ValueError("not a record")
    num_events, began, update, phase = _PHASE.unpack_from(record, _PHASE_AT)
    waits_since, num_collectives, collective = _WAIT.unpack_from(record, _WAIT_AT)
    noticed, seen = _NOTICE.unpack_from(record, _NOTICE_AT)
    return Heartbeat(
        rank=rank,
        size=size,
        pid=pid,
        host=_text(host),
        num_events=num_events,
        since=waits_since or began,
        update=update,
        phase=_text(phase),
        collective=_text(collective),
        is_waiting=waits_since > 0,
        num_collectives=num_collectives,
        noticed=noticed,
        seen=_text(seen),
    )


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
