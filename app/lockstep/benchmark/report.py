"""What a benchmark leaves behind: a table for people, JSON for programs, a picture for both."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lockstep.runtime.errors import StorageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_folder(out: str) -> Path:
    """`out` as a folder, made if need be.

    Raises:
        StorageError: it cannot be made.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the folder {folder} for the results cannot be made: {error}; choose one by --out"
        ) from None
    return folder


def save(folder: Path, name: str, result: Mapping[str, Any], figure: "Figure") -> None:
    """Write `name`.json and `name`.png.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        figure.savefig(folder / f"{name}.png", dpi=120)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from None
    print(f"{folder / name}.json, {folder / name}.png")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others, which are numbers, to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(color_system=None).print(table)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`median (lowest ... highest)`."""
    lowest, median, highest = min(values), statistics.median(values), max(values)
    return f"{median:.{digits}f} ({lowest:.{digits}f} ... {highest:.{digits}f})"
