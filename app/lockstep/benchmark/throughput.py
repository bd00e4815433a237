"""Measure images per second of a run as launched, and of its limit: the same ranks without communication.

The run does everything that app/train.py does in an update, with the ledger on: sampler, all-reduce, replica check, run
log. The limit is a bare PyTorch loop with the same model, batch size, precision and optimizer, with its batches in
memory, no communication, and Horovod's thread stopped. The two take turns, round by round.
"""

import contextlib
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import DataBatch
from lockstep.parallel.step import PHASES
from lockstep.runtime.flight_recorder import WAITING, FlightRecorder
from lockstep.runtime.seeding import seed_model
from lockstep.settings import CheckpointSettings, Settings
from lockstep.tasks.classify import Classify
from lockstep.training.build import build_trainer
from lockstep.training.optim import build_optimizer
from lockstep.training.run_folder import RunFolder
from lockstep.training.trainer import Trainer

T = TypeVar("T")

NUM_BATCHES_IN_MEMORY = 16
WARMUP = 20  # updates of each before the first round


@dataclass(frozen=True)
class Throughput:
    """Measurements over all ranks together.

    Attributes:
        run, limit: images/s of each round.
        ideal: images/s of each round's limit if all ranks waited for the slowest one after every update, at no cost:
            the most that a synchronous run can reach, since the speed of cores varies.
        split: milliseconds of one update of the run by activity; the mean over ranks and rounds.
    """

    run: list[float]
    limit: list[float]
    ideal: list[float]
    split: dict[str, float]

    def ratios(self, to: list[float]) -> list[float]:
        """The run's images/s relative to `to`, round by round."""
        return [mine / other for mine, other in zip(self.run, to, strict=True)]


def measure_throughput(
    cluster: Cluster, settings: Settings, folder: Path, num_rounds: int, num_updates: int, with_limit: bool = True
) -> Throughput:
    """Collective: measure `num_rounds` of `num_updates` of the run, each followed by its limit if `with_limit`.

    Args:
        folder: an empty folder that all ranks see, for the run's files.
    """
    settings = replace(
        settings,
        num_epochs=10**6,
        optimizer=replace(settings.optimizer, learning_rate=1e-6),  # many updates must not diverge to NaN
        checkpoint=CheckpointSettings(interval=0),  # `benchmark checks` measures their cost
        checks=replace(settings.checks, ledger=True),
    )
    run = _Run(cluster, settings, folder)
    limit = _Limit(cluster, run.task, settings) if with_limit else None
    run.updates(WARMUP)
    run_seconds: list[float] = []
    limit_seconds: list[float] = []
    ideal_seconds: list[float] = []
    splits: list[dict[str, float]] = []
    run_images: list[int] = []
    limit_images: list[int] = []
    for _ in range(num_rounds):
        before = run.trainer.progress.num_samples
        parts, seconds = timed(cluster, lambda: run.updates(num_updates))
        run_seconds.append(seconds)
        run_images.append(run.trainer.progress.num_samples - before)
        splits.append(_split(cluster.all_gather_object(parts)))
        if limit:
            with cluster.without_horovod():
                limit.updates(1 if limit_seconds else WARMUP)
                each, seconds = timed(cluster, lambda: limit.updates(num_updates))
            limit_seconds.append(seconds)
            limit_images.append(num_updates * limit.num_images_per_update)
            ideal_seconds.append(sum(map(max, zip(*cluster.all_gather_object(each), strict=True))))
    return Throughput(
        [images / seconds for images, seconds in zip(run_images, run_seconds, strict=True)],
        [images / seconds for images, seconds in zip(limit_images, limit_seconds, strict=True)],
        [images / seconds for images, seconds in zip(limit_images, ideal_seconds, strict=True)],
        {name: statistics.mean(split[name] for split in splits) for name in splits[0]},
    )


