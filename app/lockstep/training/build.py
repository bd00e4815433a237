"""Builds the task, the model, its strategy and the trainer that the settings ask for."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lockstep.comm.cluster import Cluster
from lockstep.parallel.pipeline import Pipeline
from lockstep.parallel.rank_grid import RankGrid
from lockstep.parallel.replicated import Replicated
from lockstep.parallel.strategy import Blocks, Strategy
from lockstep.parallel.zero import Zero
from lockstep.runtime.errors import SettingsError
from lockstep.runtime.importing import import_object
from lockstep.runtime.resources import release_freed_memory
from lockstep.settings import TASKS, Settings
from lockstep.tasks.task import Task
from lockstep.training.checkpoint import InMemoryCheckpoint
from lockstep.training.hooks import TrainerHook
from lockstep.training.optim import build_optimizer, freeze
from lockstep.training.run_folder import RunFolder, load_into
from lockstep.training.trainer import Trainer


def build_task(settings: Settings, cluster: Cluster) -> Task:
    """Collective: build the task of `settings`.

    Raises:
        DataError, SettingsError: on every rank: its data or environment is missing on any, or cannot be used.
    """
    name = TASKS.get(settings.task, settings.task)  # imported when needed: Gymnasium takes its time
    kind = cluster.on_every_rank(lambda: _import_task(name))
    return kind(settings, cluster)


def _import_task(name: str) -> type[Task]:
    """Import a task.

    Raises:
        SettingsError: it cannot be imported, or is no task.
    """
    found = import_object(name, "task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise SettingsError(f"task is {name}: it must be a class of its own, derived from lockstep.SupervisedTask")
    return found


def load_task(settings: Settings, folder: RunFolder, cluster: Cluster) -> tuple[Task, nn.Module]:
    """Collective: build the task of the finished run in `folder`, and its merged model, which is not compiled.

    Raises:
        DataError, SettingsError, StorageError: on every rank: see `build_task` and `load_into`.
    """
    task = build_task(replace(settings, model=replace(settings.model, compile=False)), cluster)
    model = task.build_model()
    cluster.on_every_rank(lambda: load_into(model, folder))
    return task, model


def build_trainer(
    cluster: Cluster,
    settings: Settings,
    task: Task,
    folder: RunFolder,
    resume: bool = False,
    handover: InMemoryCheckpoint | None = None,
    hooks: Sequence[TrainerHook] = (),
) -> Trainer:
    """Collective: build the model, optimizer and strategy that `settings` ask for, and a trainer over them.

    Args:
        resume: continue from the last checkpoint in `folder`.
        handover: continue from this.
        hooks: what is added to the run.

    Raises:
        SettingsError: on every rank: the number of ranks does not fit, or a resumed run would change an immutable
            setting.
        StorageError: on every rank: there are checkpoints, and none of them is intact.
    """
    grid = RankGrid.of(settings, cluster.rank, cluster.size)
    strategy = build_strategy(cluster, settings, task, grid)
    release_freed_memory()
    return Trainer(cluster, settings, task, strategy, grid, folder, resume, handover, hooks)


def build_strategy(cluster: Cluster, settings: Settings, task: Task, grid: RankGrid) -> Strategy:
    """Collective: build the model and the strategy that places it on the ranks.

    Raises:
        SettingsError: on every rank: the number of ranks or the model does not fit the settings.
    """
    optimizer = settings.optimizer

    def blocks() -> Blocks:
        return freeze(task.model_blocks(), optimizer.freeze)

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, optimizer)

    if settings.parallel == "replicated":
        model = task.build_model()
        list(freeze(model.named_children(), optimizer.freeze))
        return Replicated(model, build(model), cluster, settings.gradient)
    if settings.parallel == "pipeline":
        whole = settings.data.global_batch_size(grid.num_replicas)
        example = task.example_inputs(-(-whole // (grid.num_replicas * settings.gradient.num_micro_batches)))
        return Pipeline(blocks, build, cluster, settings, grid, task, example)
    stage = int(settings.parallel.removeprefix("zero"))
    zero = Zero(blocks(), build, cluster, settings.gradient, stage)
    if settings.model.compile:
        zero.model.compile()
    return zero
