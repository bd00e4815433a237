"""What every rank of a run was at when it was last heard of: for runs that crashed, hang or go on.

env/run lockstep postmortem runs/latest                  a table, and the verdict if the watchdog gave one
env/run lockstep postmortem runs/latest/recorder.before  the same of the attempt before
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lockstep.comm.watchdog import VERDICT, position
from lockstep.runtime.errors import StorageError, run_alone
from lockstep.runtime.flight_recorder import FOLDER, read_heartbeats


def run() -> None:
    """Raises StorageError where there is no record."""
    folder = _parse_args().run
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    heartbeats = read_heartbeats(folder)
    if not heartbeats:
        raise StorageError(f"{folder} holds no record of any rank: name the folder of a run")
    table = Table(title=f"The last that was heard of each rank ({folder})")
    for heading in ("rank", "node", "process", "was in", "since", "collectives"):
        table.add_column(heading)
    for beat in heartbeats:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(beat.since))
        table.add_row(
            str(beat.rank), beat.host, str(beat.pid), position(beat), since, f"{beat.num_collectives}"
        )  # fmt: skip
    Console(color_system=None).print(table)
    if (folder / VERDICT).exists():
        print((folder / VERDICT).read_text().strip())


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lockstep postmortem", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/latest")
    return parser.parse_args()


def main() -> None:
    run_alone(run)
