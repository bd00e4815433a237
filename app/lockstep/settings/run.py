"""Settings of checkpoints, checks, stops and stalls."""

import re
from dataclasses import dataclass
from typing import Literal

from lockstep.runtime.errors import check

LOGGERS = ("tensorboard", "csv", "mlflow")


def parse_loggers(text: str) -> list[str]:
    """Parse `tensorboard,csv` to a list of loggers. Raises ValueError if one is unknown."""
    names = [] if text == "none" else list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        check(name in LOGGERS, "loggers", text, f"name some of {', '.join(LOGGERS)}, with commas between them, or none")
    return names


def parse_updates(text: str) -> range:
    """Parse `20-24` to the updates 20 ... 24, counted from 1, or `20` to one update. Raises ValueError otherwise."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    check(1 <= first <= last, "profile", text, "give consecutive updates, counted from 1, such as 20-24")
    return range(first, last + 1)


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints."""

    interval: int = 100
    """Updates between two checkpoints; one more follows the last update. 0: only when the run is stopped."""

    keep: int = 3
    """Number of latest checkpoints to keep."""

    asynchronous: bool = True
    """Write checkpoints in a thread while training continues."""

    def __post_init__(self) -> None:
        check(self.interval >= 0, "checkpoint.interval", self.interval, "it must not be negative")
        check(self.keep >= 1, "checkpoint.keep", self.keep, "it must be at least 1")


@dataclass(frozen=True)
class CheckSettings:
    """Checks of correctness during a run."""

    ledger: bool = False
    """Record which samples each rank used in each update (the sample ledger); `lockstep verify` checks it."""

    replica_interval: int = 100
    """Updates between two replica checks, which compare model, optimizer state and learning rate over the ranks; 0:
    only at the start and at the end."""

    non_finite: Literal["stop", "skip"] = "stop"
    """What all ranks do if a loss or gradient is infinite or NaN on any rank: stop the run, or skip the update."""

    deterministic: bool = False
    """Refuse non-deterministic operations (on GPUs; on CPUs all are deterministic)."""

    def __post_init__(self) -> None:
        check(self.replica_interval >= 0, "checks.replica_interval", self.replica_interval, "it must not be negative")


@dataclass(frozen=True)
class StopSettings:
    """When a run saves and stops early, to be continued with --resume."""

    after_minutes: float | None = None
    """Stop this many minutes after the start; under Slurm a run also stops before the job's time limit."""

    margin_seconds: float = 20.0
    """Seconds to keep free before the job's time limit, in addition to the measured time of saving."""

    def __post_init__(self) -> None:
        minutes = self.after_minutes
        check(minutes is None or minutes > 0, "stop.after_minutes", minutes, "it must be above 0")
        check(self.margin_seconds >= 0, "stop.margin_seconds", self.margin_seconds, "it must not be negative")


@dataclass(frozen=True)
class StallSettings:
    """When a run that hangs is ended, with a verdict that names the rank at fault."""

    limit_seconds: float = 300.0
    """Seconds without progress of a rank; must exceed the longest single operation of a rank, such as compiling; 0:
    never."""

    def __post_init__(self) -> None:
        check(self.limit_seconds >= 0, "stall.limit_seconds", self.limit_seconds, "it must not be negative")
