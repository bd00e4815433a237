"""Read the files of a run that a report shows."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lockstep.comm.watchdog import VERDICT
from lockstep.report.table import Row, read_row, text_of
from lockstep.runtime.flight_recorder import FOLDER, stragglers
from lockstep.training.profiling import PROFILE, TABLE
from lockstep.training.run_folder import storage_errors
from lockstep.training.summary import by_group

PICTURES = {".gif": "image/gif", ".png": "image/png"}
REDRAWN = {"curves.png"}
MAX_PICTURE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        row: settings, results and state, as in the table of `lockstep report --table`.
        environment: environment.json; empty if the run has not begun.
        metrics: the lines of metrics.jsonl.
        evaluation: evaluation.json; empty if there is none.
        profile: the profile of some updates (training/profiling.py); empty if there is none.
        verdict: the watchdog's verdict; empty if there is none.
        pictures: names and data URIs of the pictures in the run's folder.
    """

    path: Path
    row: Row
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    profile: Mapping[str, Any]
    verdict: str
    pictures: Sequence[tuple[str, str]]

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def results(self) -> Mapping[str, Any]:
        return self.row.results

    @property
    def ranks(self) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = self.environment.get("ranks", [])
        return found

    @cached_property
    def seconds_of_ranks(self) -> list[dict[str, float]]:
        """For each rank, its seconds by group of phases."""
        return [by_group(of_rank) for of_rank in self.results.get("seconds_of_ranks", [])]

    @property
    def slowest(self) -> tuple[int, float] | None:
        """The slowest rank, and the share of all ranks' time that was spent waiting for it."""
        seconds = self.results.get("seconds_of_ranks", [])
        return stragglers(seconds) if len(seconds) > 1 else None

    @property
    def per_rank(self) -> float | None:
        """Samples per second and rank."""
        rate = self.results.get("samples_per_second")
        return rate / self.results["num_ranks"] if rate else None


def read_record(folder: Path) -> Record:
    """Read the run in `folder`.

    Raises:
        StorageError: a file cannot be read.
        SettingsError: settings.yaml is invalid.
    """
    row = read_row(folder)
    with storage_errors():
        lines = text_of(folder / "metrics.jsonl").splitlines()
        pictures = [path for path in sorted(folder.glob("*")) if path.suffix in PICTURES]
        return Record(
            folder,
            row,
            json.loads(text_of(folder / "environment.json") or "{}"),
            [json.loads(line) for line in lines if line.endswith("}")],  # the last may be incomplete in a running run
            json.loads(text_of(folder / "evaluation.json") or "{}"),
            json.loads(text_of(folder / PROFILE / TABLE) or "{}"),
            text_of(folder / FOLDER / VERDICT).strip(),
            [
                (path.name, data_uri(path.read_bytes(), PICTURES[path.suffix]))
                for path in pictures
                if path.name not in REDRAWN and path.stat().st_size <= MAX_PICTURE_BYTES
            ],
        )


def efficiencies(records: Sequence[Record]) -> list[float | None]:
    """Samples per second and rank, relative to the run with the fewest ranks; None where unknown."""
    known = [record for record in records if record.per_rank]
    if not known:
        return [None] * len(records)
    reference = min(known, key=lambda record: int(record.results["num_ranks"])).per_rank
    assert reference
    return [record.per_rank / reference if record.per_rank else None for record in records]


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
