"""The ledger: which rank learned from which samples in which update, so that nobody need believe the plan.

Each rank appends to a file of its own, ledger/<attempt>-<start>-<rank>.bin: little-endian int64, first the number of
samples in the data set, then for every update the numbers (update, epoch, skipped, n) and n sample ids. An attempt that
resumed at update s replaces whatever earlier attempts had done from s on: that work was lost with the process. Of the
last attempt only the updates count that every rank has written down: the others were lost, too, or go on.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.cluster.failure import StorageError
from app.data.sharding import Ids, content_hash
from app.training.run_folder import storage_errors

FOLDER = "ledger"


class Ledger:
    """What this rank writes in one attempt. `path` None keeps no ledger."""

    def __init__(self, path: Path | None, num_samples: int, ahead: bool = False) -> None:
        """
        Args:
            ahead: write an update down before it is done, not after: what others learn from this rank's samples must
                not be lost with it.

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
    def path(run: Path, attempt: int, start: int, rank: int) -> Path:
        """The file of one rank in attempt 0, 1, ..., which begins after `start` updates."""
        return run / FOLDER / f"{attempt:06d}-{start:012d}-{rank:06d}.bin"

    def announce(self, update: int, epoch: int, ids: Ids) -> None:
        """These samples are about to be learned from on this rank, if all goes well: before gradients are summed."""
        if self._file and self._ahead:
            self._write(update, epoch, ids, skipped=False)
            with storage_errors():
                self._file.flush()
                os.fdatasync(self._file.fileno())  # a node may be lost, too

    def record(self, update: int, epoch: int, ids: Ids, skipped: bool = False) -> None:
        """These samples were learned from on this rank in this update, or passed over with it."""
        if not self._ahead:
            self._write(update, epoch, ids, skipped)

    def _write(self, update: int, epoch: int, ids: Ids, skipped: bool) -> None:
        if self._file:
            with storage_errors():
                self._file.write(np.concatenate([[update, epoch, skipped, len(ids)], ids]).astype("<i8").tobytes())

    def flush(self) -> None:
        """Make what was recorded outlive this process (not a power cut), before a checkpoint that counts on it."""
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
class Account:
    """What the ledger proves about one epoch.

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
        """Each sample exactly once."""
        return self.num_used == self.num_distinct == self.num_samples

    @property
    def is_exact_so_far(self) -> bool:
        """No sample more than once."""
        return self.num_used == self.num_distinct <= self.num_samples


def last_attempt(run: Path) -> int:
    """The number of the last attempt in the ledger of `run`; -1 where there is none."""
    return max((attempt for attempt, _, _, _ in _files(run)), default=-1)


def read_ledger(run: Path) -> list[Account]:
    """What was used in each epoch from the first on, over all attempts and ranks.

    Raises:
        StorageError: there is no ledger, or a file of it was altered.
    """
    num_samples, entries = _read(run)
    accounts = []
    for epoch in range(max((entry.epoch for entry in entries), default=-1) + 1):
        parts = [entry for entry in entries if entry.epoch == epoch]
        ids = np.concatenate([entry.ids for entry in parts]) if parts else np.array([], dtype=np.int64)
        num_skipped = sum(len(entry.ids) for entry in parts if entry.skipped)
        accounts.append(Account(epoch, num_samples, len(ids), len(np.unique(ids)), num_skipped))
    return accounts


def ledger_digest(run: Path) -> str:
    """The sha256 over which rank used which samples in which update, hexadecimal: the same however often it stopped.

    Raises:
        StorageError: there is no ledger, or a file of it was altered.
    """
    _, entries = _read(run)
    in_order = sorted(entries, key=lambda entry: (entry.update, entry.rank))
    return content_hash([[entry.update, entry.rank, entry.epoch, entry.skipped, entry.ids] for entry in in_order])


def _read(run: Path) -> tuple[int, list[Entry]]:
    """The number of samples, and every entry that counts."""
    files = _files(run)
    if not files:
        raise StorageError(f"{run} holds no ledger: train with --proof.ledger true")
    num_samples, counted = 0, []
    for attempt in {attempt for attempt, _, _, _ in files}:
        of_ranks = []
        for number, _, rank, file in files:
            if number == attempt:
                samples, entries = _read_file(file, rank)
                num_samples = max(num_samples, samples)
                of_ranks.append(entries)
        replaced_from = [start for later, start, _, _ in files if later > attempt]
        written_by_all = min(entries[-1].update + 1 if entries else 0 for entries in of_ranks)
        stop = min([written_by_all, *replaced_from])
        counted += [entry for entries in of_ranks for entry in entries if entry.update < stop]
    return num_samples, counted


def _files(run: Path) -> list[tuple[int, int, int, Path]]:
    """(attempt, start, rank, file) of every file, in order."""
    found = []
    for file in sorted((run / FOLDER).glob("*.bin")):
        if match := re.fullmatch(r"(\d+)-(\d+)-(\d+)\.bin", file.name):
            found.append((int(match[1]), int(match[2]), int(match[3]), file))
    return found


def _read_file(file: Path, rank: int) -> tuple[int, list[Entry]]:
    """The number of samples and the entries; a last entry that a kill has cut short is left out."""
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
    return int(numbers[0]) if len(numbers) else 0, entries