class _SynchronisedRecorder(FlightRecorder):
    """A flight recorder that waits for the GPU between phases, so that each phase is charged for its own work."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._on_gpu = device.type == "cuda"

    def enter(self, phase: str, update: int | None = None) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        super().enter(phase, update)


class _Run:
    """Training, as app/train.py does it."""

    def __init__(self, cluster: Cluster, settings: Settings, folder: Path) -> None:
        """Collective."""
        recorded = replace(cluster, recorder=_SynchronisedRecorder(cluster.device))
        self._recorder = recorded.recorder
        self.task = Classify(settings, recorded)
        self.trainer: Trainer = build_trainer(recorded, settings, self.task, RunFolder(folder))
        self._batches = forever(self.trainer)

    def updates(self, number: int) -> list[tuple[float, float, float, float]]:
        """Collective: train for `number` updates.

        Returns for each update the seconds of the sampler, of everything else, of the step within that, and of the
        all-reduce within the step.
        """
        parts = []
        with contextlib.redirect_stdout(io.StringIO()):  # the log lines
            for _ in range(number):
                started = time.perf_counter()
                batch = next(self._batches)
                sampled = time.perf_counter()
                self._recorder.take_seconds()
                self.trainer.update(batch)
                phases = self._recorder.take_seconds()
                waiting = phases.get(WAITING, 0.0)
                step = sum(phases.get(phase, 0.0) for phase in PHASES)
                parts.append((sampled - started, sum(phases.values()), step + waiting, waiting))
        return parts


def forever(trainer: Trainer) -> Iterator[DataBatch]:
    """Yield the batches of one epoch after the other, without end."""
    while True:
        yield from trainer.loader.rest_of_epoch()


class _Limit:
    """A bare PyTorch loop with the same model and settings, on this rank alone."""

    def __init__(self, cluster: Cluster, task: Classify, settings: Settings) -> None:
        self._task = task
        self._device = cluster.device
        seed_model(settings.seed)
        self._model = task.build_model()
        self._optimizer = build_optimizer(self._model, settings.optimizer)
        loader = task.build_loader(cluster.rank, cluster.size)
        batches = itertools.islice(loader.rest_of_epoch(), NUM_BATCHES_IN_MEMORY)
        full = min(loader.batch_size, loader.num_samples)  # a smaller last batch of the epoch would count too much
        self._batches = [batch for batch in batches if batch.global_size == full]
        self.num_images_per_update = full
        self._next = 0

    def updates(self, number: int) -> list[float]:
        """Train for `number` updates; return the seconds of each."""
        seconds = []
        for _ in range(number):
            batch = self._batches[self._next % len(self._batches)]
            self._next += 1
            started = time.perf_counter()
            self._optimizer.zero_grad()
            F.nll_loss(self._task.outputs(self._model, batch.inputs), batch.data[1]).backward()
            self._optimizer.step()
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds


def timed(cluster: Cluster, function: Callable[[], T]) -> tuple[T, float]:
    """Collective: call `function`; return its result, and the seconds until all ranks have finished."""
    cluster.barrier()
    started = time.perf_counter()
    answer = function()
    cluster.barrier()
    return answer, time.perf_counter() - started


def _split(ranks: list[list[tuple[float, float, float, float]]]) -> dict[str, float]:
    """Milliseconds of an update by activity, from the times that `_Run.updates` returned on every rank.

    The last rank to enter an all-reduce waits for no other, so its time is that of the all-reduce itself.
    """
    parts = torch.tensor(ranks, dtype=torch.float64).mul_(1e3)  # (ranks, updates, 4)
    sampler, rest, inside, sums = parts.unbind(2)
    reduce = sums.amin(0)
    split = {
        "sampler": sampler,
        "forward, backward, check, step": inside - sums,
        "waiting for the slowest rank": sums - reduce,
        "all-reduce": reduce,
        "ledger, replica check, run log": rest - inside,
    }
    return {name: part.mean().item() for name, part in split.items()}
