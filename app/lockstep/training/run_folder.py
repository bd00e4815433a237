"""The run folder. Rank 0 alone writes to it, except for recorder/, ledger/, profile/ and, of a sharded model,
checkpoints/, which all ranks must see.

settings.yaml      every setting of the run as it is now, for --config
settings.history.jsonl   a line for each attempt: its first update, number of ranks and changed settings
environment.json   versions, hardware, the ranks and how they were started
metrics.jsonl      one JSON object for each log line and evaluation
checkpoints/       to resume from (checkpoint.py)
ledger/            which rank trained on which samples, if asked for (sample_ledger.py)
events.out..., metrics.csv   the same for TensorBoard, for spreadsheets (loggers.py)
profile/           of chosen updates: a trace and a table (profiling.py)
recorder/          each rank's last sign of life, and the verdict on a stall (runtime/flight_recorder.py)
curves.png         loss and accuracy
model.safetensors  the merged model
evaluation.json    the confusion matrix, or the episodes, of the last evaluation
summary.json       how it ended
"""

import contextlib
import fcntl
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import safetensors
from torch import Tensor, nn

from lockstep.parallel.merge import state_digest
from lockstep.runtime.errors import SettingsError, StorageError
from lockstep.settings import Settings
from lockstep.settings.reading import DEFAULT_RUN, SETTINGS_FILE, dump_settings, load_settings
from lockstep.training.history import as_saved, asks_for_more, changes
from lockstep.training.model_file import TensorFileWriter

MODEL = "model.safetensors"
SUMMARY = "summary.json"
EVALUATION = "evaluation.json"
HISTORY = "settings.history.jsonl"
LOCK = ".lock"
SECONDS_A_LOOK = 0.5  # for a lock


