"""Errors that are shown to the user, each with the exit code that the job ends with.

A *shared* error was raised on every rank by the same collective (see `Cluster.on_root` and `Cluster.on_every_rank`):
rank 0 prints it and all ranks leave together. Any other error belongs to one rank while the others may wait for it in a
collective: that rank prints it and aborts the whole job, so that no rank hangs.
"""

import sys
from collections.abc import Callable
from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """How a Lockstep program ends. The same table, in words, is docs/exit-codes.md."""

    DONE = 0
    BUG = 1
    SETTINGS = 2
    DATA = 3
    REPLICAS_DIFFER = 4
    STORAGE = 5
    NON_FINITE = 6
    STALLED = 7
    UNHEALTHY = 8
    USER_CODE = 9
    STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
    INTERRUPTED = 130


class LockstepError(Exception):
    """An error whose message says what is wrong, where, and what to do: shown without a traceback.

    Attributes:
        shared: whether every rank raises it, so that they can leave together.
    """

    exit_code = ExitCode.BUG
    shared = False

    def as_shared(self) -> Self:
        """Mark this error as one that every rank raises in the same place; returns it."""
        self.shared = True
        return self


class SettingsError(LockstepError):
    """An unknown, wrong or contradictory setting."""

    exit_code = ExitCode.SETTINGS


class DataError(LockstepError):
    """Data that is missing, unreadable or not what it claims to be."""

    exit_code = ExitCode.DATA


class ReplicasDifferError(LockstepError):
    """Ranks that must hold the same model do not."""

    exit_code = ExitCode.REPLICAS_DIFFER


class NonFiniteError(LockstepError):
    """A loss or gradient that is infinite or not a number."""

    exit_code = ExitCode.NON_FINITE


class NothingToLearnError(LockstepError):
    """A global batch whose samples all have the weight 0: the update is skipped."""

    exit_code = ExitCode.DATA


class UserCodeError(LockstepError):
    """An exception in a user's own task, model or data set, or a wrong result of it."""

    exit_code = ExitCode.USER_CODE


class UnhealthyError(LockstepError):
    """This machine, or this allocation of it, is not fit for a run."""

    exit_code = ExitCode.UNHEALTHY


class StoppedError(LockstepError):
    """No failure: the run was asked to stop, has saved, and can be resumed."""

    exit_code = ExitCode.STOPPED


class StalledError(LockstepError):
    """A run in a user's own program of one rank did nothing for too long; other runs are ended with this exit code."""

    exit_code = ExitCode.STALLED


class StorageError(LockstepError):
    """A run folder or file that cannot be written or read."""

    exit_code = ExitCode.STORAGE


def run_alone(main: Callable[[], None]) -> None:
    """Run a program of one process, without MPI: for login nodes."""
    try:
        main()
    except LockstepError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def check(holds: bool, name: str, value: object, fix: str) -> None:
    """Raise a ValueError that names the setting, its value and the fix, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} is {value}: {fix}")
