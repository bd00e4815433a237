"""The ledger: which rank learned from which samples in which update, so that nobody need believe the plan.

Each rank appends to a file of its own, ledger/<attempt>-<start>-<rank>.bin: little-endian int64, first the number of
samples in the data set, then for every update the numbers (update, epoch, n) and n sample ids. An attempt that resumed
at update s replaces whatever earlier attempts had done from s on: that work was lost with the process.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.cluster.failure import StorageError
from app.data.sharding import Ids
from app.training.run_folder import storage_errors

FOLDER = "ledger"


class Ledger:
    """What this rank writes in one attempt. `path` None keeps no ledger."""

    def __init__(self, path: Path | None, num_samples: int) -> None:
        """Raises StorageError where the file cannot be made."""
        self._file = None
        if path:
            with storage_errors():
                path.parent.mkdir(exist_ok=True)
                self._file = path.open("xb")
                self._file.write(np.array([num_samples], dtype="<i8").tobytes())

    @staticmethod
    def path(run: Path, attempt: int, start: int, rank: int) -> Path:
        """The file of one rank in attempt 0, 1, ..., which begins after `start` updates."""
        return run / FOLDER / f"{attempt:06d}-{start:012d}-{rank:06d}.bin"

    def record(self, update: int, epoch: int, ids: Ids) -> None:
        """These samples were learned from, on this rank, in this update."""
        if self._file:
            with storage_errors():
                self._file.write(np.concatenate([[update, epoch, len(ids)], ids]).astype("<i8").tobytes())

    def flush(self) -> None:
        """Make what was recorded outlive this process; before a checkpoint that counts on it."""
        if self._file:
            with storage_errors():
                self._file.flush()

    def close(self) -> None:
        if self._file:
            with storage_errors():
                self._file.close()


@dataclass(frozen=True)
class Account:
    """What the ledger proves about one epoch.

    Attributes:
        num_samples: samples in the data set.
        num_used: sample ids in the ledger, each counted as often as it was used.
        num_distinct: different ones among them.
    """

    epoch: int
    num_samples: int
    num_used: int
    num_distinct: int

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
    return max((attempt for attempt, _, _ in _files(run)), default=-1)


def read_ledger(run: Path) -> list[Account]:
    """What was used in each epoch, in order, over all attempts and ranks.

    Raises:
        StorageError: there is no ledger.
    """
    files = _files(run)
    if not files:
        raise StorageError(f"{run} holds no ledger: train with --proof.ledger true")
    starts = {attempt: start for attempt, start, _ in files}
    by_epoch: dict[int, list[Ids]] = {}
    num_samples = 0
    for attempt, _, file in files:
        replaced_from = min((start for later, start in starts.items() if later > attempt), default=None)
        numbers = _numbers(file)
        num_samples = max(num_samples, *numbers[:1].tolist(), 0)
        for update, epoch, ids in _entries(numbers[1:]):
            if replaced_from is None or update < replaced_from:
                by_epoch.setdefault(epoch, []).append(ids)
    accounts = []
    for epoch, parts in sorted(by_epoch.items()):
        ids = np.concatenate(parts)
        accounts.append(Account(epoch, num_samples, len(ids), len(np.unique(ids))))
    return accounts


def _files(run: Path) -> list[tuple[int, int, Path]]:
    """(attempt, start, file) of every file, in order."""
    found = []
    for file in sorted((run / FOLDER).glob("*.bin")):
        if match := re.fullmatch(r"(\d+)-(\d+)-\d+\.bin", file.name):
            found.append((int(match[1]), int(match[2]), file))
    return found


def _numbers(file: Path) -> Ids:
    raw = file.read_bytes()
    return np.frombuffer(raw[: len(raw) // 8 * 8], dtype="<i8").astype(np.int64)


def _entries(numbers: Ids) -> Iterator[tuple[int, int, Ids]]:
    """(update, epoch, ids); a last entry that a kill has cut short is left out: its update was lost, too."""
    position = 0
    while position + 3 <= len(numbers):
        update, epoch, length = (int(number) for number in numbers[position : position + 3])
        ids = numbers[position + 3 : position + 3 + length]
        if len(ids) == length:
            yield update, epoch, ids
        position += 3 + length
