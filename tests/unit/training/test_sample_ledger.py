"""The ledger proves what was used, over attempts and ranks, and can tell that it was not."""

from pathlib import Path

import numpy as np
import pytest

from lockstep.runtime.errors import StorageError
from lockstep.training.sample_ledger import SampleLedger, find_gaps, last_attempt, ledger_digest, read_ledger

BATCHES = np.arange(12).reshape(4, 3)  # four updates an epoch of 12 samples


def _attempt(run: Path, attempt: int, start: int, stop: int, num_ranks: int, lost_bytes: int = 0) -> None:
    """Updates start ... stop - 1, dealt to `num_ranks` ranks; a kill takes the last bytes of each file."""
    run.mkdir(exist_ok=True)
    for rank in range(num_ranks):
        path = SampleLedger.path(run, attempt, start, rank, num_ranks)
        ledger = SampleLedger(path, num_samples=12)
        for update in range(start, stop):
            ledger.record(update, update // 4, np.array_split(BATCHES[update % 4], num_ranks)[rank])
        ledger.close()
        path.write_bytes(path.read_bytes()[: path.stat().st_size - lost_bytes])


def test_each_sample_once_through_kills_and_another_number_of_ranks(tmp_path: Path) -> None:
    _attempt(tmp_path, 0, start=0, stop=3, num_ranks=2, lost_bytes=5)
    _attempt(tmp_path, 1, start=2, stop=7, num_ranks=2)
    _attempt(tmp_path, 2, start=4, stop=6, num_ranks=3, lost_bytes=9)
    _attempt(tmp_path, 3, start=4, stop=8, num_ranks=1)
    assert last_attempt(tmp_path) == 3
    accounts = read_ledger(tmp_path)
    assert [(account.epoch, account.num_used) for account in accounts] == [(0, 12), (1, 12)]
    assert all(account.is_exact for account in accounts)


def test_an_unfinished_epoch_is_exact_so_far(tmp_path: Path) -> None:
    _attempt(tmp_path, 0, start=0, stop=6, num_ranks=2)
    first, second = read_ledger(tmp_path)
    assert first.is_exact
    assert (second.is_exact, second.is_exact_so_far, second.num_used) == (False, True, 6)


def test_a_sample_that_was_used_twice_is_found(tmp_path: Path) -> None:
    ledger = SampleLedger(SampleLedger.path(tmp_path, 0, 0, rank=0, num_ranks=1), num_samples=12)
    for update in range(4):
        ledger.record(update, 0, np.array([*BATCHES[update], 5]) if update == 2 else BATCHES[update])
    ledger.close()
    (account,) = read_ledger(tmp_path)
    assert (account.num_used, account.num_distinct) == (13, 12)
    assert not account.is_exact
    assert not account.is_exact_so_far


def test_a_lost_update_is_found(tmp_path: Path) -> None:
    _attempt(tmp_path, 0, start=0, stop=2, num_ranks=1)
    _attempt(tmp_path, 1, start=3, stop=4, num_ranks=1)
    (account,) = read_ledger(tmp_path)
    assert (account.num_used, account.num_distinct, account.num_samples) == (9, 9, 12)


def test_ranks_that_died_at_different_updates_raise_no_alarm(tmp_path: Path) -> None:
    """Rank 1's last entries went with it: they count on no rank, and the next attempt does them again."""
    _attempt(tmp_path, 0, start=0, stop=6, num_ranks=2)
    path = SampleLedger.path(tmp_path, 0, 0, rank=1, num_ranks=2)
    path.write_bytes(path.read_bytes()[: 8 + 3 * 8 * 5])
    (account,) = read_ledger(tmp_path)
    assert (account.num_used, account.is_exact_so_far) == (9, True)


def test_an_epoch_that_is_missing_is_found(tmp_path: Path) -> None:
    ledger = SampleLedger(SampleLedger.path(tmp_path, 0, 0, rank=0, num_ranks=1), num_samples=12)
    for epoch in (0, 2):
        ledger.record(epoch, epoch, np.arange(12))
    ledger.close()
    assert [account.is_exact for account in read_ledger(tmp_path)] == [True, False, True]


def test_skipped_updates_are_counted_apart(tmp_path: Path) -> None:
    ledger = SampleLedger(SampleLedger.path(tmp_path, 0, 0, rank=0, num_ranks=1), num_samples=12)
    ledger.record(0, 0, np.arange(8))
    ledger.record(1, 0, np.arange(8, 12), skipped=True)
    ledger.close()
    (account,) = read_ledger(tmp_path)
    assert (account.is_exact, account.num_skipped) == (True, 4)


def test_an_altered_ledger_is_told(tmp_path: Path) -> None:
    path = SampleLedger.path(tmp_path, 0, 0, rank=0, num_ranks=1)
    path.parent.mkdir()
    path.write_bytes(np.array([12, 0, 0, 0, -3], dtype="<i8").tobytes())
    with pytest.raises(StorageError, match="altered"):
        read_ledger(tmp_path)


def test_the_digest_is_the_same_however_often_a_run_stopped(tmp_path: Path) -> None:
    _attempt(tmp_path / "never", 0, start=0, stop=8, num_ranks=2)
    _attempt(tmp_path / "stopped", 0, start=0, stop=5, num_ranks=2)
    _attempt(tmp_path / "stopped", 1, start=3, stop=8, num_ranks=2)
    _attempt(tmp_path / "other", 0, start=0, stop=8, num_ranks=1)
    digests = [ledger_digest(tmp_path / name) for name in ("never", "stopped", "other")]
    assert digests[0] == digests[1] != digests[2]


def test_no_ledger_is_told(tmp_path: Path) -> None:
    assert last_attempt(tmp_path) == -1
    with pytest.raises(StorageError, match=r"checks\.ledger"):
        read_ledger(tmp_path)
    silent = SampleLedger(None, num_samples=3)
    silent.record(0, 0, np.arange(3))
    silent.flush()
    silent.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_lost_rank_has_announced_counts_only_if_it_was_done(tmp_path: Path) -> None:
    """Three ranks write update 2 down; rank 2 is killed in the midst of it, rank 1 before it could write all of it."""
    _attempt(tmp_path, 0, start=0, stop=2, num_ranks=3)
    parts = np.array_split(BATCHES[2], 3)
    for rank in range(3):
        path = SampleLedger.path(tmp_path, 1, 2, rank, 3)
        ledger = SampleLedger(path, num_samples=12, ahead=True)
        ledger.announce(2, 0, parts[rank])
        assert path.stat().st_size == 8 * (1 + 4 + 1)  # at once: nothing more comes from a rank that is killed
        ledger.record(2, 0, parts[rank])
        ledger.announce(3, 0, np.array_split(BATCHES[3], 3)[rank])
        ledger.close()
        if rank == 1:
            path.write_bytes(path.read_bytes()[:-3])
    (account,) = read_ledger(tmp_path)
    assert (account.num_used, account.is_exact_so_far) == (9, True)
    _attempt(tmp_path, 2, start=3, stop=4, num_ranks=2)
    (account,) = read_ledger(tmp_path)
    assert account.is_exact


def test_a_rank_that_is_lost_before_its_first_update_leaves_no_update(tmp_path: Path) -> None:
    for rank in range(2):
        ledger = SampleLedger(SampleLedger.path(tmp_path, 0, 0, rank, 2), num_samples=12, ahead=True)
        if rank == 0:
            ledger.announce(0, 0, BATCHES[0])
        ledger.close()
    assert read_ledger(tmp_path) == []


def test_a_whole_ledger_has_no_gaps_through_kills(tmp_path: Path) -> None:
    """An attempt that was killed before its second rank had a file, and one before it had written a byte."""
    _attempt(tmp_path, 0, start=0, stop=6, num_ranks=2, lost_bytes=5)
    _attempt(tmp_path, 1, start=4, stop=4, num_ranks=2)
    SampleLedger.path(tmp_path, 1, 4, 0, 2).unlink()
    _attempt(tmp_path, 2, start=4, stop=7, num_ranks=3)
    _attempt(
        tmp_path, 3, start=2, stop=2, num_ranks=2, lost_bytes=8
    )  # from an older checkpoint: those after it were torn
    assert find_gaps(tmp_path, num_updates=2, num_used=6) == []
    _attempt(tmp_path, 4, start=2, stop=8, num_ranks=1)
    assert find_gaps(tmp_path, num_updates=8, num_used=24) == []


def _cut(run: Path, name: str) -> None:
    """Two ranks: updates 0 ... 3, then 2 ... 7, then 6 ... 7."""
    first, middle, last = (SampleLedger.path(run, attempt, start, 1, 2) for attempt, start in ((0, 0), (1, 2), (2, 6)))
    numbers = np.fromfile(last, dtype="<i8")  # the size, then twice update, epoch, skipped, 1, the id
    match name:
        case "a rank's file is gone":
            last.unlink()
        case "the first rank's file is gone":
            SampleLedger.path(run, 2, 6, 0, 2).unlink()
        case "an attempt is gone":
            for file in run.glob("ledger/000001-*"):
                file.unlink()
        case "the last attempt is gone":
            for file in run.glob("ledger/000002-*"):
                file.unlink()
        case "header only":
            for file in run.glob("ledger/*"):
                file.write_bytes(file.read_bytes()[:8])
        case "a third":
            for file in run.glob("ledger/*"):
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
        case "zero bytes":
            middle.write_bytes(b"")
        case "another update":
            numbers[1] = 5
            numbers.tofile(last)
        case "a far update":
            numbers[6] = 9
            numbers.tofile(last)
        case "an id less":
            numbers[9] = 0
            numbers[:-1].tofile(last)
        case "another size":
            numbers[0] = 13
            numbers.tofile(last)
        case "the first attempt is gone":
            for file in run.glob("ledger/000000-*"):
                file.unlink()
    assert first.exists() or name == "the first attempt is gone"


@pytest.mark.parametrize(
    "name",
    [
        "a rank's file is gone",
        "the first rank's file is gone",
        "the first attempt is gone",
        "an attempt is gone",
        "the last attempt is gone",
        "header only",
        "a third",
        "zero bytes",
        "another update",
        "a far update",
        "an id less",
        "another size",
    ],
)
def test_a_ledger_that_was_cut_has_gaps(tmp_path: Path, name: str) -> None:
    for attempt, (start, stop) in enumerate(((0, 4), (2, 7), (6, 8))):
        _attempt(tmp_path, attempt, start, stop, num_ranks=2)
    assert find_gaps(tmp_path, num_updates=8, num_used=24) == []
    _cut(tmp_path, name)
    assert find_gaps(tmp_path, num_updates=8, num_used=24) != []
