"""Compare every strategy with `replicated`: losses and weights, and the bytes that a rank holds and sends.

`held` is the total size of all tensors reachable from the strategy; `sent` is counted by the kernel, on one node with
Open MPI.
"""

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from lockstep.benchmark.throughput import forever, timed
from lockstep.comm.cluster import Cluster
from lockstep.parallel.pipeline import Pipeline
from lockstep.parallel.step import train_step
from lockstep.parallel.strategy import Strategy
from lockstep.runtime.resources import bytes_sent_counter
from lockstep.settings import (
    CheckpointSettings,
    DataSettings,
    GradientSettings,
    ModelSettings,
    OptimizerSettings,
    Settings,
)
from lockstep.tasks.classify import Classify
from lockstep.training.build import build_trainer
from lockstep.training.run_folder import RunFolder

Parallel = Literal["replicated", "zero1", "zero2", "zero3", "pipeline"]
STRATEGIES: tuple[Parallel, ...] = ("replicated", "zero1", "zero2", "zero3", "pipeline")
NUM_STATES = 2  # of Adam per parameter

MICRO_BATCHES, CLIP_NORM = 3, 0.5


def proof_settings(model: ModelSettings, parallel: Parallel) -> Settings:
    """Settings in float64 that use everything in which strategies could differ.

    Uneven batches, micro-batches, gradient clipping, and Adam with weight decay on one of two groups.
    """
    return Settings(
        parallel=parallel,
        precision="float64",
        log_interval=10**9,
        data=DataSettings(name="synthetic", num_samples=100, batch_size=22),
        model=replace(model, name="vit", vit=replace(model.vit, dropout=0.0)),
        optimizer=OptimizerSettings(name="adam", learning_rate=1e-3, weight_decay=1e-2, decay_vectors=False),
        gradient=GradientSettings(num_micro_batches=MICRO_BATCHES, clip_norm=CLIP_NORM),
        checkpoint=CheckpointSettings(interval=0),
    )


@dataclass(frozen=True)
class StrategyResult:
    """What was measured of one strategy.

    Attributes:
        losses: the loss of each update.
        weights: the merged model after the last update; on rank 0 only.
        held: bytes held by the rank that holds most.
        sent: bytes sent per update, mean over ranks; 0 if the kernel does not count them.
        held_formula, sent_formula: what the formulas say; None if there is none.
    """

    losses: list[float]
    weights: dict[str, Tensor]
    held: int
    held_formula: float
    sent: float
    sent_formula: float | None


def measure_strategy(cluster: Cluster, settings: Settings, scratch: Path, num_updates: int) -> StrategyResult:
    """Collective: train for `num_updates` after a first one, which allocates the memory."""
    folder = scratch / settings.parallel
    cluster.on_root(lambda: folder.mkdir())
    trainer = build_trainer(cluster, settings, Classify(settings, cluster), RunFolder(folder))
    strategy, batches = trainer.strategy, forever(trainer)
    count = bytes_sent_counter() or (lambda: 0)
    metric_sums = [train_step(strategy, next(batches), trainer.task, 0)]

    def updates() -> int:
        before = count()
        metric_sums.extend(train_step(strategy, next(batches), trainer.task, 0) for _ in range(num_updates))
        return count() - before

    sent, _ = timed(cluster, updates)
    held = max(cluster.all_gather_object(held_bytes(strategy)))
    losses = [cluster.sum_(sums, name="losses").tolist() for sums in metric_sums]
    weights: dict[str, Tensor] = {}
    strategy.merge(lambda name, tensor: weights.update({name: tensor}))
    held_formula, sent_formula = formulas(cluster, strategy, settings)
    return StrategyResult(
        [trainer.task.scores(sums)["loss"] for sums in losses],
        weights,
        held,
        held_formula,
        max(cluster.all_gather_object(sent)) / cluster.size / num_updates,
        sent_formula,
    )


