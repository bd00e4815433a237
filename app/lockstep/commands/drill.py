"""Injects real faults into real jobs, under your own launcher, and reports the result of each. Starts its own ranks.

    env/run lockstep drill                                              mpirun -np 4, on this machine
    env/run lockstep drill --launcher "srun --mpi=pmix -n {ranks}"      within an allocation (salloc, sbatch)
    env/run lockstep drill --launcher "horovodrun -np {ranks} -H n1:2,n2:2"
    env/run lockstep drill --faults sigstop,exception                   some of them

Each fault strikes a small training in mid-epoch. The job must report what is wrong within the stall limit + 5 s, end
with the documented exit code and leave no process behind on any node. Then the run is resumed, and must end with the
model of a run without a fault, after using every sample exactly once. A cut link needs two nodes and root.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from lockstep.drill.drill import FAULTS, Drill, Result
from lockstep.runtime.command_line import command_parser, plain_console
from lockstep.runtime.errors import SettingsError, UnhealthyError, run_alone
from lockstep.training.run_folder import storage_errors


def run() -> None:
    """Raises UnhealthyError if a fault did not pass."""
    options = _parse_args()
    if unknown := set(options.faults) - set(FAULTS):
        raise SettingsError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    folder = options.folder or Path("runs") / time.strftime("drill-%Y%m%d-%H%M%S")
    with storage_errors():
        folder.mkdir(parents=True)
    drill = Drill(options.launcher, options.ranks, options.limit, folder.resolve())
    print(f"{options.ranks} ranks by {options.launcher.format(ranks=options.ranks)}; logs in {folder}", flush=True)
    reference = drill.reference()
    results = []
    for name in options.faults:
        result = drill.inject(name, reference)
        results.append(result)
        print(f"{name}: {'; '.join(result.failures) or result.impossible or 'passed'}", flush=True)
        with storage_errors():
            (folder / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2))
    _print_table(results, options.limit)
    if failed := [result.fault for result in results if result.failures]:
        raise UnhealthyError(f"{len(failed)} of {len(results)} did not pass: {', '.join(failed)}; logs: {folder}")


def _print_table(results: list[Result], limit: float) -> None:
    table = Table(title=f"Faults (stall limit: {limit:g} s)")
    for heading in ("fault", "", "verdict after", "exit code", "redone", "left over", "verdict"):
        table.add_column(heading)
    for result in results:
        what = FAULTS[result.fault].what
        if result.impossible is not None:
            table.add_row(what, "not possible here", "", "", "", "", result.impossible)
            continue
        table.add_row(
            what,
            "FAILED" if result.failures else "passed",
            "" if result.seconds is None else f"{result.seconds:.1f} s",
            str(result.code),
            "" if result.redone is None else f"{result.redone} updates",
            f"{len(result.orphans)} processes",
            result.verdict,
        )
    plain_console(width=160).print(table)


def _parse_args() -> argparse.Namespace:
    parser = command_parser("drill", __doc__)
    parser.add_argument("--launcher", default="mpirun -np {ranks}", help="how ranks are started (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="number of ranks (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=10.0, help="stall limit in seconds (default: %(default)s)")
    parser.add_argument(
        "--faults", type=lambda text: text.split(","), default=list(FAULTS), help="default: " + ",".join(FAULTS)
    )
    parser.add_argument("--folder", type=Path, help="new folder for runs and logs, visible on all nodes")
    return parser.parse_args()


def main() -> None:
    run_alone(run)
