"""Writes one HTML page about one or several runs, without links to other files. Needs no server, network or MPI.

env/run lockstep report runs/latest                       runs/latest/report.html
env/run lockstep report runs/a runs/b --out report.html   two runs side by side
env/run lockstep report runs/sweep-17 --table             print a table of all runs of a sweep, and write no page
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lockstep import __version__
from lockstep.report.drawing import draw_confusion, draw_curves, draw_returns, draw_time
from lockstep.report.records import Record, efficiencies, read_record
from lockstep.report.table import RESULTS, print_table, settings_that_differ
from lockstep.runtime.affinity import format_cpus
from lockstep.runtime.command_line import command_parser, suggest
from lockstep.runtime.errors import StorageError, run_alone
from lockstep.settings.reading import SETTINGS_FILE
from lockstep.training.run_folder import RunFolder


def run() -> None:
    """
    Raises:
        StorageError: there is no such run, or the page cannot be written.
        SettingsError: a run's settings cannot be read.
    """
    arguments = _parse_args()
    if arguments.table:
        print_table(arguments.runs)
        return
    for run in arguments.runs:
        if not (run / SETTINGS_FILE).is_file():
            raise StorageError(f"{run} is not the folder of a run: it holds no {SETTINGS_FILE}")
    page = render([read_record(run) for run in arguments.runs])
    out = arguments.out or arguments.runs[0] / "report.html"
    RunFolder(out.parent).write(out.name, page)
    print(f"Report: {out}")


def render(records: Sequence[Record]) -> str:
    """The page as HTML, with all pictures inside."""
    environment = Environment(loader=PackageLoader("lockstep", "report"), autoescape=True, trim_blocks=True)
    environment.globals |= {"number": _number, "ranges": format_cpus, "suggest": suggest}
    return environment.get_template("page.html").render(
        title=", ".join(record.name for record in records),
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        records=records,
        columns=[name for name in RESULTS if any(name in record.results for record in records)],
        efficiencies=efficiencies(records),
        differing=settings_that_differ([record.row for record in records]),
        curves=draw_curves(records),
        times=[draw_time(record) for record in records],
        pictures=[_pictures(record) for record in records],
    )


def _pictures(record: Record) -> list[tuple[str, str]]:
    drawn = {"Confusion matrix": draw_confusion(record), "Returns": draw_returns(record)}
    return [*((what, picture) for what, picture in drawn.items() if picture), *record.pictures]


def _number(value: Any, name: str) -> str:
    return format(value, RESULTS[name]) if isinstance(value, int | float) else ""


def _parse_args() -> argparse.Namespace:
    parser = command_parser("report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="the folders of runs, such as runs/latest")
    parser.add_argument("--table", action="store_true", help="print one line per run; for a sweep, also write it there")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first run's folder)")
    return parser.parse_args()


def main() -> None:
    run_alone(run)
