"""Settings of checkpoints, checks, stops and stalls."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lockstep.runtime.errors import SettingsError, check

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
class Criterion:
    """A held-out score by which a run is judged; `str` gives the setting that it comes from.

    Attributes:
        setting: the name of that setting.
        metric: the name of the score.
        mode: which scores are better.
        number: of evaluations to wait, or of checkpoints to keep.
    """

    setting: str
    metric: str
    mode: Literal["min", "max"]
    number: int

    def __str__(self) -> str:
        return f"{self.setting} is {self.metric}:{self.mode}:{self.number}"

    def check_known(self, scores: Iterable[str]) -> None:
        """Check that the score is one of `scores`.

        Raises:
            SettingsError: on every rank: it is not.
        """
        if self.metric not in scores:
            raise SettingsError(f"{self}: there is no such score; known are {', '.join(scores)}").as_shared()


def parse_criterion(text: str | None, setting: str) -> Criterion | None:
    """Parse `loss:min:5`. Raises ValueError if it is not of that form."""
    if text is None:
        return None
    found = re.fullmatch(r"(.+):(min|max):([1-9]\d*)", text)
    check(found is not None, setting, text, "a held-out score, min or max, and a number are needed: loss:min:5")
    assert found
    return Criterion(setting, found[1], "min" if found[2] == "min" else "max", int(found[3]))


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints."""

    interval: int = 100
    """Updates between two checkpoints; one more follows the last update. 0: only when the run is stopped."""

    keep: int = 3
    """Number of latest checkpoints to keep."""

    best: str | None = None
    """Best checkpoints to keep as well, such as accuracy:max:3: those of the 3 evaluations with the highest held-out
    accuracy. The best one is merged at the end, in place of the last. min: the lowest."""

    asynchronous: bool = True
    """Write checkpoints in a thread while training continues."""

    def __post_init__(self) -> None:
        check(self.interval >= 0, "checkpoint.interval", self.interval, "it must not be negative")
        check(self.keep >= 1, "checkpoint.keep", self.keep, "it must be at least 1")
        parse_criterion(self.best, "checkpoint.best")

    @property
    def best_criterion(self) -> Criterion | None:
        return parse_criterion(self.best, "checkpoint.best")


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
    """When a run saves and stops before its last update."""

    early: str | None = None
    """Early stopping, such as loss:min:5: end after 5 evaluations in a row without a lower held-out loss, and merge the
    model. max: without a higher one."""

    after_minutes: float | None = None
    """Stop this many minutes after the start, to be continued with --resume; under Slurm a run also stops before the
    job's time limit."""

    margin_seconds: float = 20.0
    """Seconds to keep free before the job's time limit, in addition to the measured time of saving."""

    def __post_init__(self) -> None:
        minutes = self.after_minutes
        check(minutes is None or minutes > 0, "stop.after_minutes", minutes, "it must be above 0")
        check(self.margin_seconds >= 0, "stop.margin_seconds", self.margin_seconds, "it must not be negative")
        parse_criterion(self.early, "stop.early")

    @property
    def early_criterion(self) -> Criterion | None:
        return parse_criterion(self.early, "stop.early")


@dataclass(frozen=True)
class StallSettings:
    """When a run that hangs is ended, with a verdict that names the rank at fault."""

    limit_seconds: float = 300.0
    """Seconds without progress of a rank; must exceed the longest single operation of a rank, such as compiling; 0:
    never."""

    def __post_init__(self) -> None:
        check(self.limit_seconds >= 0, "stall.limit_seconds", self.limit_seconds, "it must not be negative")
