"""The flight recorder: what a rank leaves behind, and which rank is the slowest."""

import os
import platform
import time
from pathlib import Path

import pytest

from lockstep.runtime.flight_recorder import WAITING, FlightRecorder, read_heartbeats, record_path, stragglers
from tests.launching import launch


def test_the_file_has_the_phase_and_the_collective(tmp_path: Path) -> None:
    recorder = FlightRecorder()
    recorder.enter("data loading", update=7)
    recorder.write_to(record_path(tmp_path, 3), rank=3, size=4)
    recorder.enter("forward and backward pass")
    (beat,) = read_heartbeats(tmp_path)
    assert (beat.rank, beat.size, beat.pid, beat.host) == (3, 4, os.getpid(), platform.node())
    assert (beat.update, beat.phase, beat.is_waiting, beat.noticed) == (7, "forward and backward pass", False, 0.0)
    assert abs(beat.since - time.time()) < 5
    with recorder.waiting("gradient all-reduce"):
        (inside,) = read_heartbeats(tmp_path)
        assert (inside.collective, inside.is_waiting) == ("gradient all-reduce", True)
        assert inside.since >= beat.since
    (after,) = read_heartbeats(tmp_path)
    assert (after.collective, after.is_waiting) == ("gradient all-reduce", False)
    assert (after.phase, after.num_collectives) == ("forward and backward pass", beat.num_collectives + 1)
    assert beat.num_events < inside.num_events < after.num_events
    recorder.record_stall("2:stopped")
    (noticed,) = read_heartbeats(tmp_path)
    assert noticed.seen == "2:stopped"
    assert noticed.noticed >= after.since


def test_a_wait_that_fails_is_over(tmp_path: Path) -> None:
    recorder = FlightRecorder()
    recorder.write_to(record_path(tmp_path, 0), 0, 1)
    with pytest.raises(RuntimeError), recorder.waiting("barrier"):
        raise RuntimeError
    assert not read_heartbeats(tmp_path)[0].is_waiting


def test_a_killed_process_leaves_its_record(tmp_path: Path) -> None:
    """The page belongs to the kernel, not to the process: nothing has to be flushed."""
    program = (
        "import os, signal; from pathlib import Path; from lockstep.runtime.flight_recorder import *;"
        "r = FlightRecorder();"
        f"r.write_to(Path({str(tmp_path)!r}) / 'rank00005.bin', 5, 6); r.enter('optimizer step', 42);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert launch(["python", "-c", program]).returncode == -9
    (beat,) = read_heartbeats(tmp_path)
    assert (beat.rank, beat.phase, beat.update) == (5, "optimizer step", 42)


def test_long_names_are_cut_and_other_files_skipped(tmp_path: Path) -> None:
    recorder = FlightRecorder()
    recorder.write_to(record_path(tmp_path, 0), 0, 2)
    recorder.enter("é" * 100)
    (tmp_path / "rank00001.bin").write_bytes(b"torn")
    (tmp_path / "rank00002.bin").write_bytes(bytes(4096))
    (beat,) = read_heartbeats(tmp_path)
    assert beat.phase.startswith("é" * 20)


def test_time_is_charged_to_phases_and_to_waiting() -> None:
    recorder = FlightRecorder()
    recorder.take_seconds()
    recorder.enter("optimizer step")
    time.sleep(0.05)
    with recorder.waiting("vote"):
        time.sleep(0.1)
    seconds = recorder.take_seconds()
    assert seconds["optimizer step"] >= 0.05
    assert seconds[WAITING] >= 0.1
    assert sum(seconds.values()) < 5
    recorder.enter("evaluation")
    assert recorder.take_seconds()["optimizer step"] < 0.05  # counted from 0 again


def test_the_slowest_rank_is_the_one_that_waits_least() -> None:
    """Ranks 0 and 2 wait 4 s of 10 longer than rank 1 does: 8 s of 30 are lost."""
    seconds = [{"update": 5.0, WAITING: 5.0}, {"update": 9.0, WAITING: 1.0}, {"update": 5.0, WAITING: 5.0}]
    slowest, lost = stragglers(seconds)
    assert slowest == 1
    assert lost == pytest.approx(8 / 30)
    assert stragglers([{"update": 3.0}]) == (0, 0.0)


def test_charge_all_to_counts_waits_for_the_phase() -> None:
    recorder = FlightRecorder()
    recorder.enter("training")
    with recorder.charge_all_to("profiling"), recorder.waiting("barrier"):
        time.sleep(0.05)
    recorder.enter("training")
    seconds = recorder.take_seconds()
    assert seconds["profiling"] >= 0.05
    assert seconds.get("waiting", 0.0) == 0.0
