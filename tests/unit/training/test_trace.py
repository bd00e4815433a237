"""The parts of a trace: nothing is lost, nothing of one rank is taken for another's, one clock."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lockstep.comm.cluster import Cluster
from lockstep.settings import Settings
from lockstep.training.profiling import Profiler, of_operators
from lockstep.training.progress import Progress
from lockstep.training.run_folder import RunFolder
from lockstep.training.trace import (
    HOROVOD_PID,
    horovod_events,
    join_parts,
    phase_events,
    phases,
    torch_events,
    write_part,
)

ORIGIN = 1_000_000_000 * 10**6  # microseconds since the epoch
HISTORY = [
    (1_000_000_001.0, "forward and backward pass", ""),
    (1_000_000_001.5, "waiting", "gradient.0 all-reduce"),
    (1_000_000_001.75, "forward and backward pass", ""),
]


def test_a_wait_is_named_by_what_is_waited_for() -> None:
    assert list(phases(HISTORY, end=1_000_000_002.0)) == [
        ("forward and backward pass", 1_000_000_001.0, 1_000_000_001.5),
        ("gradient.0 all-reduce", 1_000_000_001.5, 1_000_000_001.75),
        ("forward and backward pass", 1_000_000_001.75, 1_000_000_002.0),
    ]


def test_phases_follow_each_other_without_gap_or_overlap() -> None:
    events = list(phase_events(HISTORY, 1_000_000_002.0, rank=3, host="n1", origin=ORIGIN))
    slices = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X"]
    assert slices == [(1_000_000, 1_500_000), (1_500_000, 1_750_000), (1_750_000, 2_000_000)]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"rank 3 on n1"}


def test_processes_gpus_and_arrows_of_two_ranks_are_not_mixed_up() -> None:
    document = {
        "baseTimeNanoseconds": (ORIGIN - 500) * 1000,
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 4711, "args": {"name": "python"}},
            {"ph": "M", "name": "thread_name", "pid": 7, "tid": 20, "args": {"name": "stream 20"}},
            {"ph": "X", "name": "aten::mm", "pid": 4711, "tid": 4711, "ts": 1500.25, "dur": 10.5},
            {"ph": "s", "name": "ac2g", "id": 5, "pid": 4711, "tid": 4711, "ts": 1501},
            {"ph": "f", "name": "ac2g", "id": 5, "pid": 0, "tid": 20, "ts": 1502},
            {"ph": "X", "name": "gemm", "pid": 0, "tid": 20, "ts": 1502, "dur": 3},
            {"ph": "X", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "PyTorch Profiler", "ts": 0, "dur": 9},
        ],
    }
    of_ranks = [list(torch_events(document, rank, 4711, ORIGIN)) for rank in (0, 1)]
    assert not {event["pid"] for event in of_ranks[0]} & {event["pid"] for event in of_ranks[1]}
    names = [[event["name"] for event in events] for events in of_ranks]
    assert names[0] == ["aten::mm", "ac2g", "ac2g", "gemm", "process_name", "process_sort_index"]
    operator, start, finish, kernel, gpu, _ = of_ranks[1]
    assert (operator["ts"], operator["dur"]) == (1000.25, 10.5)
    assert start["id"] == finish["id"] != of_ranks[0][1]["id"]
    assert operator["pid"] != kernel["pid"] == gpu["pid"]
    assert gpu["args"]["name"] == "rank 1: GPU 0"


def test_horovods_tensors_become_lines_of_one_process() -> None:
    timeline: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros": ORIGIN + 100}},
        {"name": "process_sort_index", "ph": "M", "pid": 0, "args": {"sort_index": 0}},
        {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "gradient.0"}},
        {"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "ts": 5, "pid": 1},
        {"ph": "X", "name": "1", "ts": 6, "pid": 1, "dur": 0},
        {"ph": "E", "ts": 7, "pid": 1},
    ]
    _, _, line, begin, ready, end = horovod_events(timeline, ORIGIN)
    assert (line["name"], line["tid"], line["args"]["name"]) == ("thread_name", 1, "gradient.0")
    assert [event["ts"] for event in (begin, ready, end)] == [105, 106, 107]
    assert (ready["ph"], ready["name"]) == ("i", "rank 1 of its group is ready")
    assert {event["pid"] for event in (line, begin, ready, end)} == {HOROVOD_PID}


def test_parts_are_joined_into_one_document_and_removed(tmp_path: Path) -> None:
    parts = [tmp_path / f"{rank}.gz" for rank in range(3)]
    for rank, part in enumerate(parts):
        write_part(part, [{"ph": "X", "name": f"of rank {rank}"}] * rank)
    beats: list[None] = []
    join_parts(parts, tmp_path / "trace.json.gz", lambda: beats.append(None))
    assert len(beats) == 3
    document = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = [event["name"] for event in document["traceEvents"] if event["ph"] == "X"]
    assert names == ["of rank 1", "of rank 2", "of rank 2"]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]


def _average(key: str, device: str, on_cpu: float, on_device: float, named: bool = False) -> Any:
    return SimpleNamespace(
        key=key,
        count=2,
        device_type=SimpleNamespace(name=device),
        self_cpu_time_total=on_cpu,
        self_device_time_total=on_device,
        is_user_annotation=named,
    )


def test_a_kernels_time_is_counted_once() -> None:
    operator = _average("aten::mm", "CPU", 5.0, 40.0)  # is charged with its kernel's time as well
    kernel = _average("gemm", "CUDA", 0.0, 40.0)
    span = _average("Optimizer.step", "CUDA", 0.0, 90.0, named=True)
    assert of_operators([operator, kernel, span]) == {"gemm": (2, 40e-6)}
    assert of_operators([_average("aten::mm", "CPU", 5.0, 0.0)]) == {"aten::mm": (2, 5e-6)}


@pytest.mark.parametrize(
    ("asked", "updates_per_epoch", "expected"),
    [
        ("3-4", 2, [("begin", 2), ("finish", 4)]),  # an epoch, not what lies before or behind it
        ("2-3", 2, [("begin", 1), ("finish", 3)]),
        ("3", 1, [("begin", 2), ("finish", 3)]),  # as of agents
        ("5-99", 2, [("begin", 4), ("finish", 6)]),
    ],
)
def test_a_record_begins_and_ends_once(
    asked: str, updates_per_epoch: int, expected: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the number of updates that were done by then, of a run of six."""
    progress, seen = Progress(), list[tuple[str, int]]()
    monkeypatch.setattr(Profiler, "_begin", lambda _: seen.append(("begin", progress.step)))
    monkeypatch.setattr(Profiler, "finish", lambda *_: seen.append(("finish", progress.step)))
    profiler = Profiler(Settings(profile=asked), 6, cast(Cluster, None), RunFolder(tmp_path))
    for last in range(updates_per_epoch, 7, updates_per_epoch):
        for _ in profiler.watch(iter(range(updates_per_epoch)), progress, last):
            progress.step += 1
    assert [event for index, event in enumerate(seen) if event not in seen[:index] or event[0] == "begin"] == expected
