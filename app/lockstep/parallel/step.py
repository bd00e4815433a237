"""One update of the model, on one screen: every task trains by `train_step`, under every strategy."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, nn

from lockstep.data.batch import Batch
from lockstep.parallel.strategy import Objective, Strategy
from lockstep.runtime.seeding import seed_update

FORWARD_BACKWARD, REDUCTION, OPTIMIZER = PHASES = ("forward and backward pass", "gradient reduction", "optimizer step")


def train_step(
    strategy: Strategy, batch: Batch, objective: Objective, seed: int, before_step: Callable[[], None] | None = None
) -> Tensor:
    """Collective: one optimizer step along the exact mean gradient over the global batch.

    Each rank divides its summed loss by the *global* number of samples, and the gradients are summed: ranks may hold
    different numbers of samples, or none. Adasum combines the means over each rank's own samples instead.

    Args:
        batch: this rank's samples of the global batch.
        objective: what to minimise.
        seed: of everything random in this update, on this rank.
        before_step: called when gradients are ready, before parameters and optimizer state change.

    Returns:
        The metric sums (k,) of this rank's samples; the other ranks' are not in it.

    Raises:
        NonFiniteError: on every rank, with nothing of the model changed, if a loss or gradient is infinite or not a
            number on any rank; names the first such rank and tensor.
    """
    strategy.recorder.enter(FORWARD_BACKWARD)
    strategy.zero_gradients()
    metric_sums = strategy.forward_backward(batch, objective, seed)
    strategy.recorder.enter(REDUCTION)
    strategy.reduce_gradients()
    squared_norm = strategy.squared_gradient_norm()
    if not math.isfinite(squared_norm):  # on all ranks or on none, so that they stop or skip in the same update
        raise strategy.find_non_finite(batch, objective, seed)
    strategy.average_buffers(len(batch) / batch.global_size)
    strategy.recorder.enter(OPTIMIZER)
    if strategy.clip_norm is not None:
        clip_gradients(strategy.reduced_gradients(), math.sqrt(squared_norm), strategy.clip_norm)
    if before_step:
        before_step()
    strategy.optimizer_step()
    return metric_sums


class DataParallel(Protocol):
    """A strategy whose ranks pass their samples through the model micro-batch by micro-batch."""

    model: nn.Module

    def micro_batches(self, batch: Batch) -> Sequence[Batch]: ...

    def loss_divisor(self, batch: Batch) -> int: ...

    def backward(self, loss: Tensor, is_last: bool) -> None: ...


def accumulate_gradients(strategy: DataParallel, batch: Batch, objective: Objective, seed: int) -> Tensor:
    """Collective: the forward and backward pass of every micro-batch; returns the metric sums (k,) over all of them."""
    seed_update(seed, batch.inputs.device)
    metric_sums: list[Tensor] = []
    micro_batches = strategy.micro_batches(batch)
    for micro_batch in micro_batches:
        outputs = objective.outputs(strategy.model, micro_batch.inputs)
        loss_sum, metrics = objective.loss_sum(outputs, micro_batch)
        strategy.backward(loss_sum / strategy.loss_divisor(batch), is_last=micro_batch is micro_batches[-1])
        metric_sums.append(metrics)
    return reduce(torch.add, metric_sums)


def clip_gradients(gradients: Sequence[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients of the global `norm` down to `max_norm`, in place (Pascanu et al. 2013, algorithm 1)."""
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
