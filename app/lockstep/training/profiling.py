"""`--profile 20-24`: a trace of what all ranks did in these updates, and a table of where the time went.

profile/trace.json.gz    for https://ui.perfetto.dev: phases, PyTorch's operators, Horovod's timeline
profile/profile.json     the table
"""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity

from lockstep.comm.cluster import Cluster
from lockstep.runtime.command_line import plain_console
from lockstep.runtime.errors import SettingsError, StorageError
from lockstep.settings import Settings
from lockstep.training import trace
from lockstep.training.progress import Progress
from lockstep.training.run_folder import RunFolder, storage_errors

PROFILE = "profile"
PHASE = "profiling"
TRACE = "trace.json.gz"
TABLE = "profile.json"
NUM_OPERATORS = 12
SECONDS_BEFORE = 60  # Perfetto drops events before the trace's origin, so it lies before all, by every node's clock
_HOROVOD = ".horovod.json"

Calls = tuple[int, float]  # how many, and the seconds that they took


@dataclass(frozen=True)
class Share:
    """How long one phase, collective or operator took, in milliseconds an update.

    Attributes:
        mean, least, most: over the ranks.
        calls: of an operator, per rank and update.
    """

    name: str
    mean: float
    least: float
    most: float
    calls: float = 0.0


class Profiler:
    """Records the updates that were asked for, if any."""

    def __init__(self, settings: Settings, num_updates: int, cluster: Cluster, folder: RunFolder) -> None:
        """
        Args:
            num_updates: of the run.

        Raises:
            SettingsError: on every rank: the run does not have these updates.
        """
        updates = settings.profiled_updates
        if updates and updates.start > num_updates:
            message = f"profile is {settings.profile}: the run has {num_updates} updates"
            raise SettingsError(message).as_shared()
        self._updates = range(updates.start, min(updates.stop, num_updates + 1))
        self._cluster = cluster
        self._folder = RunFolder(folder.path / PROFILE)
        self._quiet = settings.quiet
        self._torch: torch.profiler.profile | None = None

    def watch(self, items: Iterator[Any], progress: Progress, last: int) -> Iterator[Any]:
        """Iterate over the work items of an epoch, and record them with their loading; Collective where a record begins
        or ends.

        Args:
            last: the number of the epoch's last update: what follows, such as an evaluation, is not recorded.
        """
        while True:
            upcoming = progress.step + 1
            if self._updates and upcoming == self._updates.start and upcoming <= last:
                self._begin()
            elif upcoming == self._updates.stop:
                self.finish(progress)
            item = next(items, None)
            if item is None:
                return
            yield item

    def _begin(self) -> None:
        cluster = self._cluster
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler itself
        on_gpu = cluster.device.type == "cuda"
        self._torch = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])], acc_events=True
        )
        with cluster.recorder.charge_all_to(PHASE):
            cluster.on_root(self._make_folder)
            self._torch.start()  # takes a second or two
            cluster.start_timeline(self._folder.path / _HOROVOD)
            cluster.barrier()
        cluster.recorder.history = [(time.time(), PHASE, "")]

    def _make_folder(self) -> None:
        with storage_errors():
            self._folder.path.mkdir(exist_ok=True)

    def finish(self, progress: Progress) -> None:
        """Collective: end the record, if one has begun, and write trace and table.

        Raises:
            StorageError: on every rank: it cannot be written.
        """
        if self._torch is None:
            return
        cluster, profile = self._cluster, self._torch
        self._torch = None
        with cluster.recorder.charge_all_to(PHASE):
            if cluster.device.type == "cuda":
                torch.cuda.synchronize()
            history, cluster.recorder.history = cluster.recorder.history or [], None
            end = time.time()
            profile.stop()
            cluster.stop_timeline()
            seconds: dict[str, float] = {}
            for name, begin, until in trace.phases(history, end):
                if name != PHASE:
                    seconds[name] = seconds.get(name, 0.0) + until - begin
            origin = cluster.on_root(lambda: int((history[0][0] - SECONDS_BEFORE) * 1e6))
            cluster.on_every_rank(lambda: self._write_part(profile, history, end, origin))
            of_ranks = cluster.all_gather_object((seconds, of_operators(profile.key_averages())))
            cluster.on_root(lambda: self._conclude(of_ranks, progress.step + 1 - self._updates.start))

    def _part(self, rank: int) -> Path:
        return self._folder.path / f".rank{rank:05d}.json.gz"

    def _write_part(
        self, profile: torch.profiler.profile, history: Sequence[trace.Change], end: float, origin: int
    ) -> None:
        rank, exported = self._cluster.rank, self._folder.path / f".rank{self._cluster.rank:05d}.torch.json"
        timeline = self._folder.path / _HOROVOD
        with storage_errors():
            profile.export_chrome_trace(str(exported))
            events = [
                *trace.phase_events(history, end, rank, platform.node(), origin),
                *trace.torch_events(_taken(exported), rank, os.getpid(), origin),
            ]
            if self._cluster.is_root and timeline.exists() and (of_horovod := _taken(timeline)):
                events += trace.horovod_events(of_horovod, origin)
            trace.write_part(self._part(rank), events)

    def _conclude(self, of_ranks: Sequence[tuple[dict[str, float], dict[str, Calls]]], num_updates: int) -> None:
        with storage_errors():
            parts = [self._part(rank) for rank in range(len(of_ranks))]
            trace.join_parts(parts, self._folder.path / TRACE, self._cluster.recorder.beat)
        phases = _shares([seconds for seconds, _ in of_ranks], num_updates)
        calls = Counter[str]()
        for _, operators_of_rank in of_ranks:
            calls.update({name: number for name, (number, _) in operators_of_rank.items()})
        operators = [
            replace(share, calls=calls[share.name] / len(of_ranks) / num_updates)
            for share in _shares([{name: s for name, (_, s) in found.items()} for _, found in of_ranks], num_updates)
        ][:NUM_OPERATORS]
        first = self._updates.start
        content = {
            "updates": [first, first + num_updates - 1],
            "num_ranks": len(of_ranks),
            "phases": [vars(share) for share in phases],
            "operators": [vars(share) for share in operators],
        }
        self._folder.write_json(TABLE, content)
        if not self._quiet:
            console = plain_console()
            for what, shares in (("phases, and what was waited for", phases), ("operators, themselves", operators)):
                console.print(_table(what, shares, first, num_updates))
            print(f"Trace, for https://ui.perfetto.dev: {self._folder.path / TRACE}", flush=True)


