"""When a run must stop."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from lockstep.comm.cluster import Cluster
from lockstep.comm.stop import StopRequests, StopVote, end_time


@pytest.fixture
def requests() -> Iterator[StopRequests]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield StopRequests()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_when_a_job_ends() -> None:
    assert end_time(None, 100.0, {}) is None
    assert end_time(2.0, 100.0, {}) == 220.0
    assert end_time(None, 100.0, {"SLURM_JOB_END_TIME": "500", "LOCKSTEP_JOB_END_TIME": "900"}) == 500.0
    assert end_time(2.0, 100.0, {"LOCKSTEP_JOB_END_TIME": "150"}) == 150.0
    assert end_time(1.0, 100.0, {"SLURM_JOB_END_TIME": "Unknown"}) == 160.0


def test_a_signal_is_read_one_update_later(requests: StopRequests) -> None:
    vote = StopVote(Cluster.alone(), requests, None)
    assert vote.reason(0) is None
    os.kill(os.getpid(), signal.SIGUSR1)
    assert vote.reason(0) is None  # what was voted before the signal came
    assert vote.reason(0) == "SIGUSR1"


def test_the_run_stops_early_enough_to_save(requests: StopRequests) -> None:
    vote = StopVote(Cluster.alone(), requests, time.time() + 100)
    assert vote.reason(50) is None
    assert vote.reason(50) is None
    assert vote.reason(100.0) is None
    assert vote.reason(0) == "the end of the job's time"


def test_slow_updates_stop_earlier(requests: StopRequests) -> None:
    """An update of 0.5 s, of which two may pass before all have stopped, does not fit into the remaining second."""
    vote = StopVote(Cluster.alone(), requests, time.time() + 1.4)
    assert vote.reason(0) is None
    time.sleep(0.5)
    assert vote.reason(0) is None
    assert vote.reason(0) == "the end of the job's time"


def test_a_signal_wins_over_the_end_of_time_and_term_over_usr1(requests: StopRequests) -> None:
    vote = StopVote(Cluster.alone(), requests, time.time() - 1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    vote.reason(0)
    assert vote.reason(0) == "SIGTERM"
