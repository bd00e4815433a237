"""Shows what every rank of a run was doing at its last heartbeat: for runs that crashed, hang or still run.

env/run lockstep postmortem runs/latest                  a table, and the watchdog's verdict if there is one
env/run lockstep postmortem runs/latest/recorder.before  the same for the previous attempt
"""

import argparse
import time
from pathlib import Path

from rich.table import Table

from lockstep.comm.watchdog import VERDICT, position
from lockstep.runtime.command_line import command_parser, plain_console
from lockstep.runtime.errors import StorageError, run_alone
from lockstep.runtime.flight_recorder import FOLDER, read_heartbeats


def run() -> None:
    """Raises StorageError if the folder has no heartbeats."""
    folder = _parse_args().run
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    heartbeats = read_heartbeats(folder)
    if not heartbeats:
        raise StorageError(f"{folder} holds no record of any rank: name the folder of a run")
    table = Table(title=f"The last heartbeat of each rank ({folder})")
    for heading in ("rank", "node", "process", "was in", "since", "collectives"):
        table.add_column(heading)
    for beat in heartbeats:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(beat.since))
        table.add_row(str(beat.rank), beat.host, str(beat.pid), position(beat), since, str(beat.num_collectives))
    plain_console().print(table)
    if (folder / VERDICT).exists():
        print((folder / VERDICT).read_text().strip())


def _parse_args() -> argparse.Namespace:
    parser = command_parser("postmortem", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/latest")
    return parser.parse_args()


def main() -> None:
    run_alone(run)
