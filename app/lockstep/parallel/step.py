"""One update of the model, on one screen: every task trains by `train_step`, under every strategy."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lockstep.data.batch import Batch
from lockstep.parallel.strategy import Objective, Strategy
from lockstep.runtime.errors import NothingToLearnError, UserCodeError
from lockstep.runtime.seeding import seed_update

FORWARD_BACKWARD, REDUCTION, OPTIMIZER = PHASES = ("forward and backward pass", "gradient reduction", "optimizer step")


def train_step(
    strategy: Strategy, batch: Batch, objective: Objective, seed: int, before_step: Callable[[], None] | None = None
) -> Tensor:
    """Collective: one optimizer step along the exact mean gradient over the global batch.

    Each rank divides its summed loss by the *global* number of samples, and the gradients are summed: ranks may hold
    different numbers of samples, or none. Where samples weigh differently, the gradients are then scaled by that number
    over the global weight, whose sum travels with them. Adasum combines the means over each rank's own samples instead.

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
        NothingToLearnError: on every rank, with nothing of the model changed: no sample of the global batch has weight.
        UserCodeError: on every rank: a weight is negative or not finite.
    """
    strategy.recorder.enter(FORWARD_BACKWARD)
    strategy.zero_gradients()
    metric_sums = strategy.forward_backward(batch, objective, seed)
    strategy.recorder.enter(REDUCTION)
    weight = objective.weight(metric_sums)
    finish_sum = strategy.begin_sum(_with_faults(weight)) if weight is not None else None
    strategy.reduce_gradients()
    if finish_sum:
        _divide_by_weight(strategy, finish_sum(), batch.global_size)
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

    @property
    def device(self) -> torch.device: ...

    def micro_batches(self, batch: Batch) -> Sequence[Batch]: ...

    def loss_divisor(self, batch: Batch) -> int: ...

    def backward(self, loss: Tensor, is_last: bool) -> None: ...


def accumulate_gradients(strategy: DataParallel, batch: Batch, objective: Objective, seed: int) -> Tensor:
    """Collective: the forward and backward pass of every micro-batch; returns the metric sums (k,) over all of them."""
    seed_update(seed, strategy.device)
    metric_sums: list[Tensor] = []
    micro_batches = strategy.micro_batches(batch)
    for micro_batch in micro_batches:
        outputs = objective.outputs(strategy.model, micro_batch.inputs)
        loss_sum, metrics = loss_of(objective, outputs, micro_batch)
        strategy.backward(loss_sum / strategy.loss_divisor(batch), is_last=micro_batch is micro_batches[-1])
        metric_sums.append(metrics)
    return reduce(torch.add, metric_sums)


def loss_of(objective: Objective, outputs: Any, micro_batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the summed loss and metric sums of a micro-batch; both are 0 if it has only a stand-in for a sample."""
    loss_sum, metrics = objective.loss_sum(outputs, micro_batch)
    return (loss_sum, metrics) if len(micro_batch) else (loss_sum * 0, metrics * 0)


def _with_faults(weight: Tensor) -> Tensor:
    """Return a weight and whether it is wrong (2,), so that one sum tells every rank of both."""
    is_wrong = ~(weight.isfinite() & (weight >= 0))
    return torch.stack([weight.nan_to_num(), is_wrong.to(weight.dtype)])


def _divide_by_weight(strategy: Strategy, total: Tensor, global_size: int) -> None:
    """Make of gradients of the sum over `global_size` those of the mean over the global weight.

    Args:
        total: (2,), over all ranks: the weight, and the number of ranks whose weight is wrong.
    """
    weight, num_wrong = total.tolist()
    if num_wrong or weight == 0:
        strategy.forget_changes()
        if num_wrong:
            message = "the weight of the loss is negative or not finite on some rank: it must be a number of at least 0"
            raise UserCodeError(message).as_shared()
        raise NothingToLearnError("every sample of the global batch has the weight 0").as_shared()
    for gradient in strategy.reduced_gradients():
        gradient.mul_(global_size / weight)


def clip_gradients(gradients: Sequence[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients of the global `norm` down to `max_norm`, in place (Pascanu et al. 2013, algorithm 1)."""
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
