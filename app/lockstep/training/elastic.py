"""What the workers of an elastic job pass on from one generation to the next: the run, and its state.

An update is done or not done: when a worker is lost in the midst of one, no model has changed yet, since gradients are
summed before the optimizer's step. Some of the remaining workers may have received the whole sum and done the update
while others have not. So all continue from a worker that has done the most updates.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lockstep.comm.cluster import Cluster
from lockstep.comm.elastic import GENERATION_ENDED
from lockstep.comm.rendezvous import job_name
from lockstep.runtime.errors import SettingsError, StorageError
from lockstep.settings import Settings
from lockstep.settings.reading import DEFAULT_RUN
from lockstep.training.checkpoint import InMemoryCheckpoint
from lockstep.training.loggers import check_loggers
from lockstep.training.run_folder import RunFolder
from lockstep.training.run_logger import mark_after
from lockstep.training.trainer import Trainer

JOB = ".job"  # in the run folder: which elastic job it belongs to


@dataclass(frozen=True)
class Run:
    """What all workers agree on at the start."""

    settings: Settings
    resume: bool
    folder: RunFolder
    is_finished: bool = False

    @staticmethod
    def open(settings: Settings, resume: bool, elastic: bool) -> "Run":
        """On rank 0, where no worker has a run: begin a new one, or with `resume` continue one.

        In an elastic job, all workers that had the run may have been lost; then its folder shows that it is this job's.

        Raises:
            SettingsError: `run_dir` is not empty; or with `resume` it has nothing to continue, or a finished run that
                `settings` would change; or a logger's package is missing.
            StorageError: the folder cannot be made or written.
        """
        check_loggers(settings.logger_names)  # before a folder is left behind
        if not elastic:
            folder = RunFolder.reopen(settings) if resume else RunFolder.create(settings)
            return Run(settings, resume, folder, is_finished=resume and folder.is_finished(settings))
        left = Path(settings.run_dir) if settings.run_dir else DEFAULT_RUN.resolve()
        with contextlib.suppress(OSError):
            if (left / JOB).read_text() == job_name():
                return Run(settings, True, RunFolder(left))
        run = Run.open(settings, resume, elastic=False)
        if not run.is_finished:
            run.folder.write(JOB, job_name())
        return run


@dataclass(frozen=True)
class _WorkerState:
    """How far one worker is: its trainer's `position`, and its tensors' shapes and types."""

    position: dict[str, Any]
    metric_sums: list[float]
    layout: dict[str, tuple[torch.Size, torch.dtype]]

    @property
    def step(self) -> int:
        return int(self.position["progress"]["step"])


class ElasticState:
    """What this worker has of the run: nothing if it is new.

    Attributes:
        run: the run.
        trainer: of the last generation it was in.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.trainer: Trainer | None = None

    def run_of(self, cluster: Cluster) -> Run | None:
        """Collective: get the run from any worker that has it; None if it has not begun."""
        return next((run for run in cluster.all_gather_object(self.run) if run), None)

    def take_over(self, cluster: Cluster) -> InMemoryCheckpoint | None:
        """Collective: get the state that the new generation continues from; None if no worker has a model yet."""
        standings = cluster.all_gather_object(self._worker_state())
        steps = [standing.step if standing else -1 for standing in standings]
        leader = steps.index(max(steps))
        furthest = standings[leader]
        if furthest is None:
            return None
        if leader == cluster.rank and self.trainer:
            tensors = {name: part.values for name, part in self.trainer.strategy.state().items()}
        else:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in furthest.layout.items()}
        if leader != 0:
            cluster.broadcast_parameters(tensors, root=leader)  # from which the others get it
        run = self.run
        assert run
        counters = {
            **furthest.position,
            "metrics_mark": cluster.on_root(lambda: mark_after(run.folder.metrics, furthest.step)),
            # The metric sums of lost workers since the last log line are lost with them.
            "metric_sums_of_ranks": [other.metric_sums if other else None for other in standings],
        }
        return InMemoryCheckpoint(tensors, furthest.step, counters)

    def leave(self) -> None:
        """Leave a generation that is no more: finish or give up what was being written, and put the model back to where
        it was after the last update that was done.
        """
        if self.trainer:
            with contextlib.suppress(StorageError, *GENERATION_ENDED):
                self.trainer.writer.wait()
            self.trainer.strategy.forget_changes()

    def _worker_state(self) -> _WorkerState | None:
        if self.trainer is None:
            return None
        state = self.trainer.strategy.state()
        layout = {name: (part.values.shape, part.values.dtype) for name, part in state.items()}
        return _WorkerState(self.trainer.position(), self.trainer.metrics.metric_sums(), layout)


def check_elastic(settings: Settings) -> None:
    """
    Raises:
        SettingsError: on every rank: the run cannot be elastic.
    """
    data, checks = settings.data, settings.checks
    refused = {
        "task is ppo, of which an update is many steps, not one that is done or not done: use mpirun": (
            settings.task == "ppo"
        ),
        f"parallel is {settings.parallel}: a lost worker would take its part of the model with it; use replicated": (
            settings.parallel != "replicated"
        ),
        "gradient.reduction is adasum, which means something else on every number of ranks: use sum": (
            settings.gradient.reduction != "sum"
        ),
        "data.batch_size_per_rank is set, and the global batch must stay when ranks come and go: use data.batch_size": (
            data.batch_size_per_rank is not None
        ),
        "checkpoint.best is set, and a lost worker may leave a best checkpoint half written: use mpirun": (
            settings.checkpoint.best is not None
        ),
        "profile is set, and the ranks whose updates are recorded may come and go: use mpirun": bool(settings.profile),
        "checks.non_finite is skip, and the ledger is written before an update is known to be skipped: use stop": (
            checks.ledger and checks.non_finite == "skip"
        ),
    }
    for why, is_so in refused.items():
        if is_so:
            raise SettingsError(f"this job is elastic, and {why}").as_shared()
