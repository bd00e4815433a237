"""Where the curves go beside metrics.jsonl, which is the run's own record: `--loggers tensorboard,csv,mlflow`.

A logger is told every point once, on rank 0; after a resume it holds what metrics.jsonl holds.
"""

import csv
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from app.cluster.failure import SettingsError

Point = Mapping[str, Any]  # one line of metrics.jsonl: kind, step, epoch, samples, and what was measured
PLACE = ("kind", "step", "epoch", "samples")
CSV_FILE = "metrics.csv"
MLFLOW_RUN = "mlflow-run.txt"  # which of MLflow's runs this is, for a resume


class Logger(Protocol):
    def record(self, point: Point) -> None:
        """Complete on the disk, or sent, when it returns."""
        ...

    def close(self) -> None: ...


def build_logger(
    name: str,
    folder: Path,
    earlier: Iterable[Point],
    settings: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Logger:
    """
    Args:
        earlier: what the run has recorded before it was stopped, up to where it goes on.
        settings: of the run, by their full names.
        tell: of what goes wrong and does not matter to the run.

    Raises:
        OSError: the folder cannot be written.
        SettingsError: a package is missing.
    """
    points = list(earlier)
    if name == "tensorboard":
        return TensorBoardLogger(folder, max((point["step"] for point in points), default=0))
    if name == "csv":
        return CsvLogger(folder / CSV_FILE, points)
    return MlflowLogger(folder, settings, tell)


class TensorBoardLogger:
    """Events for TensorBoard. The library's SummaryWriter has a thread, whose full disk nobody hears of: these are
    written here and now.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Go on after the point of update `step`; TensorBoard is told to forget what came later."""
        self._events = EventsWriter(str(folder / "events"))
        if step:
            self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def record(self, point: Point) -> None:
        for name, value in _values(point):
            scalar = summary.scalar(f"{point['kind']}/{name}", value)
            self._events.write_event(Event(wall_time=time.time(), step=point["step"], summary=scalar))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class CsvLogger:
    """metrics.csv, a line a value: kind, step, epoch, samples, name, value."""

    def __init__(self, file: Path, earlier: Iterable[Point]) -> None:
        self._file = file.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow((*PLACE, "name", "value"))
        for point in earlier:
            self.record(point)
        self._file.flush()

    def record(self, point: Point) -> None:
        self._writer.writerows((*(point[part] for part in PLACE), *named) for named in _values(point))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MlflowLogger:
    """A run of MLflow, wherever its own variables say (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ...). A server that
    fails is told of once, and training goes on without it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise SettingsError(f"loggers: mlflow is not installed ({error}): pip install mlflow-skinny") from error
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # a node without git is no reason for a warning
        self._mlflow: Any = mlflow
        self._tell = tell
        self._is_lost = False
        known = folder / MLFLOW_RUN
        run = known.read_text() if known.exists() else None
        self._guarded(lambda: self._begin(folder.resolve().name, run, settings))
        if not self._is_lost:
            known.write_text(mlflow.active_run().info.run_id)

    def _begin(self, name: str, run: str | None, settings: Mapping[str, Any]) -> None:
        self._mlflow.start_run(run_id=run, run_name=None if run else name)
        if not run:
            self._mlflow.log_params({name: str(value)[:500] for name, value in settings.items()})

    def record(self, point: Point) -> None:
        values = {f"{point['kind']}/{name}": value for name, value in _values(point)}
        self._guarded(lambda: self._mlflow.log_metrics(values, step=point["step"]))

    def close(self) -> None:
        self._guarded(self._mlflow.end_run)

    def _guarded(self, action: Callable[[], Any]) -> None:
        if self._is_lost:
            return
        try:
            action()
        except self._mlflow.exceptions.MlflowException as error:
            self._is_lost = True
            self._tell(f"MLflow is lost, the run goes on without it: {str(error).splitlines()[0]}")


def _values(point: Point) -> list[tuple[str, float]]:
    return [(name, value) for name, value in point.items() if name not in PLACE and value is not None]
