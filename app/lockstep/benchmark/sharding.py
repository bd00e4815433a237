"""Every strategy beside `replicated`: whether it learns the same, and what a rank holds and sends beside the formula.

`held` is found by walking over all that a strategy holds; `sent` is counted by the kernel, on one node with Open MPI.
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
from lockstep.runtime.network_counters import bytes_sent_counter
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
NUM_STATES = 2  # that Adam keeps for each parameter

MICRO_BATCHES, CLIP_NORM = 3, 0.5


def proof_settings(model: ModelSettings, parallel: Parallel) -> Settings:
    """A run in which all that could differ does something, in float64: ragged batches, micro-batches, clipping, Adam
    with weight decay on one of two groups."""
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
class Found:
    """What one strategy did on this rank, or on all of them.

    Attributes:
        losses: of each update.
        weights: after the last, of the whole model; on rank 0.
        held: bytes of the rank that holds most.
        sent: bytes of an update, the mean over ranks; 0 where they are not counted.
        held_formula, sent_formula: what they should be; None where there is no formula.
    """

    losses: list[float]
    weights: dict[str, Tensor]
    held: int
    held_formula: float
    sent: float
    sent_formula: float | None


def measure_strategy(cluster: Cluster, settings: Settings, scratch: Path, num_updates: int) -> Found:
    """Collective: train for `num_updates` after a first one."""
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
    return Found(
        [loss_sum / num_samples for loss_sum, _, num_samples in losses],
        weights,
        held,
        held_formula,
        max(cluster.all_gather_object(sent)) / cluster.size / num_updates,
        sent_formula,
    )


def formulas(cluster: Cluster, strategy: Strategy, settings: Settings) -> tuple[float, float | None]:
    """Collective: bytes that the rank with most holds between updates, and sends in one, with Adam.

    With P bytes of parameters on N ranks, of which the largest block has L: see the head of parallel/zero.py. The
    memory that blocks pass through counts as held: two slots for gradients, one for those received, two for parameters
    at stage 3, and two for the parts that are sent below it. A pipeline sends activations, which have no such formula.
    """
    how, n = settings.parallel, cluster.size
    blocks: dict[str, int] = {}
    for name, tensor in strategy.meta_state.items():
        block = name.split(".")[0]
        blocks[block] = blocks.get(block, 0) + tensor.nbytes
    whole, largest, part = sum(blocks.values()), max(blocks.values()), (n - 1) / n
    num_pieces = settings.gradient.num_micro_batches
    if how == "replicated":
        return whole * (2 + NUM_STATES), 2 * part * whole
    if how == "zero1":
        return whole * (2 + NUM_STATES / n) + largest * (1 + 2 / n), 2 * part * whole
    if how == "zero2":
        return whole * (1 + (1 + NUM_STATES) / n) + largest * (3 + 2 / n), (1 + num_pieces) * part * whole
    if how == "zero3":
        return whole * (2 + NUM_STATES) / n + largest * 5, 3 * num_pieces * part * whole
    of_stage = sum(parameter.nbytes for parameter in strategy.model.parameters())
    return max(cluster.all_gather_object(of_stage)) * (2 + NUM_STATES), None


def held_bytes(root: object) -> int:
    """The bytes of all tensors that can be reached from `root`; memory that several share counts once."""
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
class PipelineFound:
    """
    Attributes:
        run: updates/s of each round.
        ideal: updates/s of the same rounds if nothing were lost but the bubble.
        stage_milliseconds: of one micro-batch forward and backward, by stage.
    """

    run: list[float]
    ideal: list[float]
    stage_milliseconds: list[float]


def measure_pipeline(
    cluster: Cluster, settings: Settings, folder: Path, num_rounds: int, num_updates: int
) -> PipelineFound:
    """Collective: updates of a pipeline, and in turn every stage by itself, at the same time, without messages.

    Of m micro-batches and p stages, the ideal takes m + p - 1 times as long as the slowest stage's micro-batch, and the
    optimizer's step (Huang et al. 2019, section 2.3).
    """
    settings = replace(
        settings,
        parallel="pipeline",
        log_interval=10**9,
        optimizer=replace(settings.optimizer, learning_rate=1e-6),  # so many updates must not end in NaN
        checkpoint=CheckpointSettings(interval=0),
        checks=replace(settings.checks, replica_interval=0),
    )
    trainer = build_trainer(cluster, settings, Classify(settings, cluster), RunFolder(folder))
    strategy, batches = trainer.strategy, forever(trainer)
    assert isinstance(strategy, Pipeline)
    num_stages = len(strategy.firsts)
    run, ideal, stages = [], [], [0.0] * num_stages
    for number in range(num_rounds + 1):  # the first is not counted

        def updates() -> None:
            for _ in range(num_updates):
                train_step(strategy, next(batches), trainer.task, 0)

        _, seconds = timed(cluster, updates)
        batch = next(batches)
        pieces = batch.split(settings.gradient.num_micro_batches)
        passes, step = strategy.time_alone(pieces, trainer.task, num_updates)
        of_ranks = cluster.all_gather_object((passes, step))
        slowest = max(passes for passes, _ in of_ranks)
        if number:
            whole = (len(pieces) + num_stages - 1) * slowest + max(step for _, step in of_ranks)
            run.append(num_updates / seconds)
            ideal.append(1 / whole)
            stages = [1e3 * passes for passes, _ in of_ranks[:num_stages]]
    return PipelineFound(run, ideal, stages)