class RunFolder:
    """The files of one run; each is written atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def create(settings: Settings) -> "RunFolder":
        """Make a new folder at `run_dir`, or under runs/ by date and time, with the link runs/latest to it.

        Raises:
            SettingsError: `run_dir` is not empty.
            StorageError: it cannot be made or written.
        """
        with storage_errors():
            if settings.run_dir is None:
                folder = RunFolder(_new_folder_by_time())
                _point_latest_at(folder.path)
            else:
                folder = RunFolder(Path(settings.run_dir))
                folder.path.mkdir(parents=True, exist_ok=True)
                if any(path.name != LOCK for path in folder.path.iterdir()):
                    raise SettingsError(f"run_dir is {folder.path}: it is not empty; name a new folder or remove it")
        return folder

    @staticmethod
    def reopen(settings: Settings) -> "RunFolder":
        """Open the folder of a run that is to be resumed.

        Raises:
            SettingsError: there is none.
        """
        path = Path(settings.run_dir or DEFAULT_RUN)
        if not path.is_dir():
            raise SettingsError(f"--resume goes on with {path}, and there is no such folder: a new run has no --resume")
        return RunFolder(path)

    def is_finished(self, settings: Settings) -> bool:
        """Whether the run is finished, and `settings` do not ask for more epochs.

        Raises:
            SettingsError: it is finished, and other settings have changed; or there is no checkpoint to continue from.
        """
        if not (self.path / SUMMARY).exists():
            return False
        if not asks_for_more(self.load_settings(), settings, f"{self.path} is finished"):
            return True
        if not any((self.path / "checkpoints").glob("[0-9]*")):
            raise SettingsError(f"{self.path} is finished and has no checkpoint: it cannot go on for longer")
        return False

    @contextlib.contextmanager
    def locked(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Hold a lock on the folder, which ends with the process.

        Args:
            wait_seconds: for the lock of a process that has ended, which a file server may keep for a while.

        Raises:
            StorageError: another job holds it.
        """
        with storage_errors():
            lock = (self.path / LOCK).open("w")
        give_up = time.monotonic() + wait_seconds
        with lock:
            while not _is_ours(lock):
                if time.monotonic() >= give_up:
                    raise StorageError(f"another job is training in {self.path}: wait for it, or end it")
                time.sleep(SECONDS_A_LOOK)
            yield

    @staticmethod
    def open(path: Path) -> "RunFolder":
        """Open the folder of a finished run.

        Raises:
            StorageError: it does not exist or has no merged model.
        """
        folder = RunFolder(path)
        with storage_errors():
            finished = (path / MODEL).is_file()
        if not finished:
            raise StorageError(f"{path} is not the folder of a finished run: it holds no {MODEL}")
        return folder

    def begin_recording(self) -> None:
        """Make an empty recorder/; the one of the attempt before becomes recorder.before/.

        Raises:
            StorageError: it cannot be made.
        """
        with storage_errors():
            before = self.recorder.with_suffix(".before")
            if self.recorder.exists():
                shutil.rmtree(before, ignore_errors=True)
                self.recorder.rename(before)
            self.recorder.mkdir()

    @property
    def recorder(self) -> Path:
        return self.path / "recorder"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def remove_results(self) -> None:
        """Remove the results of an earlier attempt: the run continues."""
        with storage_errors():
            for name in (SUMMARY, EVALUATION):
                (self.path / name).unlink(missing_ok=True)

    def begin(self, settings: Settings, environment: Mapping[str, Any], update: int = 0) -> None:
        """Record the settings and environment of this attempt, which begins after `update` updates."""
        history, saved = self.path / HISTORY, self.path / SETTINGS_FILE
        with storage_errors():
            before = history.read_text() if history.exists() else ""
        attempt = {
            "update": update,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "num_ranks": len(environment.get("ranks", ())),
            "changed": changes(self.load_settings(), settings) if saved.exists() else {},
        }
        self.write(
            HISTORY, f"{before}{json.dumps(attempt)}\n"
        )  # first: a kill in between leaves the change twice, not never
        self.write(SETTINGS_FILE, dump_settings(as_saved(settings)))
        self.write_json("environment.json", environment)

    def load_settings(self, trust: bool = False) -> Settings:
        """Read the run's settings; `trust`: the user has typed `--trust true`."""
        return load_settings(self.path / SETTINGS_FILE, trust)

    def write(self, name: str, text: str) -> None:
        """Write a text file under a temporary name, then rename it."""
        with replacing(self.path / name) as temporary:
            temporary.write_text(text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def model_writer(self, meta_state: Mapping[str, Tensor]) -> Iterator[TensorFileWriter]:
        """Save the merged model tensor by tensor, with the digest of its content in the file's header."""
        with replacing(self.path / MODEL) as temporary, TensorFileWriter(temporary, meta_state) as writer:
            yield writer

    def load_model(self) -> dict[str, Tensor]:
        """Read the merged model.

        Raises:
            StorageError: it cannot be read, is truncated or was altered.
        """
        path = self.path / MODEL
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                digest = (file.metadata() or {}).get("digest")
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        except (OSError, safetensors.SafetensorError) as error:
            raise StorageError(f"{path} is torn, or no model: {error}") from error
        if state_digest(state) != digest:
            raise StorageError(f"{path} was altered: its content is not what was saved")
        return state


def load_into(model: nn.Module, folder: RunFolder) -> None:
    """Load the merged model in `folder` into `model`.

    Raises:
        StorageError: it cannot be read, is truncated or was altered, or is of another network.
    """
    try:
        model.load_state_dict(folder.load_model())
    except RuntimeError as error:
        raise StorageError(f"{folder.path}: the merged model does not fit its own settings.yaml: {error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` that replaces it on success and is removed on failure."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # a name that nobody can have planted
    with storage_errors():
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            flush_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turn errors of the file system into a `StorageError` that says what to do."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(f"{error}: the folder must be yours to write, on a disk that has space left") from error


def _is_ours(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _new_folder_by_time() -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            path = DEFAULT_RUN.parent / f"{stamp}{suffix}"
            path.mkdir(parents=True)
            return path
    raise FileExistsError(f"{DEFAULT_RUN.parent / stamp} and a thousand more")


def _point_latest_at(path: Path) -> None:
    """Make the link runs/latest, if that is possible."""
    link = path.with_name(DEFAULT_RUN.name)
    temporary = path.with_name(f".{DEFAULT_RUN.name}.{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        temporary.symlink_to(path.name)
        temporary.replace(link)
    temporary.unlink(missing_ok=True)


def json_number(value: float) -> float | None:
    """Give `value`, or None where it is infinite or not a number, which JSON cannot express."""
    return value if math.isfinite(value) else None


def flush_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
