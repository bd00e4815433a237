"""Checks the files of a run: every byte of its checkpoints, and its sample ledger. Needs no MPI.

env/run lockstep verify runs/latest
env/run lockstep verify --resume       certifies that a killed and resumed run equals one without a stop; see its --help
"""

import itertools
import json
import sys
from pathlib import Path

from lockstep.drill.certificate import certify_resuming
from lockstep.runtime.command_line import command_parser
from lockstep.runtime.errors import LockstepError, StorageError, run_alone
from lockstep.settings.reading import SETTINGS_FILE, load_settings
from lockstep.training.checkpoint import Checkpoint, list_checkpoints, verify_checkpoint
from lockstep.training.progress import Progress
from lockstep.training.run_folder import SUMMARY
from lockstep.training.sample_ledger import find_gaps, last_attempt, read_ledger


def run() -> None:
    """Print all findings; raise StorageError at the end if anything is wrong."""
    parser = command_parser("verify", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/latest")
    run: Path = parser.parse_args().run
    if not run.is_dir():
        raise StorageError(f"{run} is not a folder")
    # Checkpoints first: while the run is in progress, its ledger grows, and must cover the checkpoint that was read.
    checkpoint, num_wrong = _verify_checkpoints(run)
    num_wrong += _verify_ledger(run, checkpoint)
    if num_wrong:
        raise StorageError(f"{num_wrong} finding{'s' if num_wrong > 1 else ''} in {run}")


def _verify_checkpoints(run: Path) -> tuple[Checkpoint | None, int]:
    """The last complete checkpoint, and the number of problems."""
    last, num_wrong = None, 0
    for path in list_checkpoints(run):
        try:
            last = verify_checkpoint(path)
            print(f"checkpoint {path.name}: complete, after update {last.step}")
        except LockstepError as error:
            num_wrong += 1
            print(f"checkpoint {path.name}: {error}")
    if not list_checkpoints(run):
        if _has_made_checkpoints(run):
            num_wrong += 1
            print("checkpoints: MISSING: the finished run must have one")
        else:
            print("checkpoints: none")
    return last, num_wrong


def _has_made_checkpoints(run: Path) -> bool:
    """Whether the run must have a checkpoint: it is finished, and its settings do not turn checkpoints off."""
    if not (run / SUMMARY).exists() or not (run / SETTINGS_FILE).exists():
        return False
    return load_settings(run / SETTINGS_FILE).checkpoint.interval > 0 and _progress(run, None).step > 0


def _verify_ledger(run: Path, checkpoint: Checkpoint | None) -> int:
    has_ledger = last_attempt(run) >= 0
    if not _should_have_ledger(run, checkpoint, default=has_ledger):
        print("ledger: none (--checks.ledger true keeps one)")
        return 0
    if not has_ledger:
        print("ledger: MISSING: the run has recorded one, and its files are gone")
        return 1
    finished = (run / SUMMARY).exists()
    progress = _progress(run, checkpoint)
    accounts = read_ledger(run)
    gaps = find_gaps(run, progress.step, progress.num_samples)
    for gap in gaps:
        print(f"ledger: INCOMPLETE: {gap}")
    num_wrong = len(gaps)
    for account in accounts:
        used = f"ledger, epoch {account.epoch}: {account.num_used} of {account.num_samples} samples"
        if account.is_exact:
            skipped = f", {account.num_skipped} of them in skipped updates" if account.num_skipped else ""
            print(f"{used}, each exactly once{skipped}")
        elif account is accounts[-1] and account.is_exact_so_far and not finished:
            print(f"{used} so far, none twice")
        else:
            num_wrong += 1
            print(f"{used}, NOT each exactly once: {account.num_distinct} different ones")
    if not accounts and not gaps:
        print("ledger: no update yet")
    return num_wrong


def _should_have_ledger(run: Path, checkpoint: Checkpoint | None, default: bool) -> bool:
    """Whether the run records a ledger, by its checkpoint, or, if that does not say, by its settings."""
    if checkpoint and "checks.ledger" in (recorded := checkpoint.counters["immutable_settings"]):
        return bool(recorded["checks.ledger"])
    if (run / SETTINGS_FILE).exists():
        return load_settings(run / SETTINGS_FILE).checks.ledger or default
    return default


def _progress(run: Path, checkpoint: Checkpoint | None) -> Progress:
    """The progress that the ledger must cover: that of the finished run, or of the checkpoint.

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
