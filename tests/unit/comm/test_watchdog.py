"""The verdict on a stall, and the thread that writes it."""

import os
import platform
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lockstep.comm.watchdog import bad_state, verdict
from lockstep.runtime.errors import ExitCode
from lockstep.runtime.flight_recorder import FlightRecorder, Heartbeat, record_path
from tests.launching import launch

NOW = 1000.0
LOADING = Heartbeat(3, 4, 103, "n2", 9, NOW - 61, 1234, "data loading", "gradient all-reduce", False, 5, NOW, "")


def _waiting(rank: int, collective: str = "gradient all-reduce") -> Heartbeat:
    host = "n1" if rank < 2 else "n2"
    return replace(
        LOADING, rank=rank, pid=100 + rank, host=host, collective=collective, is_waiting=True, since=NOW - 60
    )


def test_the_rank_that_the_others_wait_for_is_named_first() -> None:
    assert verdict([_waiting(0), _waiting(1), _waiting(2), LOADING], NOW) == (
        "the job stalled. rank 3: data loading of update 1234 for 61 s; "
        "ranks 0-2 wait in gradient all-reduce of update 1234 for 60 s"
    )


def test_a_stopped_process_is_named_with_its_node() -> None:
    beats = [_waiting(0), replace(_waiting(1), seen="0:stopped"), _waiting(2), replace(LOADING, since=NOW - 59)]
    text = verdict(beats, NOW)
    assert "rank 0: process 100 on n1 is stopped, in gradient all-reduce of update 1234 for 60 s" in text
    assert "rank 3: data loading of update 1234 for 59 s" in text
    assert text.endswith("ranks 1-2 wait in gradient all-reduce of update 1234 for 60 s")


def test_a_node_where_no_rank_noticed_the_stall_is_named() -> None:
    beats = [_waiting(0), _waiting(1), replace(_waiting(2), noticed=0.0), replace(LOADING, noticed=0.0)]
    text = verdict(beats, NOW)
    assert "rank 3: no sign of n2, which is stopped, gone or cut off; it was in data loading of update 1234" in text
    assert "rank 2: no sign of n2" in text


def test_ranks_without_a_record_are_named() -> None:
    assert "ranks 1,3: no record at all" in verdict([_waiting(0), _waiting(2)], NOW)


def test_if_all_wait_in_the_same_collective_the_network_is_stuck() -> None:
    assert "nothing comes through" in verdict([_waiting(rank) for rank in range(4)], NOW)


def test_different_collectives_are_named() -> None:
    beats = [_waiting(0), _waiting(1), _waiting(2, "vote"), _waiting(3, "vote")]
    text = verdict(beats, NOW)
    assert "ranks 0-1 wait in gradient all-reduce" in text
    assert "ranks 2-3 wait in vote" in text
    assert "they are in different collectives" in text


