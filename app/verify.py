"""Checks offline what a run has left behind: every byte of its checkpoints, and its ledger. Needs no MPI.

env/run python app/verify.py runs/latest
"""

import argparse
from pathlib import Path

from app.cluster.failure import LockstepError, StorageError, run_alone
from app.training.checkpoint import list_checkpoints, verify_checkpoint
from app.training.ledger import last_attempt, read_ledger


def main() -> None:
    """Raises StorageError, once everything has been told, if anything is not as it should be."""
    parser = argparse.ArgumentParser(prog="app/verify.py", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/latest")
    run: Path = parser.parse_args().run
    if not run.is_dir():
        raise StorageError(f"{run} is not a folder")
    num_wrong = _verify_checkpoints(run) + _verify_ledger(run)
    if num_wrong:
        raise StorageError(f"{num_wrong} findings in {run}")


def _verify_checkpoints(run: Path) -> int:
    num_wrong = 0
    for path in list_checkpoints(run):
        try:
            checkpoint = verify_checkpoint(path)
            print(f"checkpoint {path.name}: whole, after update {checkpoint.step}")
        except LockstepError as error:
            num_wrong += 1
            print(f"checkpoint {path.name}: {error}")
    if not list_checkpoints(run):
        print("checkpoints: none")
    return num_wrong


def _verify_ledger(run: Path) -> int:
    if last_attempt(run) < 0:
        print("ledger: none (--proof.ledger true keeps one)")
        return 0
    accounts = read_ledger(run)
    finished = (run / "summary.json").exists()
    num_wrong = 0
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
    return num_wrong


if __name__ == "__main__":
    run_alone(main)
