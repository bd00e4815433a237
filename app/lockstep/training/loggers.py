"""Loggers, to which metrics go beside metrics.jsonl: `--loggers tensorboard,csv,mlflow`. They run on rank 0.

A resumed run repeats the points after its checkpoint: metrics.csv is written anew, TensorBoard is told to purge them,
MLflow keeps both.
"""

import csv
import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lockstep.runtime.errors import SettingsError

Point = Mapping[str, Any]  # one line of metrics.jsonl: kind, step, epoch, samples, and what was measured
PLACE = ("kind", "step", "epoch", "samples")
CSV_FILE = "metrics.csv"
MLFLOW_RUN = "mlflow-run.txt"  # which of MLflow's runs this is, for a resume
PATIENCE = {  # by default it retries for 15 minutes, while all ranks wait
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "GIT_PYTHON_REFRESH": "quiet",  # a node without git
}


class Logger(Protocol):
    def record(self, point: Point) -> None:
        """Write a point to the disk, or send it, before returning."""
        ...

    def close(self, ended_well: bool) -> None: ...


def check_loggers(names: Iterable[str]) -> None:
    """Check that the packages of these loggers are installed.

    Raises:
        SettingsError: a package is missing.
    """
    if "mlflow" in names and importlib.util.find_spec("mlflow") is None:
        raise SettingsError("loggers: mlflow is not installed: pip install mlflow-skinny, or leave it out")


def build_logger(
    name: str,
    folder: Path,
    earlier: Sequence[Point],
    settings: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Logger:
    """Build a logger.

    Args:
        earlier: points of earlier attempts, up to the checkpoint that the run continues from.
        settings: of the run, by their full names.
        tell: called with a message when logging fails but the run continues.

    Raises:
        OSError: the folder cannot be written.
    """
    if name == "tensorboard":
        return TensorBoardLogger(folder, max((point["step"] for point in earlier), default=0))
    if name == "csv":
        return CsvLogger(folder / CSV_FILE, earlier)
    return MlflowLogger(folder, settings, tell)


class TensorBoardLogger:
    """Events for TensorBoard, written synchronously: the thread of the library's SummaryWriter hides a full disk."""

    def __init__(self, folder: Path, step: int) -> None:
        """Continue after the point of update `step`; TensorBoard is told to purge later ones."""
        is_resumed = any(folder.glob("events.out.*"))
        self._events = EventsWriter(str(folder / "events"))
        if is_resumed:
            self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def record(self, point: Point) -> None:
        for name, value in _values(point):
            scalar = summary.scalar(f"{point['kind']}/{name}", value)
            self._events.write_event(Event(wall_time=time.time(), step=point["step"], summary=scalar))
        self._events.flush()

    def close(self, ended_well: bool) -> None:  # noqa: ARG002
        self._events.close()


class CsvLogger:
    """metrics.csv, with a line for each value: kind, step, epoch, samples, name, value."""

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

    def close(self, ended_well: bool) -> None:  # noqa: ARG002
        self._file.close()


class MlflowLogger:
    """A run of MLflow, configured by its own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ...). A server
    that fails or takes too long is told of once, and training continues without it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self._client: Any = None
        self._is_lost = False
        self._tell = tell
        self._run = ""
        self._guarded(lambda: self._begin(folder, settings))

    def _begin(self, folder: Path, settings: Mapping[str, Any]) -> None:
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        import mlflow  # after the variables that it reads are set

        self._client = mlflow.MlflowClient()
        known = folder / MLFLOW_RUN
        if known.exists():
            self._run = known.read_text()
            self._client.set_terminated(self._run, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = self._client.create_run(number, run_name=folder.resolve().name).info.run_id
        known.write_text(self._run)
        for setting, value in settings.items():
            self._client.log_param(self._run, setting, str(value)[:500])

    def record(self, point: Point) -> None:
        def send() -> None:
            for name, value in _values(point):
                self._client.log_metric(self._run, f"{point['kind']}/{name}", value, step=point["step"])

        self._guarded(send)

    def close(self, ended_well: bool) -> None:
        self._guarded(lambda: self._client.set_terminated(self._run, "FINISHED" if ended_well else "KILLED"))

    def _guarded(self, action: Callable[[], None]) -> None:
        if self._is_lost:
            return
        try:
            action()
        except Exception as error:  # any error of a server, a proxy or a database
            self._is_lost = True
            self._tell(f"MLflow is lost, the run goes on without it: {' '.join(str(error).split())[:200]}")


def _values(point: Point) -> list[tuple[str, float]]:
    return [(name, value) for name, value in point.items() if name not in PLACE and value is not None]