def formulas(cluster: Cluster, strategy: Strategy, settings: Settings) -> tuple[float, float | None]:
    """Collective: the bytes that the fullest rank should hold between updates, and send in one, with Adam.

    For P bytes of parameters on N ranks, L of them in the largest block: see the docstring of parallel/zero.py. The
    buffers that blocks pass through count as held: two for gradients and one for received gradients; at stage 3 two for
    parameters, below it two for shards to send. A pipeline sends activations, for which there is no formula.
    """
    how, n = settings.parallel, cluster.size
    blocks: dict[str, int] = {}
    for name, tensor in strategy.meta_state.items():
        block = name.split(".")[0]
        blocks[block] = blocks.get(block, 0) + tensor.nbytes
    total, largest, fraction = sum(blocks.values()), max(blocks.values()), (n - 1) / n
    num_micro_batches = settings.gradient.num_micro_batches
    if how == "replicated":
        return total * (2 + NUM_STATES), 2 * fraction * total
    if how == "zero1":
        return total * (2 + NUM_STATES / n) + largest * (1 + 2 / n), 2 * fraction * total
    if how == "zero2":
        return total * (1 + (1 + NUM_STATES) / n) + largest * (3 + 2 / n), (1 + num_micro_batches) * fraction * total
    if how == "zero3":
        return total * (2 + NUM_STATES) / n + largest * 5, 3 * num_micro_batches * fraction * total
    of_stage = sum(parameter.nbytes for parameter in strategy.model.parameters())
    return max(cluster.all_gather_object(of_stage)) * (2 + NUM_STATES), None


def held_bytes(root: object) -> int:
    """The bytes of all tensors reachable from `root`; storage that several tensors share counts once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | Cluster):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if thing.device.type != "meta":
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            if thing.is_leaf and thing.grad is not None:
                waiting.append(thing.grad)
        elif isinstance(thing, torch.UntypedStorage):
            storages[thing.data_ptr()] = thing.nbytes()
        elif not callable(thing) or isinstance(thing, nn.Module) or hasattr(thing, "func"):
            waiting += [referent for referent in gc.get_referents(thing) if not isinstance(referent, str | bytes | int)]
    return sum(storages.values())


@dataclass(frozen=True)
class PipelineResult:
    """What was measured of a pipeline.

    Attributes:
        run: updates/s of each round.
        ideal: updates/s of each round if only the bubble cost time.
        stage_milliseconds: by stage, milliseconds of one micro-batch forward and backward.
    """

    run: list[float]
    ideal: list[float]
    stage_milliseconds: list[float]


def measure_pipeline(
    cluster: Cluster, settings: Settings, folder: Path, num_rounds: int, num_updates: int
) -> PipelineResult:
    """Collective: in turn, time updates of a pipeline, and all its stages at once without messages between them.

    With m micro-batches and p stages, the ideal update takes m + p - 1 times the slowest stage's time of a micro-batch,
    plus the optimizer's step (Huang et al. 2019, section 2.3).
    """
    settings = replace(
        settings,
        parallel="pipeline",
        log_interval=10**9,
        optimizer=replace(settings.optimizer, learning_rate=1e-6),  # many updates must not diverge to NaN
        checkpoint=CheckpointSettings(interval=0),
        checks=replace(settings.checks, replica_interval=0),
    )
    trainer = build_trainer(cluster, settings, Classify(settings, cluster), RunFolder(folder))
    strategy, batches = trainer.strategy, forever(trainer)
    assert isinstance(strategy, Pipeline)
    num_stages = len(strategy.firsts)
    run, ideal, stages = [], [], [0.0] * num_stages
    for number in range(num_rounds + 1):  # the first round is a warm-up

        def updates() -> None:
            for _ in range(num_updates):
                train_step(strategy, next(batches), trainer.task, 0)

        _, seconds = timed(cluster, updates)
        batch = next(batches)
        micro_batches = batch.split(settings.gradient.num_micro_batches)
        passes, step = strategy.time_alone(micro_batches, trainer.task, num_updates)
        of_ranks = cluster.all_gather_object((passes, step))
        slowest = max(passes for passes, _ in of_ranks)
        if number:
            ideal_seconds = (len(micro_batches) + num_stages - 1) * slowest + max(step for _, step in of_ranks)
            run.append(num_updates / seconds)
            ideal.append(1 / ideal_seconds)
            stages = [1e3 * passes for passes, _ in of_ranks[:num_stages]]
    return PipelineResult(run, ideal, stages)
