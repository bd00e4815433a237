"""Checks offline what a run has left behind: every byte of its checkpoints, and its ledger. Needs no MPI.

env/run lockstep verify runs/latest
env/run lockstep verify --resume       certifies that a killed run is one that never stopped; has a --help of its own
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from lockstep.drill.certificate import certify_resuming
from lockstep.runtime.errors import LockstepError, StorageError, run_alone
from lockstep.settings.reading import SETTINGS_FILE, load_settings
from lockstep.training.checkpoint import Checkpoint, list_checkpoints, verify_checkpoint
from lockstep.training.position import Progress
from lockstep.training.run_folder import SUMMARY
from lockstep.training.sample_ledger import find_gaps, last_attempt, read_ledger


def run() -> None:
    """Raises StorageError, once everything has been told, if anything is not as it should be."""
    parser = argparse.ArgumentParser(
        prog="lockstep verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/latest")
    run: Path = parser.parse_args().run
    if not run.is_dir():
        raise StorageError(f"{run} is not a folder")
    # First what was done, then the ledger: that of a run in progress only grows.
    checkpoint, num_wrong = _verify_checkpoints(run)
    num_wrong += _verify_ledger(run, checkpoint)
    if num_wrong:
        raise StorageError(f"{num_wrong} finding{'s' if num_wrong > 1 else ''} in {run}")


def _verify_checkpoints(run: Path) -> tuple[Checkpoint | None, int]:
    """The last that is whole, and how many are not."""
    last, num_wrong = None, 0
    for path in list_checkpoints(run):
        try:
            last = verify_checkpoint(path)
            print(f"checkpoint {path.name}: whole, after update {last.step}")
        except LockstepError as error:
            num_wrong += 1
            print(f"checkpoint {path.name}: {error}")
    if not list_checkpoints(run):
        if _has_made_checkpoints(run):
            num_wrong += 1
            print("checkpoints: GONE: the run has made one at its end at the latest, and there is none")
        else:
            print("checkpoints: none")
    return last, num_wrong


def _has_made_checkpoints(run: Path) -> bool:
    """A run that is finished has, unless its settings ask for none; one in progress may not have come to its first."""
    if not (run / SUMMARY).exists() or not (run / SETTINGS_FILE).exists():
        return False
    return load_settings(run / SETTINGS_FILE).checkpoint.interval > 0 and _progress(run, None).step > 0


def _verify_ledger(run: Path, checkpoint: Checkpoint | None) -> int:
    has_one = last_attempt(run) >= 0
    if not _keeps_a_ledger(run, checkpoint, otherwise=has_one):
        print("ledger: none (--checks.ledger true keeps one)")
        return 0
    if not has_one:
        print("ledger: GONE: the run has kept one, and there is no file of it")
        return 1
    finished = (run / SUMMARY).exists()
    progress = _progress(run, checkpoint)
    accounts = read_ledger(run)
    gaps = find_gaps(run, progress.step, progress.num_samples)
    for gap in gaps:
        print(f"ledger: NOT whole: {gap}")
    num_wrong = len(gaps)
    for account in accounts:
        told = f"ledger, epoch {account.epoch}: {account.num_used} of {account.num_samples} samples"
        if account.is_exact:
            passed_over = f", {account.num_skipped} of them in skipped updates" if account.num_skipped else ""
            print(f"{told}, each exactly once{passed_over}")
        elif account is accounts[-1] and account.is_exact_so_far and not finished:
            print(f"{told} so far, none twice")
        else:
            num_wrong += 1
            print(f"{told}, NOT each exactly once: {account.num_distinct} different ones")
    if not accounts and not gaps:
        print("ledger: no update yet")
    return num_wrong


def _keeps_a_ledger(run: Path, checkpoint: Checkpoint | None, otherwise: bool) -> bool:
    """As the checkpoint says, or, where there is none or an older one, the settings."""
    if checkpoint and "checks.ledger" in (said := checkpoint.counters["immutable_settings"]):
        return bool(said["checks.ledger"])
    if (run / SETTINGS_FILE).exists():
        return load_settings(run / SETTINGS_FILE).checks.ledger or otherwise
    return otherwise


def _progress(run: Path, checkpoint: Checkpoint | None) -> Progress:
    """How far the run is at least: at its end, or at the checkpoint.

    Raises:
        StorageError: the summary cannot be read.
    """
    if (run / SUMMARY).exists():
        try:
            summary = json.loads((run / SUMMARY).read_text())
            return Progress(int(summary["num_updates"]), int(summary["num_samples"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{run / SUMMARY} is torn: {error}") from error
    return Progress(**checkpoint.counters["progress"]) if checkpoint else Progress()


def main() -> None:
    own_options = itertools.takewhile(lambda argument: argument != "--", sys.argv)
    run_alone(certify_resuming if "--resume" in own_options else run)
