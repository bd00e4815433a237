"""What a run leaves behind, how it watches itself and how it ends."""

import re
from dataclasses import dataclass
from typing import Literal

from lockstep.settings.check import check

LOGGERS = ("tensorboard", "csv", "mlflow")


def parse_loggers(text: str) -> list[str]:
    """`tensorboard,csv` -> their names. Raises ValueError where one is unknown."""
    names = [] if text == "none" else list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        check(name in LOGGERS, "loggers", text, f"name some of {', '.join(LOGGERS)}, with commas between them, or none")
    return names


def parse_updates(text: str) -> range:
    """`20-24` -> the updates 20 ... 24, counted from 1; `20` -> that one. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    check(1 <= first <= last, "profile", text, "name some updates in a row, counted from 1, such as 20-24")
    return range(first, last + 1)


@dataclass(frozen=True)
class CheckpointSettings:
    """What a run leaves behind to go on from."""

    interval: int = 100
    """Updates between two checkpoints, beside the one after the last update; 0: none, but when the run is stopped."""

    keep: int = 3
    """How many of the last checkpoints stay."""

    asynchronous: bool = True
    """Write from a thread while training goes on."""

    def __post_init__(self) -> None:
        check(self.interval >= 0, "checkpoint.interval", self.interval, "it must not be negative")
        check(self.keep >= 1, "checkpoint.keep", self.keep, "it must be at least 1")


@dataclass(frozen=True)
class CheckSettings:
    """How closely a run watches itself."""

    ledger: bool = False
    """Record which rank learned from which samples in which update; `lockstep verify` reads it."""

    replica_interval: int = 100
    """Updates between two comparisons of model, optimizer and learning rate over the ranks; 0: only at the end."""

    non_finite: Literal["stop", "skip"] = "stop"
    """What all ranks do with an update in which a loss or gradient is infinite or not a number on any rank."""

    deterministic: bool = False
    """Refuse operations that may give other bits in another run (GPUs; on CPUs all are deterministic)."""

    def __post_init__(self) -> None:
        check(self.replica_interval >= 0, "checks.replica_interval", self.replica_interval, "it must not be negative")


@dataclass(frozen=True)
class StopSettings:
    """When a run saves and ends before it is through, to be started again with --resume."""

    after_minutes: float | None = None
    """So long after its start; beside the end of the job's time, which is known under Slurm."""

    margin_seconds: float = 20.0
    """Kept free before the end of the job's time, beside what saving was measured to take."""

    def __post_init__(self) -> None:
        minutes = self.after_minutes
        check(minutes is None or minutes > 0, "stop.after_minutes", minutes, "it must be above 0")
        check(self.margin_seconds >= 0, "stop.margin_seconds", self.margin_seconds, "it must not be negative")


@dataclass(frozen=True)
class StallSettings:
    """When a run that does nothing is ended, with a verdict on who kept it."""

    limit_seconds: float = 300.0
    """Without any sign of life of a rank; more than the longest single thing that a rank does, such as compiling; 0:
    never."""

    def __post_init__(self) -> None:
        check(self.limit_seconds >= 0, "stall.limit_seconds", self.limit_seconds, "it must not be negative")
