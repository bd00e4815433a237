"""Collect the facts of one process within a deadline, whatever hangs or dies.

    this process ──┬── one child process per slow query: libraries, folder, GPUs, Slurm (local_facts.py)
                   └── one child process that runs MPI and measures with the other ranks (rank_probe.py)

This process never blocks on any of them, so it can always report.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lockstep.doctor.facts import Facts, LocalFacts
from lockstep.doctor.forked_probe import ForkedProbe
from lockstep.doctor.local_facts import LocalProbes
from lockstep.runtime.launcher import detect_launcher

# Deadlines, in seconds since this process began.
LOCAL_FACTS_UNTIL = 4.5
GATHER_UNTIL = 6.5
MEASURE_UNTIL = 8.5
GIVE_UP_AT = 8.7
SECONDS_TO_LEAVE = 1.0
NUM_LAST_LINES = 4


class TerminatedError(Exception):
    """The launcher has sent SIGTERM to this process."""


@contextlib.contextmanager
def collect_facts(folder: Path, started: float) -> Iterator[Facts]:
    """Yield what could be found out by `GIVE_UP_AT`. The rank's own MPI process is ended on leaving the context.

    Args:
        folder: the folder that runs will be written to.
        started: when this process began, as `time.monotonic` counts.
    """
    signal.signal(signal.SIGTERM, _raise_terminated)
    launcher = detect_launcher(os.environ)
    rank_probe = ForkedProbe(
        partial(_run_rank_probe, gather_until=started + GATHER_UNTIL, measure_until=started + MEASURE_UNTIL)
    )
    local_probes = LocalProbes(launcher, folder)
    local: LocalFacts | None = None
    found: dict[str, Any] = {"activity": "starting MPI"}
    trouble = ""
    try:
        local = local_probes.finish(lambda: started + LOCAL_FACTS_UNTIL - time.monotonic())
        with contextlib.suppress(OSError):  # it has ended; what it sent before can still be read
            rank_probe.send(local)
        while found["activity"] and found.get("can_finalize", True):
            found.update(rank_probe.receive(started + GIVE_UP_AT - time.monotonic()))
    except TimeoutError:
        trouble = "it did not end"
    except EOFError:
        trouble = "its process died"
    except TerminatedError:
        trouble = "the launcher ended this process"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on this process only reports
    local = local or local_probes.finish(lambda: 0.0)
    if activity := found.pop("activity"):
        trouble = f"{trouble or 'the measurement was given up'} while {activity}{_last_output(rank_probe)}"
    facts = Facts(**{"local": local, "mpi": None, "trouble": trouble, **found})
    try:
        yield facts
    finally:
        rank_probe.end(SECONDS_TO_LEAVE if facts.can_finalize and not trouble else 0.0)
        local_probes.end()


def _last_output(probe: ForkedProbe) -> str:
    lines = [line.strip() for line in probe.last_output().splitlines() if line.strip("- \t")]
    if not lines:
        return ""
    return ": " + (lines[-1] if "Error: " in lines[-1] else " / ".join(lines[-NUM_LAST_LINES:]))


def _run_rank_probe(connection: Connection, gather_until: float, measure_until: float) -> None:
    from lockstep.doctor.rank_probe import run_rank_probe  # starts MPI

    run_rank_probe(connection, gather_until, measure_until)


def _raise_terminated(*_: object) -> None:
    raise TerminatedError
