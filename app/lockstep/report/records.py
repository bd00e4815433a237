"""What a run has left behind, as a report needs it."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lockstep.comm.watchdog import VERDICT
from lockstep.report.table import Run as Row
from lockstep.report.table import read_run
from lockstep.runtime.flight_recorder import FOLDER, stragglers
from lockstep.training.profiling import PROFILE, TABLE
from lockstep.training.run_folder import storage_errors
from lockstep.training.summary import by_group

PICTURES = {".gif": "image/gif", ".png": "image/png"}
DRAWN_ANEW = {"curves.png"}
MAX_PICTURE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        row: its settings, its results and how it ended, as lockstep report --table reads them.
        environment: its environment.json; empty if it never began.
        metrics: the lines of its metrics.jsonl.
        evaluation: its evaluation.json; empty if it has none.
        profile: where some updates went, as profiling.py has written it; empty if it was not asked to.
        verdict: what the watchdog has said; empty if it never had to.
        pictures: names and data URIs of those in its folder.
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
        """Of each rank, by group of phases."""
        return [by_group(of_rank) for of_rank in self.results.get("seconds_of_ranks", [])]

    @property
    def slowest(self) -> tuple[int, float] | None:
        """The slowest rank, and the share of all ranks' time that went into waiting for it."""
        seconds = self.results.get("seconds_of_ranks", [])
        return stragglers(seconds) if len(seconds) > 1 else None

    @property
    def per_rank(self) -> float | None:
        """Samples a second of each rank."""
        rate = self.results.get("samples_per_second")
        return rate / self.results["num_ranks"] if rate else None


def read_record(folder: Path) -> Record:
    """
    Raises:
        StorageError: something in `folder` cannot be read.
        SettingsError: its settings.yaml is no such file.
    """
    row = read_run(folder)
    with storage_errors():
        lines = _text(folder / "metrics.jsonl").splitlines()
        pictures = [path for path in sorted(folder.glob("*")) if path.suffix in PICTURES]
        return Record(
            folder,
            row,
            json.loads(_text(folder / "environment.json") or "{}"),
            [json.loads(line) for line in lines if line.endswith("}")],  # the last one may just be being written
            json.loads(_text(folder / "evaluation.json") or "{}"),
            json.loads(_text(folder / PROFILE / TABLE) or "{}"),
            _text(folder / FOLDER / VERDICT).strip(),
            [
                (path.name, data_uri(path.read_bytes(), PICTURES[path.suffix]))
                for path in pictures
                if path.name not in DRAWN_ANEW and path.stat().st_size <= MAX_PICTURE_BYTES
            ],
        )


def efficiencies(records: Sequence[Record]) -> list[float | None]:
    """Samples a second of each rank, as a part of those of the run with the fewest ranks."""
    known = [record for record in records if record.per_rank]
    if not known:
        return [None] * len(records)
    reference = min(known, key=lambda record: int(record.results["num_ranks"])).per_rank
    assert reference
    return [record.per_rank / reference if record.per_rank else None for record in records]


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""