def test_the_state_of_a_process(tmp_path: Path) -> None:
    record = record_path(tmp_path, 0)
    recorder = FlightRecorder()
    recorder.write_to(record, 0, 1)
    assert bad_state(os.getpid(), record) is None
    assert bad_state(os.getpid(), tmp_path / "another") == "gone"  # its number was given to another process
    holds = (
        f"from pathlib import Path; from lockstep.runtime.flight_recorder import *; r = FlightRecorder();"
        f"r.write_to(Path({str(record)!r}), 0, 1); print('there', flush=True); import time; time.sleep(60)"
    )
    with subprocess.Popen(["python", "-c", holds], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"there\n"
            process.send_signal(signal.SIGSTOP)
            while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                pass
            assert bad_state(process.pid, record) == "stopped"
        finally:
            process.kill()
    assert bad_state(process.pid, record) == "gone"


HANGS = """
import threading, time
from pathlib import Path
from lockstep.runtime.flight_recorder import FlightRecorder
from lockstep.comm.watchdog import Watchdog
folder, recorder = Path({folder!r}), FlightRecorder()
watchdog = Watchdog(recorder, folder, 0, 1, 0.5, lambda code: None)
recorder.enter("data loading", 3)
{body}
"""


def test_a_process_that_hangs_is_ended_with_its_stacks(tmp_path: Path) -> None:
    body = "threading.Event().wait(30)"
    finished = launch(["python", "-c", HANGS.format(folder=str(tmp_path), body=body)], timeout_seconds=30)
    assert finished.returncode == ExitCode.STALLED, finished.output
    assert "lockstep: the job stalled. rank 0: data loading of update 3 for " in finished.stderr
    assert 'File "<string>", line 9 in <module>' in (tmp_path / "rank00000.stacks").read_text()
    assert "data loading of update 3" in (tmp_path / "verdict.txt").read_text()


def test_a_process_that_hangs_with_the_interpreters_lock_is_shown_by_another(tmp_path: Path) -> None:
    """Its own watchdog cannot run."""
    stuck = "import ctypes; ctypes.PyDLL(None).sleep(20)"
    program = HANGS.format(folder=str(tmp_path), body=stuck).replace("folder, 0, 1", "folder, 1, 2")
    with subprocess.Popen(["python", "-c", program]) as process:
        try:
            while not record_path(tmp_path, 1).exists():
                pass
            waits = HANGS.format(folder=str(tmp_path), body="with recorder.waiting('vote'): time.sleep(20)")
            finished = launch(["python", "-c", waits.replace("folder, 0, 1", "folder, 0, 2")], timeout_seconds=30)
        finally:
            process.kill()
    assert finished.returncode == ExitCode.STALLED, finished.output
    assert "rank 1: data loading of update 3" in finished.stderr
    assert "rank 0 waits in vote of update 3" in finished.stderr
    assert 'File "<string>", line 9 in <module>' in (tmp_path / "rank00001.stacks").read_text()


def test_a_process_that_makes_progress_is_left_alone(tmp_path: Path) -> None:
    body = "for _ in range(12): time.sleep(0.2); recorder.beat()\nwatchdog.close(); time.sleep(1.5)"
    finished = launch(["python", "-c", HANGS.format(folder=str(tmp_path), body=body)], timeout_seconds=30)
    assert finished.returncode == 0, finished.output
    assert not (tmp_path / "verdict.txt").exists()


def test_a_process_that_was_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    """Ctrl-Z, then fg: the watchdog adds up the time between its polls."""
    body = "print('there', flush=True)\nfor _ in range(25): time.sleep(0.1); recorder.beat()"
    command = ["python", "-c", HANGS.format(folder=str(tmp_path), body=body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0


def test_a_person_can_read_the_records(tmp_path: Path) -> None:
    (tmp_path / "recorder").mkdir()
    recorder = FlightRecorder()
    recorder.enter("evaluation", update=63)
    recorder.write_to(record_path(tmp_path / "recorder", 1), 1, 2)
    (tmp_path / "recorder" / "verdict.txt").write_text("the job stalled. rank 1: evaluation\n")
    command = ["lockstep", "postmortem"]
    shown = launch([*command, str(tmp_path)])
    assert shown.returncode == 0, shown.output
    assert f"\u2502 1    \u2502 {platform.node()}" in shown.stdout
    assert "evaluation of" in shown.stdout
    assert shown.stdout.endswith("the job stalled. rank 1: evaluation\n")
    nothing = launch([*command, str(tmp_path / "elsewhere")])
    assert nothing.returncode == 5
    assert "holds no record of any rank" in nothing.stderr


def test_limit_0_records_and_does_not_watch(tmp_path: Path) -> None:
    program = HANGS.replace("0.5, lambda", "0.0, lambda").format(folder=str(tmp_path), body="time.sleep(1.5)")
    assert launch(["python", "-c", program], timeout_seconds=30).returncode == 0
    assert record_path(tmp_path, 0).exists()
