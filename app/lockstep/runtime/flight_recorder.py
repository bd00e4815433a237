"""The black box: each rank's last sign of life, in a small mapped file that outlives the process however it ends.

    recorder/rank00003.bin        what rank 3 was at; `lockstep postmortem RUN` shows all of them
    recorder/rank00003.stacks     its Python stacks, if it was asked for them
    recorder/verdict.txt          what the watchdog concluded (watchdog.py)

Writing costs a microsecond and no system call: the kernel has the page, and writes it to the disk when it likes.
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
_NOTICE = struct.Struct("<d128s")  # when its watchdog noticed a stall (0: not), and whom it found in a bad state
_MAGIC = b"LSB1"
_PHASE_AT = _IDENTITY.size
_WAIT_AT = _PHASE_AT + _PHASE.size
_NOTICE_AT = _WAIT_AT + _WAIT.size
SIZE = _NOTICE_AT + _NOTICE.size


@dataclass(frozen=True)
class Heartbeat:
    """What one rank's record says. Times are seconds since the epoch, by that rank's node.

    Attributes:
        num_events: how often it has written.
        since: when it began what it is at: a phase, or the waiting for a collective.
        update: the update it is in, counted from 1; 0 before the first.
        phase: what it does, or would do if it did not wait.
        collective: the last one that it entered, such as `gradient.0 all-reduce`.
        is_waiting: it has not come out of it.
        num_collectives: those it has entered.
        noticed: when its watchdog noticed that nothing goes on; 0 where it did not.
        seen: the ranks of its node whose process it then found stopped or gone, with the state.
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
    """This rank's record. Without a file it is kept in memory, for the accounts alone.

    Attributes:
        num_events: grows with every sign of life.
        seconds: how long the rank was at each phase, and `waiting` in collectives, of whatever phase. On GPUs, queued
            work is charged to the phase in which the host waits for it.
        history: a list put here is told every change: when, to which phase, and for which collective it waits.
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
        """It has not come to its first phase yet."""
        return self._phase == STARTING

    def keep_in(self, path: Path, rank: int, size: int) -> None:
        """From now on the record is the file at `path`. Raises OSError where it cannot be made."""
        with path.open("wb+") as file:
            file.write(bytes(mmap.PAGESIZE))  # blocks of its own: with a hole, a full disk would end in SIGBUS
            file.flush()
            self._record = mmap.mmap(file.fileno(), mmap.PAGESIZE)
            self._descriptor = os.dup(file.fileno())
        _IDENTITY.pack_into(self._record, 0, _MAGIC, rank, size, os.getpid(), platform.node().encode())
        self.enter(self._phase)

    def enter(self, phase: str, update: int | None = None) -> None:
        """From here on the rank is at `phase`, of `update` (counted from 1) if one is named, else of the same."""
        self._account(phase)
        self._phase = phase
        if update is not None:
            self._update = update
        self._write_phase()

    def beat(self) -> None:
        """Still at the same, and getting on with it."""
        self._account(self._phase)
        self._write_phase()

    @contextmanager
    def waiting(self, collective: str) -> Iterator[None]:
        """Inside, the rank waits for other ranks."""
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
    def apart(self, phase: str) -> Iterator[None]:
        """Inside, the rank is at `phase`, which all time is charged to: waiting there says nothing of other ranks."""
        self.enter(phase)
        before, began = dict(self.seconds), self._since
        yield
        self.beat()
        self.seconds = {**before, phase: before.get(phase, 0.0) + self._since - began}

    def take_seconds(self) -> dict[str, float]:
        """`seconds` up to now; from here on they count from 0."""
        self.beat()
        taken, self.seconds = self.seconds, {}
        return taken

    def notice(self, seen: str) -> None:
        """A stall was noticed; puts the record on the disk, where other nodes look for it."""
        _NOTICE.pack_into(self._record, _NOTICE_AT, time.time(), seen.encode())
        if self._descriptor is not None:
            os.fsync(self._descriptor)  # which, unlike the map's own flush, lets other threads run meanwhile

    def _account(self, next_one: str, collective: str = "") -> None:
        now = time.time()
        if self.history is not None:
            self.history.append((now, next_one, collective))
        self.seconds[self._current] = self.seconds.get(self._current, 0.0) + now - self._since
        self._current, self._since = next_one, now
        self.num_events += 1

    def _write_phase(self) -> None:
        phase = self._phase.encode()
        _PHASE.pack_into(self._record, _PHASE_AT, self.num_events, self._since, self._update, phase)


def record_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05d}.bin"


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """What every rank has left in `folder`, in their order; what is no record is passed over."""
    found = []
    for file in sorted(folder.glob("rank*.bin")):
        try:
            found.append(_parse(file.read_bytes()))
        except (OSError, ValueError, struct.error):
            continue
    return found


def stragglers(seconds_of_ranks: Sequence[Mapping[str, float]]) -> tuple[int, float]:
    """The slowest rank, which is the one that waits least for the others, and the share of all ranks' time that is lost
    by waiting for it.

    Args:
        seconds_of_ranks: of each rank, how long it was at each phase, and waiting.
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
