"""Where the workers of a Gloo job meet: the server of the `horovodrun` that started them, and what it tells them.

A worker's place stands in its environment. In an elastic job it changes with the workers, and is asked for anew.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import FORBIDDEN, HTTPConnection

from lockstep.runtime.errors import ExitCode

SECONDS_TO_MEET = 60.0  # for a new worker to load its modules, from a slow disk on a busy node
SECONDS_TO_ANSWER = 10.0
SECONDS_A_LOOK = 0.05
AGAIN, OVER = "again", "over"
ELASTIC = "HOROVOD_ELASTIC"
JOB_SECRET = "HOROVOD_JOB_SECRET"  # horovodrun asks for it in every request (env/horovod_secrets.py)
PLACE = tuple(f"HOROVOD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"))


def is_elastic() -> bool:
    """This process was started by `horovodrun --min-np` or `--host-discovery-script`."""
    return os.environ.get(ELASTIC) == "1"


def job_name() -> str:
    """The same for all workers of one Gloo job, from its beginning to its end, and another one for each job."""
    return f"{os.environ['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{os.environ['HOROVOD_GLOO_RENDEZVOUS_PORT']}"


def find_place(asks: bool = False) -> None:
    """Collective over whoever is left and whoever comes: all have a place, and are there.

    Horovod alone would end this process, and with it the job, if a worker that was given a place died before it came.

    Args:
        asks: this worker has no place yet; a new one is born with one.

    Raises:
        SystemExit: the others go on without this worker, or the run is over.
    """
    if asks:
        _ask()
    # Who came early may have died while it waited: so all say it twice, the second time at once.
    while not (_all_are("here", seconds_to_meet()) and _all_are("ready", SECONDS_TO_ANSWER)):
        _ask()


def seconds_to_meet() -> float:
    """How long those who are there wait for those who are not."""
    return float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", SECONDS_TO_MEET))


def call_off(exit_code: int) -> None:
    """What ends this worker concerns the run, not this worker alone: nobody goes on without it."""
    _say(OVER, str(int(exit_code)))
    _say(AGAIN)


@contextmanager
def place_is_known() -> Iterator[None]:
    """Inside, Horovod takes this worker's place from the environment, and does not ask for one itself."""
    was = os.environ.pop(ELASTIC, None)
    try:
        yield
    finally:
        if was is not None:
            os.environ[ELASTIC] = was


def _all_are(what: str, timeout_seconds: float) -> bool:
    """Wait until every worker that was given a place has said `what`. False if one did not: all meet again."""
    _say(f"{what}{os.environ['HOROVOD_RANK']}")
    missing = set(range(int(os.environ["HOROVOD_SIZE"])))
    give_up = time.monotonic() + timeout_seconds
    while _said(AGAIN) is None:
        missing = {rank for rank in missing if _said(f"{what}{rank}") is None}
        if not missing:
            return True
        if time.monotonic() > give_up:
            print(f"lockstep: rank {min(missing)} did not come: the others meet again", file=sys.stderr, flush=True)
            _say(AGAIN)
        time.sleep(SECONDS_A_LOOK)
    return False


def _say(key: str, value: str = "yes") -> None:
    """For all workers to hear until places are given the next time."""
    _request("PUT", f"lockstep/{key}", value)


def _said(key: str) -> str | None:
    """What somebody has said since places were given last."""
    status, value = _request("GET", f"lockstep/{key}")
    return value if status == 200 else None


def _ask() -> None:
    """The answer comes when every worker that is left has asked, or has been found dead."""
    if code := _said(OVER):
        sys.exit(int(code))
    host, slot = os.environ["HOROVOD_HOSTNAME"], os.environ["HOROVOD_LOCAL_RANK"]
    status, answer = _request("GET", f"rank_and_size/{host}:{slot}")
    place = answer.split(",")
    if status != 200 or len(place) != len(PLACE):
        raise ConnectionError(f"horovodrun answers {status} {answer!r} when it is asked for a place")
    if place[0] == "-1":
        print(f"lockstep: the job goes on without this worker: {host}[{slot}]", file=sys.stderr, flush=True)
        # Not 0: from a worker which it sees as a part of the job, it would end all others.
        sys.exit(ExitCode.STOPPED)
    os.environ.update(zip(PLACE, place, strict=True))


def _request(method: str, path: str, body: str | None = None) -> tuple[int, str]:
    """Not by urllib, which would send it to a proxy."""
    secret = {"Authorization": f"Bearer {os.environ[JOB_SECRET]}"}
    server, port = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    connection = HTTPConnection(server, port)
    try:
        connection.request(method, f"/{path}", body, secret)
        response = connection.getresponse()
        if response.status == FORBIDDEN:
            raise ConnectionError("horovodrun does not take this process for one of its job")
        return response.status, response.read().decode()
    finally:
        connection.close()
