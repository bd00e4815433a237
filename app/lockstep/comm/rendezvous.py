"""How the workers of a Gloo job find each other: through the HTTP server of the `horovodrun` that started them.

A worker reads its rank from its environment. In an elastic job each generation numbers the workers anew: a worker asks
the server for its new rank.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import FORBIDDEN, HTTPConnection

from lockstep.runtime.errors import ExitCode

JOIN_SECONDS = 60.0  # for a new worker to load its modules, from a slow disk on a busy node
READY_SECONDS = 10.0
POLL_SECONDS = 0.05
RESTART, CANCELLED = "again", "over"  # keys that any worker may set
ELASTIC = "HOROVOD_ELASTIC"
JOB_SECRET = "HOROVOD_JOB_SECRET"  # horovodrun asks for it in every request (env/horovod_secrets.py)
RANK_VARIABLES = tuple(
    f"HOROVOD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
)


def is_elastic() -> bool:
    """Whether `horovodrun --min-np` or `--host-discovery-script` started this process."""
    return os.environ.get(ELASTIC) == "1"


def job_name() -> str:
    """A name of this Gloo job that all its workers agree on as long as it runs, and that no other job has."""
    return f"{os.environ['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{os.environ['HOROVOD_GLOO_RENDEZVOUS_PORT']}"


def wait_for_workers(needs_rank: bool = False) -> None:
    """Collective over the workers that are left and the new ones: wait until every worker that has a rank is here.

    Horovod alone would end this process, and with it the job, if a worker died between getting its rank and connecting.

    Args:
        needs_rank: ask the server for a new rank first; a new worker has been started with one.

    Raises:
        SystemExit: the others go on without this worker, or the run is cancelled.
    """
    if needs_rank:
        _ask_for_rank()
    # An early worker may die while it waits for late ones: all confirm at once, when the last one has come.
    while not (_all_workers_are("here", join_seconds()) and _all_workers_are("ready", READY_SECONDS)):
        _ask_for_rank()


def join_seconds() -> float:
    """How long the workers wait for one that has not come yet."""
    return float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", JOIN_SECONDS))


def cancel_run(exit_code: int) -> None:
    """End all other workers, too, with this worker's `exit_code`: its error would stop any generation."""
    _set_key(CANCELLED, str(int(exit_code)))
    _set_key(RESTART)


@contextmanager
def rank_from_environment() -> Iterator[None]:
    """Inside, Horovod reads this worker's rank from the environment, and does not ask the server for one."""
    was = os.environ.pop(ELASTIC, None)
    try:
        yield
    finally:
        if was is not None:
            os.environ[ELASTIC] = was


def _all_workers_are(state: str, timeout_seconds: float) -> bool:
    """Wait until every worker that has a rank has reported `state`. False if one did not: all start over."""
    _set_key(f"{state}{os.environ['HOROVOD_RANK']}")
    missing = set(range(int(os.environ["HOROVOD_SIZE"])))
    give_up = time.monotonic() + timeout_seconds
    while _get_key(RESTART) is None:
        missing = {rank for rank in missing if _get_key(f"{state}{rank}") is None}
        if not missing:
            return True
        if time.monotonic() > give_up:
            print(f"lockstep: rank {min(missing)} did not come: the others meet again", file=sys.stderr, flush=True)
            _set_key(RESTART)
        time.sleep(POLL_SECONDS)
    return False


def _set_key(key: str, value: str = "yes") -> None:
    """Set a key on the server, which deletes all keys when it numbers the workers anew."""
    _request("PUT", f"lockstep/{key}", value)


def _get_key(key: str) -> str | None:
    """The value of a key; None if no worker has set it since the server last numbered the workers."""
    status, value = _request("GET", f"lockstep/{key}")
    return value if status == 200 else None


def _ask_for_rank() -> None:
    """The server answers when every other worker has asked, too, or has been found dead."""
    if code := _get_key(CANCELLED):
        sys.exit(int(code))
    host, slot = os.environ["HOROVOD_HOSTNAME"], os.environ["HOROVOD_LOCAL_RANK"]
    status, answer = _request("GET", f"rank_and_size/{host}:{slot}")
    values = answer.split(",")
    if status != 200 or len(values) != len(RANK_VARIABLES):
        raise ConnectionError(f"horovodrun answers {status} {answer!r} when it is asked for a rank")
    if values[0] == "-1":
        print(f"lockstep: the job goes on without this worker: {host}[{slot}]", file=sys.stderr, flush=True)
        # Not 0: when a worker that horovodrun counts among the job's ends with 0, it ends all others.
        sys.exit(ExitCode.STOPPED)
    os.environ.update(zip(RANK_VARIABLES, values, strict=True))


def _request(method: str, path: str, body: str | None = None) -> tuple[int, str]:
    """The server's status and answer. urllib would send the request to a proxy, http.client does not."""
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
