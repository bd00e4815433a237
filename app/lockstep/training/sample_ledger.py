"""The sample ledger: which rank trained on which samples in which update, as recorded, not as planned.

Each rank appends to a file of its own, ledger/<attempt>-<start>-<rank>-of-<ranks>.bin: little-endian int64, first the
number of samples in the data set, then for every update the numbers (update, epoch, skipped, n) and n sample ids. An
attempt that resumed at update s replaces what earlier attempts had recorded from s on: that work was lost with the
process. Of the last attempt only updates count that every rank has recorded: others were lost, too, or are under way.

A file does not show that its end was cut off. So `find_gaps` checks that every update which checkpoints and summary
count was recorded by every rank.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lockstep.data.sharding import Ids, content_hash
from lockstep.runtime.errors import StorageError
from lockstep.training.run_folder import storage_errors

FOLDER = "ledger"


class SampleLedger:
    """What this rank records in one attempt. With `path` None it records nothing."""

    def __init__(self, path: Path | None, num_samples: int, ahead: bool = False) -> None:
        """
        Args:
            ahead: record an update before it is done, not after: if this rank is lost, the others may have trained on
                its samples already.

        Raises:
            StorageError: the file cannot be made.
        """
        self._file = None
        self._ahead = ahead
        if path:
            with storage_errors():
                path.parent.mkdir(exist_ok=True)
                self._file = path.open("xb")
                self._file.write(np.array([num_samples], dtype="<i8").tobytes())

    @staticmethod
    def path(run: Path, attempt: int, start: int, rank: int, num_ranks: int) -> Path:
        """Name the file of one of `num_ranks` ranks in attempt 0, 1, ..., which begins after `start` updates."""
        return run / FOLDER / f"{attempt:06d}-{start:012d}-{rank:06d}-of-{num_ranks:06d}.bin"

    def announce(self, update: int, epoch: int, ids: Ids) -> None:
        """Record samples before this rank's gradients of them are summed, if `ahead`."""
        if self._file and self._ahead:
            self._write(update, epoch, ids, skipped=False)
            with storage_errors():
                self._file.flush()
                os.fdatasync(self._file.fileno())  # a node may be lost, too

    def record(self, update: int, epoch: int, ids: Ids, skipped: bool = False) -> None:
        """Record samples that this rank has trained on in this update, or skipped with it; does nothing if `ahead`."""
        if not self._ahead:
            self._write(update, epoch, ids, skipped)

    def _write(self, update: int, epoch: int, ids: Ids, skipped: bool) -> None:
        if self._file:
            with storage_errors():
                self._file.write(np.concatenate([[update, epoch, skipped, len(ids)], ids]).astype("<i8").tobytes())

    def flush(self) -> None:
        """Hand what was recorded to the operating system, before a checkpoint that relies on it."""
        if self._file:
            with storage_errors():
                self._file.flush()

    def close(self) -> None:
        if self._file:
            with storage_errors():
                self._file.close()


@dataclass(frozen=True)
class Entry:
    """One rank's part of one update."""

    rank: int
    update: int
    epoch: int
    skipped: bool
    ids: Ids


@dataclass(frozen=True)
class EpochCount:
    """What the ledger shows of one epoch.

    Attributes:
        num_samples: samples in the data set.
        num_used: sample ids in the ledger, each counted as often as it was used.
        num_distinct: different ones among them.
        num_skipped: those in updates that were skipped because they were not finite.
    """

    epoch: int
    num_samples: int
    num_used: int
    num_distinct: int
    num_skipped: int

    @property
    def is_exact(self) -> bool:
        """Whether each sample was used exactly once."""
        return self.num_used == self.num_distinct == self.num_samples

    @property
    def is_exact_so_far(self) -> bool:
        """Whether no sample was used more than once."""
        return self.num_used == self.num_distinct <= self.num_samples


@dataclass(frozen=True)
class _Attempt:
    """What all ranks have recorded in one attempt.

    Attributes:
        start: updates done before it.
        missing: ranks without a file.
        sizes: of the data set, by the files that are not empty.
        files: each rank's file and its entries.
    """

    number: int
    start: int
    missing: list[int]
    sizes: set[int]
    files: dict[Path, list[Entry]]

    @property
    def written_by_all(self) -> int:
        """The first update that not all ranks have recorded."""
        return 0 if self.missing else min(each[-1].update + 1 if each else 0 for each in self.files.values())


def last_attempt(run: Path) -> int:
    """The number of the last attempt in the ledger of `run`; -1 where there is none."""
    return max((name.attempt for name in _files(run)), default=-1)


def read_ledger(run: Path) -> list[EpochCount]:
    """Count the samples used in each epoch, over all attempts and ranks.

    Raises:
        StorageError: there is no ledger, or a file of it was altered.
    """
    attempts = _read(run)
    num_samples = max((size for attempt in attempts for size in attempt.sizes), default=0)
    entries = _counted(attempts)
    counts = []
    for epoch in range(max((entry.epoch for entry in entries), default=-1) + 1):
        parts = [entry for entry in entries if entry.epoch == epoch]
        ids = np.concatenate([entry.ids for entry in parts]) if parts else np.array([], dtype=np.int64)
        num_skipped = sum(len(entry.ids) for entry in parts if entry.skipped)
        counts.append(EpochCount(epoch, num_samples, len(ids), len(np.unique(ids)), num_skipped))
    return counts


