"""Write the results of a benchmark: a table, JSON and a figure."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from lockstep.runtime.command_line import plain_console
from lockstep.runtime.errors import StorageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_folder(out: str) -> Path:
    """The folder `out`, which is created if it is missing.

    Raises:
        StorageError: it cannot be created.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the folder {folder} for the results cannot be created: {error}; choose another by --out"
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
    """Print a table. The first column is left-aligned, the others, which are numbers, right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    plain_console().print(table)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`median (lowest ... highest)`."""
    lowest, median, highest = min(values), statistics.median(values), max(values)
    return f"{median:.{digits}f} ({lowest:.{digits}f} ... {highest:.{digits}f})"
