"""One process of the doctor: it looks around, has MPI started aside, and collects what comes, until the time is up.

    this process ──┬── looks at libraries, folder, GPUs, Slurm, each aside (gathering.py)
                   └── aside: MPI, and the other ranks (meeting.py)

So it can speak at the end, whatever hangs or dies.
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
from lockstep.doctor.forked_probe import Aside
from lockstep.doctor.gathering import Looking
from lockstep.runtime.launcher import detect_launcher

# Seconds since this process began.
LOOK_UNTIL = 4.5
ROLL_CALL_UNTIL = 6.5
MEET_UNTIL = 8.5
GIVE_UP_AT = 8.7
SECONDS_TO_LEAVE = 1.0
NUM_LAST_LINES = 4


class EndedError(Exception):
    """The launcher ends this process."""


@contextlib.contextmanager
def examining(folder: Path, started: float) -> Iterator[Facts]:
    """What could be found out within `GIVE_UP_AT` seconds of `started`, as `time.monotonic` counts. Inside, the ranks
    are still there.
    """
    signal.signal(signal.SIGTERM, _end)
    launcher = detect_launcher(os.environ)
    meeting = Aside(partial(_meet, roll_call_until=started + ROLL_CALL_UNTIL, until=started + MEET_UNTIL))
    looking = Looking(launcher, folder)
    local: LocalFacts | None = None
    found: dict[str, Any] = {"doing": "starting MPI"}
    trouble = ""
    try:
        local = looking.finish(lambda: started + LOOK_UNTIL - time.monotonic())
        with contextlib.suppress(OSError):  # it has ended; what it has said before is still to be read
            meeting.send(local)
        while found["doing"] and found.get("can_be_left", True):
            found.update(meeting.receive(started + GIVE_UP_AT - time.monotonic()))
    except TimeoutError:
        trouble = "it did not end"
    except EOFError:
        trouble = "its process died"
    except EndedError:
        trouble = "the launcher ended this process"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on there is only something to say
    local = local or looking.finish(lambda: 0.0)
    if doing := found.pop("doing"):
        trouble = f"{trouble or 'they were given up'} while {doing}{_last_words(meeting)}"
    facts = Facts(**{"local": local, "joined": None, "trouble": trouble, **found})
    try:
        yield facts
    finally:
        meeting.end(SECONDS_TO_LEAVE if facts.can_be_left and not trouble else 0.0)
        looking.end()


def _last_words(meeting: Aside) -> str:
    said = [line.strip() for line in meeting.last_words().splitlines() if line.strip("- \t")]
    if not said:
        return ""
    return ": " + (said[-1] if "Error: " in said[-1] else " / ".join(said[-NUM_LAST_LINES:]))


def _meet(line: Connection, roll_call_until: float, until: float) -> None:
    from lockstep.doctor.rank_probe import meet  # starts MPI

    meet(line, roll_call_until, until)


def _end(*_: object) -> None:
    raise EndedError
