"""The public API, which `import lockstep` gives by name: docs/api.md has an example of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lockstep.comm.cluster import Cluster  # isort: skip  MPI before Horovod
import json
import os

from torch import nn

from lockstep.comm.program import restored_process, session, stall_handler, tell
from lockstep.comm.stop import StopRequests
from lockstep.runtime.errors import SettingsError
from lockstep.settings import Settings
from lockstep.settings.reading import parse_settings
from lockstep.tasks.supervised import SupervisedTask
from lockstep.tasks.task import Evaluation, Task
from lockstep.training.build import load_task
from lockstep.training.hooks import TrainerHook
from lockstep.training.run import run
from lockstep.training.run_folder import SUMMARY, RunFolder, storage_errors


def read_settings(*options: str) -> Settings:
    """Read settings as `lockstep train` does: from the environment, a preset or file, and options.

    Args:
        options: as typed on a command line: `read_settings("--config", "reference", "--num_epochs", "2")`.

    Raises:
        SettingsError: a setting is unknown or wrong.
    """
    settings, resume = parse_settings(options)
    if resume:
        raise SettingsError("--resume is no setting: call train(settings, resume=True)")
    return settings


@dataclass(frozen=True)
class FinishedRun:
    """The folder of a finished run.

    Attributes:
        path: the run folder.
    """

    path: Path

    @cached_property
    def settings(self) -> Settings:
        """The settings that it was trained with."""
        return RunFolder.open(self.path).load_settings()

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What summary.json has: scores, numbers of parameters, ranks and updates, seconds by phase."""
        with storage_errors():
            found: dict[str, Any] = json.loads((self.path / SUMMARY).read_text())
        return found

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The points of the curves, in order: `kind` (train or held_out), `step`, `epoch`, `samples`, and metrics."""
        with storage_errors():
            return [json.loads(line) for line in RunFolder(self.path).metrics.read_text().splitlines()]


def train(
    settings: Settings,
    resume: bool = False,
    hooks: Sequence[TrainerHook] = (),
    task: type[SupervisedTask] | None = None,
) -> FinishedRun:
    """Collective: train one run on all ranks of this job, and merge its model on rank 0.

    The process is left as it was found: signal handlers, CPU binding, threads, deterministic mode and random state are
    restored, MPI is not finalised. Several runs may follow each other, except in a job that Gloo has started.

    Args:
        settings: rank 0's count.
        resume: continue the run in `settings.run_dir` from its last checkpoint.
        hooks: called on the way, on every rank.
        task: what to train, in place of `settings.task`; its own settings are in `settings.options`.

    Raises:
        LockstepError: on every rank. An error that only one of several ranks has is printed, and the job is aborted.
        StoppedError: SIGUSR1, SIGTERM, Ctrl-C or the end of the job's time stopped it, and it was saved.
        StalledError: of one rank in its main thread: nothing happened for `stall.limit_seconds`. Other stalled jobs are
            ended by their watchdog.
    """
    if task is not None:
        if "<locals>" in task.__qualname__:
            message = f"{task.__qualname__} is defined in a function, where nobody finds it by its name"
            raise SettingsError(f"{message}: define it at the top level of a module").as_shared()
        settings = replace(settings, task=f"{task.__module__}.{task.__qualname__}")
    with session() as cluster:
        requests = StopRequests(tell if cluster.is_root else lambda _: None)
        path = run(cluster, hooks, lambda: (settings, resume), stall_handler(cluster), requests)
    if requests.received:  # too late for this run: for whatever follows it
        os.kill(os.getpid(), requests.received)
    return FinishedRun(path)


def evaluate(path: Path | str, trust: bool = False) -> Evaluation:
    """Collective: score the merged model of a finished run on its held-out data or in seeded episodes, on all ranks.

    Args:
        path: the run folder, which all ranks must see.
        trust: import code that another user's settings name.

    Raises:
        StorageError: the run is not finished.
    """
    with session() as cluster:
        task, model = _load(Path(path), trust, cluster)
        return task.evaluate(model, partial(task.outputs, model), cluster.rank, cluster.size)


def load_model(path: Path | str, trust: bool = False) -> nn.Module:
    """Load the merged model of a finished run, on the CPU and in evaluation mode. Not a collective.

    The network is built from the run's settings and its data set or environment, which must be there.

    Args:
        path: the run folder.
        trust: import code that another user's settings name.

    Raises:
        DataError: the run's data set, which tells the shape of inputs and the classes, is missing.
        StorageError: the run is not finished, or its model was altered.
    """
    with restored_process():
        return _load(Path(path), trust, Cluster.alone())[1].eval()


def _load(path: Path, trust: bool, cluster: Cluster) -> tuple[Task, nn.Module]:
    """Collective: build the task of a finished run, and load its merged model."""
    settings = cluster.on_root(lambda: RunFolder.open(path).load_settings(trust))
    return load_task(settings, RunFolder(path), cluster)
