"""The run log: lines and a progress bar for people, metrics for files."""

import contextlib
import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from lockstep.comm.program import tell
from lockstep.settings import Settings
from lockstep.settings.reading import flat_settings
from lockstep.training.loggers import build_logger
from lockstep.training.progress import Progress as Position
from lockstep.training.run_folder import RunFolder, json_number, storage_errors


class RunLogger:
    """The run log of every rank but 0, which writes nothing. Use as a context manager."""

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def advance(self, num_updates: int) -> None:
        """Move the bar to `num_updates`."""

    def say(self, line: str) -> None:
        """Print a line."""

    def say_progress(self, line: str, progress: Position, samples: str) -> None:
        """Print a line, with the rate since the one before and the time left.

        Args:
            samples: what samples are called.
        """

    def record(self, kind: str, step: int, epoch: int, samples: int, **values: float) -> None:
        """Record metrics of `kind` (train or held_out) after `step` updates and so many samples."""

    def mark(self) -> int:
        """The length of metrics.jsonl in bytes, to which a run resumed from here truncates it."""
        return 0


class _RateColumn(ProgressColumn):
    """Updates a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.{1 if speed < 100 else 0}f}/s" if speed else "")


class RootRunLogger(RunLogger):
    """The run log of rank 0: metrics.jsonl and the loggers that were asked for, flushed after each record.

    Plain lines go to standard output. The bar is drawn on standard error, only if that is a terminal.
    """

    def __init__(self, folder: RunFolder, settings: Settings, num_updates: int, mark: int = 0) -> None:
        """Continue where `mark` was taken; what an earlier attempt has recorded since is removed.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._quiet = settings.quiet
        self._num_updates = num_updates
        self._said: Position | None = None
        with storage_errors():
            self._metrics = folder.metrics.open("a")
            known = _whole_lines(folder.metrics, mark)
            whole = known[-1][1] if known else 0
            if whole < mark:
                print(
                    f"{folder.metrics} is shorter than it was at the checkpoint: some of its lines are lost", flush=True
                )
            if self._metrics.tell() > whole:
                self._metrics.truncate(whole)
            self._loggers = [
                build_logger(name, folder.path, [record for record, _ in known], flat_settings(settings), tell)
                for name in settings.logger_names
            ]
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # takes the width that the numbers leave
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=self._quiet or not sys.stderr.isatty(),
            transient=True,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),  # lines then appear above the bar
        )
        self._bar = self._progress.add_task("updates", total=num_updates)

    def __enter__(self) -> "RootRunLogger":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        with storage_errors(), contextlib.ExitStack() as stack:  # closing writes what a full disk has refused
            for logger in self._loggers:
                stack.callback(logger.close, ended_well=kind is None)
            stack.callback(self._metrics.close)

    def advance(self, num_updates: int) -> None:
        self._progress.update(self._bar, completed=num_updates)

    def say(self, line: str) -> None:
        if not self._quiet:
            print(line, flush=True)

    def say_progress(self, line: str, progress: Position, samples: str) -> None:
        before, self._said = self._said, replace(progress)
        if before and progress.seconds > before.seconds:
            seconds = progress.seconds - before.seconds
            rate = (progress.num_samples - before.num_samples) / seconds
            left = (self._num_updates - progress.step) * seconds / (progress.step - before.step)
            line += f", {rate:.0f} {samples}/s, {timedelta(seconds=round(left))} left"
        self.say(line)

    def record(self, kind: str, step: int, epoch: int, samples: int, **values: float) -> None:
        """Raises StorageError where it cannot be written."""
        with storage_errors():
            numbers = {name: json_number(value) for name, value in values.items()}
            place = {"kind": kind, "step": step, "epoch": epoch, "samples": samples}
            self._metrics.write(json.dumps({**place, **numbers}) + "\n")
            self._metrics.flush()
            for logger in self._loggers:
                logger.record({**place, **numbers})
        if told := [f"{name} {values[name]:.3f}" for name in ("return", "loss") if name in values]:
            self._progress.update(self._bar, description=told[0])

    def mark(self) -> int:
        return self._metrics.tell()


def mark_after(metrics: Path, step: int) -> int:
    """Find the `mark` of a run log whose writer was lost: the length of `metrics` up to update `step`, without what
    will be recorded again.
    """
    mark = 0
    for record, end in _whole_lines(metrics) if metrics.exists() else ():
        if record["step"] > step or (record["step"] == step and record["kind"] != "train"):
            break
        mark = end
    return mark


def _whole_lines(metrics: Path, num_bytes: int = -1) -> list[tuple[dict[str, Any], int]]:
    """Read the records in the first `num_bytes` of `metrics`, up to one that was cut short, and where each ends."""
    with metrics.open("rb") as file:
        lines = file.read(num_bytes).splitlines(keepends=True)
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in lines:
        try:
            record = json.loads(line)
            record["kind"], record["step"]
        except (ValueError, KeyError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        end += len(line)
        found.append((record, end))
    return found
