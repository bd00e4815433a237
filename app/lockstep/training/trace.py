"""One trace of a job, in Chrome's format, which https://ui.perfetto.dev and chrome://tracing open.

Every rank is a process of the trace, with its phases above PyTorch's operators by thread; Horovod's timeline of rank 0
is one more, with a line for each tensor. All times are microseconds since `origin`, by each node's clock.
"""

import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Change = tuple[float, str, str]  # when (seconds since the epoch), to what, for which collective: FlightRecorder.history

PIDS_OF_A_RANK = 100  # its own, and one for each of its GPUs
HOROVOD_PID = PIDS_OF_A_RANK - 1
FAST = 1  # 64 ranks on GPUs write a gigabyte
_ENDING = b'{"ph":"M","name":"trace","pid":0}]}\n'  # an event without meaning, after the last comma


def phases(history: Sequence[Change], end: float) -> Iterator[tuple[str, float, float]]:
    """Iterate over (phase, or the collective that is waited for; begin; end), in seconds since the epoch."""
    for (begin, phase, collective), (until, *_) in zip(history, [*history[1:], (end, "", "")], strict=True):
        yield collective or phase, begin, until


def phase_events(history: Sequence[Change], end: float, rank: int, host: str, origin: int) -> Iterator[Event]:
    pid = rank * PIDS_OF_A_RANK
    yield from _name_process(pid, f"rank {rank} on {host}")
    yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": 0, "args": {"name": "phases"}}
    yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": -1}}
    for name, begin, until in phases(history, end):
        yield {
            "ph": "X",
            "cat": "phase",
            "name": name,
            "pid": pid,
            "tid": 0,
            "ts": int(begin * 1e6) - origin,
            "dur": int(until * 1e6) - int(begin * 1e6),  # whole numbers: slices that overlap by rounding are dropped
        }


def torch_events(document: Mapping[str, Any], rank: int, process_id: int, origin: int) -> Iterator[Event]:
    """Convert what torch.profiler has exported to process ids that no other rank uses."""
    shift = document["baseTimeNanoseconds"] // 1000 - origin
    found = [event for event in document["traceEvents"] if isinstance(event.get("pid"), int) and _is_kept(event)]
    used = {event["pid"] for event in found if event["ph"] != "M"}
    for event in found:
        if event["pid"] not in used:  # GPUs that this rank does not use
            continue
        gpu = None if event["pid"] == process_id else event["pid"]
        moved = {**event, "pid": rank * PIDS_OF_A_RANK + (0 if gpu is None else 1 + gpu)}
        if "ts" in event:
            moved["ts"] = round(event["ts"] + shift, 3)
        if "id" in event:  # of an arrow; ids must not be shared with another rank
            moved["id"] = int(event["id"]) * 10**6 + rank
        yield moved
    for gpu in sorted(used - {process_id}):
        yield from _name_process(rank * PIDS_OF_A_RANK + 1 + gpu, f"rank {rank}: GPU {gpu}")


def horovod_events(timeline: Sequence[Mapping[str, Any]], origin: int) -> Iterator[Event]:
    """Convert Horovod's timeline: its processes, one for each tensor, become lines of one process. Its ranks are
    counted within the group of a tensor: all ranks, or in a pipeline the replicas of rank 0's stage.
    """
    shift = timeline[0]["args"]["start_time_since_epoch_in_micros"] - origin
    yield from _name_process(HOROVOD_PID, "Horovod on rank 0", place=10**9)
    for event in timeline[1:]:
        moved = {**event, "pid": HOROVOD_PID, "tid": event.get("pid", 0)}
        if event["ph"] == "M":
            if event["name"] == "process_name":
                yield {**moved, "name": "thread_name"}
            continue
        moved["ts"] = event["ts"] + shift
        if event["ph"] == "X":  # a moment, by the rank's number
            moved |= {"ph": "i", "s": "t", "name": f"rank {event['name']} of its group is ready"}
        yield moved


def write_part(file: Path, events: Iterable[Event]) -> None:
    """Write one rank's part of the trace."""
    with gzip.open(file, "wt", compresslevel=FAST) as out:
        for event in events:
            out.write(json.dumps(event) + ",\n")


def join_parts(parts: Sequence[Path], file: Path, beat: Callable[[], None]) -> None:
    """Join the ranks' parts to one trace, without reading it into memory, and remove them.

    Args:
        beat: called after each part, as a sign of life.
    """
    with gzip.open(file, "wb", compresslevel=FAST) as out:
        out.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        for part in parts:
            beat()
            with gzip.open(part, "rb") as opened:
                shutil.copyfileobj(opened, out)
        out.write(_ENDING)
    for part in parts:
        part.unlink()


def _is_kept(event: Mapping[str, Any]) -> bool:
    return event["ph"] != "M" or event["name"] in ("thread_name", "thread_sort_index")


def _name_process(pid: int, name: str, place: int | None = None) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    sort_index = pid if place is None else place
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": sort_index}}