def find_gaps(run: Path, num_updates: int, num_used: int) -> list[str]:
    """List what the ledger lacks of the `num_updates` updates that were done, and of those that a later attempt
    continued from: a sentence each; none if the ledger is complete.

    Args:
        num_used: samples that were used in these updates.

    Raises:
        StorageError: there is no ledger, or a file of it was altered.
    """
    attempts = _read(run)
    gaps, done, why = [], 0, ""
    for index, (attempt, stop) in enumerate(zip(attempts, _stops(attempts), strict=True)):
        if any(later.start <= attempt.start for later in attempts[index + 1 :]):
            continue  # replaced entirely, and perhaps killed before it had all its files
        if attempt.start > done:
            gaps.append(f"updates {done + 1} ... {attempt.start} are missing{why}")
        done = max(stop, attempt.start)
        for file, entries in attempt.files.items():
            if [entry.update for entry in entries if entry.update < stop] != list(range(attempt.start, done)):
                gaps.append(f"{file.name} does not hold updates {attempt.start + 1} ... {done}, each once")
        ranks = ", ".join(map(str, attempt.missing))
        why = f": attempt {attempt.number} has no file of rank {ranks}" if ranks else ""
    if done < num_updates:
        gaps.append(f"updates {done + 1} ... {num_updates} are missing{why}")
    held = sum(len(entry.ids) for entry in _counted(attempts) if entry.update < num_updates)
    if not gaps and held != num_used:
        gaps.append(f"{held} samples stand in the first {num_updates} updates, which have used {num_used}")
    if len({size for attempt in attempts for size in attempt.sizes}) > 1:
        gaps.append("its files do not agree on the number of samples in the data set")
    return gaps


def ledger_digest(run: Path) -> str:
    """Hash which rank used which samples in which update (sha256, hexadecimal): the same however often a run stopped.

    Raises:
        StorageError: there is no ledger, or a file of it was altered.
    """
    in_order = sorted(_counted(_read(run)), key=lambda entry: (entry.update, entry.rank))
    return content_hash([[entry.update, entry.rank, entry.epoch, entry.skipped, entry.ids] for entry in in_order])


def _counted(attempts: list[_Attempt]) -> list[Entry]:
    """Collect every entry that was not lost or replaced."""
    stops = _stops(attempts)
    return [
        entry
        for attempt, stop in zip(attempts, stops, strict=True)
        for entries in attempt.files.values()
        for entry in entries
        if entry.update < stop
    ]


def _stops(attempts: list[_Attempt]) -> list[int]:
    """Find for each attempt the first update that does not count."""
    return [
        min([attempt.written_by_all, *(later.start for later in attempts[index + 1 :])])
        for index, attempt in enumerate(attempts)
    ]


def _read(run: Path) -> list[_Attempt]:
    """Read all attempts, in order."""
    names = _files(run)
    if not names:
        raise StorageError(f"{run} holds no ledger: train with --checks.ledger true")
    attempts = []
    for number in sorted({name.attempt for name in names}):
        of_ranks = [name for name in names if name.attempt == number]
        num_ranks = max(max(name.rank + 1, name.num_ranks) for name in of_ranks)
        missing = sorted(set(range(num_ranks)) - {name.rank for name in of_ranks})
        sizes: set[int] = set()
        files = {}
        for name in of_ranks:
            size, files[name.file] = _read_file(name.file, name.rank)
            sizes |= set() if size is None else {size}
        attempts.append(_Attempt(number, of_ranks[0].start, missing, sizes, files))
    return attempts


@dataclass(frozen=True)
class _Name:
    """What a file's name says; `num_ranks` is 0 in older ledgers, which do not say it."""

    attempt: int
    start: int
    rank: int
    num_ranks: int
    file: Path


def _files(run: Path) -> list[_Name]:
    """List every file, in order."""
    found = []
    for file in sorted((run / FOLDER).glob("*.bin")):
        if match := re.fullmatch(r"(\d+)-(\d+)-(\d+)(?:-of-(\d+))?\.bin", file.name):
            attempt, start, rank, num_ranks = (int(number or 0) for number in match.groups())
            found.append(_Name(attempt, start, rank, num_ranks, file))
    return found


def _read_file(file: Path, rank: int) -> tuple[int | None, list[Entry]]:
    """Read the number of samples, None of an empty file, and the entries; a last one that was cut short is left out."""
    raw = file.read_bytes()
    numbers: Ids = np.frombuffer(raw[: len(raw) // 8 * 8], dtype="<i8").astype(np.int64)
    entries = []
    position = 1
    while position + 4 <= len(numbers):
        update, epoch, skipped, length = (int(number) for number in numbers[position : position + 4])
        if length < 0 or update < 0 or epoch < 0:
            raise StorageError(f"{file} was altered: it says that update {update} used {length} samples")
        ids = numbers[position + 4 : position + 4 + length]
        if len(ids) == length:
            entries.append(Entry(rank, update, epoch, bool(skipped), ids))
        position += 4 + length
    return int(numbers[0]) if len(numbers) else None, entries