def _taken(file: Path) -> Any:
    """Read the JSON in `file` and remove it; None if it is empty, because no tensor was sent.

    Raises:
        StorageError: it is truncated: its writers do not tell of a full disk.
    """
    text = file.read_text()
    file.unlink()
    try:
        return json.loads(text) if text else None
    except ValueError:
        raise StorageError(f"{file} is torn: is there space left on the disk?") from None


def of_operators(averages: Sequence[Any]) -> dict[str, Calls]:
    """Count calls and seconds of each operator without its children, or on a GPU of each kernel.

    Args:
        averages: of torch.profiler, where kernels and annotations also have entries of their own.
    """
    kernels = [event for event in averages if event.device_type.name != "CPU" and not event.is_user_annotation]
    if kernels:
        return {event.key: (event.count, event.self_device_time_total / 1e6) for event in kernels}
    return {event.key: (event.count, event.self_cpu_time_total / 1e6) for event in averages}


def _shares(seconds_of_ranks: Sequence[Mapping[str, float]], num_updates: int) -> list[Share]:
    """Average over ranks and updates; the largest first."""
    names = dict.fromkeys(name for seconds in seconds_of_ranks for name in seconds)
    found = []
    for name in names:
        milliseconds = [1e3 * seconds.get(name, 0.0) / num_updates for seconds in seconds_of_ranks]
        found.append(Share(name, sum(milliseconds) / len(milliseconds), min(milliseconds), max(milliseconds)))
    return sorted(found, key=lambda share: -share.mean)


def _table(what: str, shares: Sequence[Share], first: int, num_updates: int) -> Table:
    updates = f"updates {first}-{first + num_updates - 1}"
    table = Table(title=f"{updates}: ms an update", title_justify="left", box=None, pad_edge=False)
    table.add_column(what, overflow="fold")
    for column in ("mean", "least", "most", *(["calls"] if any(share.calls for share in shares) else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for share in shares:
        numbers = [f"{number:.3f}" for number in (share.mean, share.least, share.most)]
        table.add_row(share.name, *numbers, *([f"{share.calls:.1f}"] if share.calls else []))
    return table
