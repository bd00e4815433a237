"""A pipeline: the model's blocks in stages on neighbouring ranks, through which micro-batches pass.

Ranks that hold the same stage of different replicas sum their gradients, as `replicated` does with the whole model.
Random numbers (dropout) are seeded by update, replica, micro-batch and block, so that neither the cut into stages nor
the schedule changes the result. Batch norm normalises by micro-batch.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lockstep.comm.cluster import Cluster
from lockstep.comm.messages import Message
from lockstep.data.batch import Batch, Tree
from lockstep.parallel.merge import meta_state_of, state_tensors
from lockstep.parallel.pipeline_plan import (
    Action,
    BlockCost,
    changeable,
    check_cuts,
    cut_blocks,
    measure_blocks,
    schedule_of,
    wait_for_device,
)
from lockstep.parallel.rank_grid import RankGrid
from lockstep.parallel.replicated import GradientBuffer, UnshardedStrategy
from lockstep.parallel.step import loss_of
from lockstep.parallel.strategy import Blocks, BuildOptimizer, Objective
from lockstep.runtime.errors import SettingsError
from lockstep.runtime.seeding import seed_update, update_seed
from lockstep.settings import Settings

ACTIVATIONS, GRADIENTS = 2, 3  # tags


class Pipeline(UnshardedStrategy):
    """One stage of one replica.

    Attributes:
        costs: of every block of the model, measured on rank 0.
        firsts: the index of each stage's first block.
    """

    def __init__(
        self,
        make_blocks: Callable[[], Blocks],
        build_optimizer: BuildOptimizer,
        cluster: Cluster,
        settings: Settings,
        grid: RankGrid,
        objective: Objective,
        example: Tensor,
    ) -> None:
        """Collective: give every rank its stage of rank 0's blocks.

        Args:
            make_blocks: builds the named blocks in the order in which they are computed; each takes and returns one
                tensor, whose first dimension counts samples. Every call must give the same weights.
            example: inputs (n, ...) of a micro-batch, to measure the blocks with.

        Raises:
            SettingsError: on every rank: the blocks do not fit the stages.
        """
        self._grid = grid
        self._schedule = settings.pipeline.schedule
        self.costs = cluster.on_root(lambda: measure_blocks(make_blocks(), objective.outputs, example))
        self.firsts = cluster.on_root(lambda: _cut(self.costs, settings, grid.num_stages))
        self._first, stop = [*self.firsts, len(self.costs)][grid.stage : grid.stage + 2]
        stage = nn.Sequential()
        meta_state: dict[str, Tensor] = {}
        first_names: dict[str, str] = {}
        places: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for index, (name, block) in enumerate(make_blocks()):
            cluster.broadcast_parameters(state_tensors(block))
            meta_state |= {f"{name}.{inner}": tensor for inner, tensor in meta_state_of(block).items()}
            first_names |= _first_names(block, name, sum(first <= index for first in self.firsts), places)
            if self._first <= index < stop:
                stage.add_module(name, block)
        self._messages = cluster.require_mpi("the stages of a pipeline send each other messages")
        replicas = cluster.split(grid.same_stage())
        super().__init__(cluster, settings.gradient, stage, build_optimizer(stage), meta_state, first_names, replicas)
        self.gradients = GradientBuffer(stage, replicas, settings.gradient)
        self._posted: deque[Message] = deque()
        self._sent: list[Message] = []

    @property
    def _is_last(self) -> bool:
        return self._grid.stage == self._grid.num_stages - 1

    # -- updates ---------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, objective: Objective, seed: int) -> Tensor:
        """Collective: the stage's schedule, with one message received ahead of its use."""
        micro_batches = self.micro_batches(batch)
        metric_sums = torch.zeros(objective.num_metric_sums, dtype=torch.float64, device=self.device)
        actions = schedule_of(self._schedule, self._grid.stage, self._grid.num_stages, len(micro_batches))
        to_come = iter([action for action in actions if self._waits_for(action)])
        self._post_next(to_come, micro_batches)
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # inputs, and outputs or loss, between forward and backward
        for action in actions:
            index, micro_batch = action.micro_batch, micro_batches[action.micro_batch]
            received = None
            if self._waits_for(action):
                received = self._posted.popleft().wait()
                self._post_next(to_come, micro_batches)
            if action.kind == "forward":
                inputs = micro_batch.inputs if received is None else received.requires_grad_()
                outputs = self._through_blocks(objective, inputs, update_seed(seed, index, 0))
                if self._is_last:
                    loss, metrics = loss_of(objective, outputs, micro_batch)
                    outputs = loss / batch.global_size
                    self.gradients.add_loss(outputs)
                    metric_sums = metric_sums + metrics
                else:
                    self._send(outputs.detach(), self._grid.stage + 1, ACTIVATIONS)
                kept[index] = inputs, outputs
            else:
                inputs, outputs = kept.pop(index)
                self._backward(outputs, received, is_last=index == len(micro_batches) - 1)
                if inputs.requires_grad:
                    gradient = inputs.grad if inputs.grad is not None else torch.zeros_like(inputs)
                    self._send(gradient, self._grid.stage - 1, GRADIENTS)
        self._finish_sending()
        return metric_sums

    def _through_blocks(self, objective: Objective, inputs: Tensor, seed: int | None) -> Tensor:
        if inputs.requires_grad:
            inputs = changeable(inputs)
        for index, block in enumerate(self.model.children(), start=self._first):
            if seed is not None:
                seed_update(update_seed(seed, index, 0), inputs.device)
            inputs = objective.outputs(block, inputs)
        return inputs

    def squared_gradient_norm(self) -> float:
        loss = self.gradients.flat[-1].double()
        squared_norm = torch.tensor(self.gradients.squared_norm(), dtype=torch.float64, device=loss.device)
        # Every replica contributes the same numbers.
        sums = torch.stack([loss, squared_norm]) / self._grid.num_replicas
        loss, squared_norm = self._cluster.sum_(sums, name="norm")
        return float(squared_norm) if loss.isfinite() else math.nan

    def forward(self, objective: Objective, inputs: Tree) -> Any:
        with torch.no_grad():
            if self._grid.stage > 0:
                inputs = self._receive(len(inputs), self._grid.stage - 1, ACTIVATIONS).wait()
            outputs = self._through_blocks(objective, inputs, seed=None)
        if self._is_last:
            return outputs
        self._send(outputs, self._grid.stage + 1, ACTIVATIONS)
        self._finish_sending()
        return None

    def time_alone(self, micro_batches: Sequence[Batch], objective: Objective, num_rounds: int) -> tuple[float, float]:
        """Measure this stage by itself, with no message sent: seconds of a micro-batch forward and backward, and of the
        optimizer's step (medians). For a benchmark: the gradients mean nothing.
        """
        passes, steps = [], []
        for micro_batch in [each for _ in range(num_rounds) for each in micro_batches]:
            inputs = micro_batch.inputs
            if self._grid.stage > 0:
                inputs = self._border(len(inputs), self._first - 1).normal_().requires_grad_()
            started = time.perf_counter()
            outputs = self._through_blocks(objective, inputs, seed=0)
            if self._is_last:
                outputs = objective.loss_sum(outputs, micro_batch)[0]
            outputs.backward(torch.ones_like(outputs))
            wait_for_device(outputs)
            passes.append(time.perf_counter() - started)
        for _ in range(num_rounds):
            self.zero_gradients()
            started = time.perf_counter()
            self.optimizer_step()
            wait_for_device(self.gradients.flat)
            steps.append(time.perf_counter() - started)
        return statistics.median(passes), statistics.median(steps)

    # -- messages --------------------------------------------------------------------------------------------------

    def _waits_for(self, action: Action) -> bool:
        return self._grid.stage > 0 if action.kind == "forward" else not self._is_last

    def _post_next(self, to_come: Iterator[Action], micro_batches: Sequence[Batch]) -> None:
        """Begin to receive the next message, ahead of its use."""
        action = next(to_come, None)
        if action is not None:
            num_samples = len(micro_batches[action.micro_batch].inputs)
            source, tag = (-1, ACTIVATIONS) if action.kind == "forward" else (1, GRADIENTS)
            self._posted.append(self._receive(num_samples, self._grid.stage + source, tag))

    def _receive(self, num_samples: int, stage: int, tag: int) -> Message:
        """Begin to receive from a neighbouring `stage` the outputs of the block between, or their gradients."""
        tensor = self._border(num_samples, self.firsts[max(stage, self._grid.stage)] - 1)
        return self._messages.begin_receive(tensor, self._grid.rank_of(stage), tag)

    def _border(self, num_samples: int, block: int) -> Tensor:
        """An empty tensor of the shape and type of a block's outputs."""
        cost = self.costs[block]
        return torch.empty((num_samples, *cost.output_shape), dtype=cost.output_dtype, device=self._cluster.device)

    def _send(self, tensor: Tensor, stage: int, tag: int) -> None:
        self._sent = [message for message in self._sent if not message.is_done]
        self._sent.append(self._messages.begin_send(tensor, self._grid.rank_of(stage), tag))

    def _finish_sending(self) -> None:
        for message in self._sent:
            message.wait()
        self._sent = []

    # -- state -----------------------------------------------------------------------------------------------------

    def _part_to_merge(self, name: str) -> Tensor:
        tensor = state_tensors(self.model).get(name) if self.is_saved_here else None
        return tensor.reshape(-1) if tensor is not None else torch.empty(0, dtype=self.meta_state[name].dtype)

    @property
    def is_saved_here(self) -> bool:
        return self._grid.replica == 0


def _cut(costs: Sequence[BlockCost], settings: Settings, num_stages: int) -> list[int]:
    cuts = settings.pipeline.cuts
    return cut_blocks(costs, num_stages) if cuts is None else check_cuts(cuts, costs, num_stages)


def _first_names(block: nn.Module, name: str, stage: int, places: WeakIdKeyDictionary) -> dict[str, str]:
    """Map each name of each parameter of `block` to the first of that parameter's names in the whole model.

    Args:
        places: stage and first name of each parameter so far.

    Raises:
        SettingsError: on every rank: `block` shares a parameter with a block of another stage.
    """
    names = {}
    for inner, parameter in block.named_parameters(remove_duplicate=False):
        first_stage, first = places.setdefault(parameter, (stage, f"{name}.{inner}"))
        if first_stage != stage:
            raise SettingsError(
                f"{first} and {name}.{inner} are one parameter (tied weights): in a pipeline they must lie in the same "
                "stage; name pipeline.cuts such that they do, or use another strategy"
            ).as_shared()
        names[f"{name}.{inner}"] = first
    return names
