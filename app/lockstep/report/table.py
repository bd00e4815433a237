"""Build a table of many runs: the results of each, and the settings in which they differ."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from lockstep.runtime.command_line import plain_console
from lockstep.runtime.errors import ExitCode, StorageError
from lockstep.settings.reading import SETTINGS_FILE, flat_settings, load_settings
from lockstep.training.run_folder import RunFolder, storage_errors

RESULTS = {  # keys of summary.json and their formats; each is a column if at least one run has it
    "accuracy": ".4f",
    "loss": ".4f",
    "return": ".2f",
    "num_updates": "d",
    "samples_per_second": ".0f",
}
BEST = ("accuracy", "return")
REQUESTED, EXIT_CODE = ".settings", ".exit-code"  # files that slurm/sweep.sbatch writes beside a run's folder


@dataclass(frozen=True)
class Row:
    """One run in the table.

    Attributes:
        state: `done`, how the run ended otherwise, `not finished` or `not begun`.
        settings: all settings by full name; empty if the run has not begun.
        asked: if the run has not begun, the settings that it was requested with.
        results: summary.json; empty if there is none.
    """

    name: str
    state: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    asked: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)


def print_table(folders: Sequence[Path]) -> None:
    """Print one line per run. For the folder of a sweep, also write its table.txt and table.json.

    Raises:
        StorageError: there are no runs, or the table cannot be written.
        SettingsError: a run's settings cannot be read.
    """
    sweep = folders[0] if len(folders) == 1 and not _is_run(folders[0]) else None
    runs = [read_row(folder) for folder in (_runs_of(sweep) if sweep else folders)]
    differing = settings_that_differ(runs)
    table = _table(runs, differing)
    console = plain_console(width=1000)  # wide enough that no row is wrapped
    console.print(table)
    if sweep:
        with console.capture() as capture:
            console.print(table)
        RunFolder(sweep).write("table.txt", capture.get())
        rows = [{**asdict(run), "settings": {name: run.settings.get(name) for name in differing}} for run in runs]
        RunFolder(sweep).write_json("table.json", {"runs": rows})


def read_row(folder: Path) -> Row:
    """Read the run in `folder`, which need not exist: a run of a sweep may not have begun.

    Raises:
        SettingsError: settings.yaml is invalid.
        StorageError: a file cannot be read.
    """
    with storage_errors():
        settings = flat_settings(load_settings(folder / SETTINGS_FILE, trust=True)) if _is_run(folder) else {}
        results = json.loads(text_of(folder / "summary.json") or "{}")
        code = text_of(folder.with_name(folder.name + EXIT_CODE)).strip()
        asked = text_of(folder.with_name(folder.name + REQUESTED)).strip()
    if results:
        state = "done"
    elif code:
        state = f"{_exit_code_name(int(code))} ({code})"
    else:
        state = "not finished" if settings else "not begun"
    return Row(folder.resolve().name, state, settings, "" if settings else asked, results)


def settings_that_differ(runs: Sequence[Row]) -> list[str]:
    """The names of the settings that differ between the runs that have begun, in the order of their definition."""
    begun = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in begun for name in settings)
    return [name for name in names if name != "run_dir" and len({str(each.get(name)) for each in begun}) > 1]


def _table(runs: Sequence[Row], differing: Sequence[str]) -> Table:
    """The table; the run with the best accuracy or return is marked."""
    shown = {name: form for name, form in RESULTS.items() if any(name in run.results for run in runs)}
    best_by = next((name for name in BEST if name in shown), "")
    best = max((run.results[best_by] for run in runs if best_by in run.results), default=None)
    table = Table(caption=f"* the best {best_by}" if best_by else None, caption_justify="left")
    for column in ("run", "ended", *shown, *differing):
        table.add_column(column, justify="right" if column in shown else "left")
    asked = any(run.asked for run in runs)
    if asked:
        table.add_column("asked for")
    for run in runs:
        mark = " *" if best_by in run.results and run.results[best_by] == best else ""
        results = [_number(run.results.get(name), form) for name, form in shown.items()]
        settings = [str(run.settings[name]) if name in run.settings else "" for name in differing]
        table.add_row(run.name + mark, run.state, *results, *settings, *([run.asked] if asked else []))
    return table


def _runs_of(sweep: Path) -> list[Path]:
    """The folders of a sweep's runs, existing or not, in the order of their numbers.

    Raises:
        StorageError: there are none.
    """
    with storage_errors():
        found = {path for path in sweep.iterdir() if _is_run(path)} if sweep.is_dir() else set()
        found |= {path.with_suffix("") for path in sweep.glob(f"*{REQUESTED}")}
    if not found:
        raise StorageError(f"{sweep} holds no runs: name the folder of a sweep, or those of some runs")
    return sorted(found, key=lambda path: [part.zfill(12) for part in re.split(r"(\d+)", path.name)])


def _is_run(folder: Path) -> bool:
    return (folder / SETTINGS_FILE).is_file()


def text_of(file: Path) -> str:
    """What is in `file`; nothing if it does not exist."""
    return file.read_text() if file.exists() else ""


def _exit_code_name(code: int) -> str:
    try:
        return ExitCode(code).name
    except ValueError:
        return f"signal {code - 128}" if code > 128 else "exit code"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
