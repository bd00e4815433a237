"""The plan of a pipeline: which blocks lie in which stage, and which micro-batch a stage works on when.

Blocks are cut into stages by hand, or balanced by measured cost. The schedules are pure functions:

    GPipe (Huang et al. 2019, section 2.3)      all forward, then all backward: every activation is kept
    1F1B (Narayanan et al. 2019, section 3.2)   one forward, one backward in turn: a stage keeps the activations of
                                                at most as many micro-batches as there are stages from it on

Both take equally long: with m micro-batches and p stages, (p - 1) / (m + p - 1) of the time is the bubble.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lockstep.runtime.errors import SettingsError


@dataclass(frozen=True)
class BlockCost:
    """What was measured of a block.

    Attributes:
        seconds: forward and backward, of one micro-batch.
        output_shape: of one sample.
        learns: whether it has trainable parameters.
    """

    name: str
    seconds: float
    output_shape: tuple[int, ...]
    output_dtype: torch.dtype
    learns: bool


NUM_TIMINGS = 3


class _Changeable(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, leaf: Tensor) -> Tensor:
        # Not a view: those must not be changed in place either.
        same: Tensor = leaf.new_empty(0).set_(leaf)  # type: ignore[call-overload]
        return same

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


def changeable(leaf: Tensor) -> Tensor:
    """Wrap `leaf`, in the same memory, for blocks that begin with an operation in place (ReLU): a leaf forbids that."""
    changed: Tensor = _Changeable.apply(leaf)
    return changed


def measure_blocks(
    blocks: Iterable[tuple[str, nn.Module]], outputs_of: Callable[[nn.Module, Tensor], Tensor], inputs: Tensor
) -> list[BlockCost]:
    """Measure the cost of each block, as the quickest of some passes; the first is given `inputs` (n, ...). The weights
    must not be used afterwards: dropout has drawn from the random state that initialises them.
    """
    costs: list[BlockCost] = []
    for name, block in blocks:
        seconds = []
        for _ in range(NUM_TIMINGS):
            taken = inputs.detach().clone().requires_grad_(bool(costs))
            wait_for_device(inputs)
            started = time.perf_counter()
            outputs = outputs_of(block, changeable(taken))
            if outputs.requires_grad:
                outputs.backward(torch.ones_like(outputs))
            wait_for_device(inputs)
            seconds.append(time.perf_counter() - started)
        learns = any(parameter.requires_grad for parameter in block.parameters())
        costs.append(BlockCost(name, min(seconds), tuple(outputs.shape[1:]), outputs.dtype, learns))
        inputs = outputs
    return costs


def cut_blocks(costs: Sequence[BlockCost], num_stages: int) -> list[int]:
    """Find the first block of every stage, such that the costliest stage costs least and each has trainable parameters.

    Raises:
        SettingsError: there are fewer blocks with trainable parameters than stages.
    """
    num_learning = sum(cost.learns for cost in costs)
    if num_learning < num_stages:
        raise SettingsError(
            f"pipeline.num_stages is {num_stages}: the model has {num_learning} blocks with parameters, and each stage "
            "needs one"
        )
    # best[i]: (cost of the costliest stage, the stages' first blocks) of the blocks before i; grown stage by stage.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(num_stages):
        grown: dict[int, tuple[float, list[int]]] = {}
        for stop in range(1, len(costs) + 1):
            options = []
            for start, (so_far, firsts) in best.items():
                if start < stop and any(cost.learns for cost in costs[start:stop]):
                    seconds = sum(cost.seconds for cost in costs[start:stop])
                    options.append((max(so_far, seconds), [*firsts, start]))
            if options:
                grown[stop] = min(options)
        best = grown
    return best[len(costs)][1]


def check_cuts(cuts: Sequence[str], costs: Sequence[BlockCost], num_stages: int) -> list[int]:
    """Find the first block of every stage from the names that the user gave for all stages but the first.

    Raises:
        SettingsError: there are too few or too many, a name is no block's, or a stage would have nothing to learn.
    """
    names = [cost.name for cost in costs]
    if len(cuts) != num_stages - 1 or any(name not in names for name in cuts):
        raise SettingsError(
            f"pipeline.cuts is {list(cuts)}: the first blocks of the {num_stages - 1} stages after the first are "
            f"needed, from {', '.join(names)}"
        )
    firsts = [0, *(names.index(name) for name in cuts)]
    for start, stop in zip(firsts, [*firsts[1:], len(costs)], strict=True):
        if start >= stop or not any(cost.learns for cost in costs[start:stop]):
            raise SettingsError(f"pipeline.cuts is {list(cuts)}: a stage would have no parameters; the order must fit")
    return firsts


def wait_for_device(tensor: Tensor) -> None:
    """Wait until `tensor` is computed, so that a clock can be read."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


# -- the order of micro-batches ------------------------------------------------------------------------------------

Schedule = Literal["1f1b", "gpipe"]


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through a stage."""

    kind: Literal["forward", "backward"]
    micro_batch: int


def schedule_of(schedule: Schedule, stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """List what `stage` does in one update: each micro-batch forward once and backward once, each in order."""
    forward = [Action("forward", index) for index in range(num_micro_batches)]
    backward = [Action("backward", index) for index in range(num_micro_batches)]
    num_ahead = num_micro_batches if schedule == "gpipe" else min(num_micro_batches, num_stages - stage - 1)
    steady = [action for pair in zip(forward[num_ahead:], backward, strict=False) for action in pair]
    return [*forward[:num_ahead], *steady, *backward[num_micro_batches - num_ahead :]]


def bubble(num_stages: int, num_micro_batches: int) -> float:
    """The fraction of an update's time in which a stage is idle, if all stages take equally long."""
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)
