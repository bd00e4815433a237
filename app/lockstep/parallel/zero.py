"""ZeRO (Rajbhandari et al. 2020, section 5): what every replica would hold alike is sharded over the ranks.

    stage 1   the optimizer's state                                  P_os
    stage 2   and the gradients, block by block as they are reduced  P_os+g
    stage 3   and the parameters, gathered block by block, one block ahead of use, and freed after it   P_os+g+p

A model is an ordered list of blocks, sharded as they are built, so that at stage 3 no rank ever holds more than one
block whole. With P parameters of b bytes on N ranks and an optimizer that keeps k values
for each of them, a rank holds b P (2 + k/N), b P (1 + (1 + k)/N) or b P (2 + k)/N bytes, plus two
blocks. An update sends b P (N - 1)/N bytes a rank twice at stage 1; at stages 2 and 3, where each of m micro-batches is
reduced by itself, 1 + m times and 3 m times.

The blocks, their flat shards, and when these are gathered, reduced and freed: sharded_model.py. Here is the update.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import Batch, Tree
from lockstep.parallel.merge import state_tensors
from lockstep.parallel.sharded_model import ShardedModel
from lockstep.parallel.step import accumulate_gradients
from lockstep.parallel.strategy import Blocks, BuildOptimizer, Objective, Strategy
from lockstep.parallel.tensor_slices import SavedState, Shard, State, TensorSlice, load_slice
from lockstep.settings import GradientSettings


class Zero(Strategy):
    """Data parallelism without the redundancy: stage 1, 2 or 3."""

    def __init__(
        self, blocks: Blocks, build_optimizer: BuildOptimizer, cluster: Cluster, settings: GradientSettings, stage: int
    ) -> None:
        """Collective: every rank takes its parts of rank 0's `blocks`.

        Args:
            blocks: in the order in which they are computed.
            build_optimizer: makes an optimizer that works element by element, over parameters of the given model.
        """
        self._stage = stage
        self._sharded = sharded = ShardedModel(blocks, cluster, stage)
        optimizer = build_optimizer(sharded.model)
        slices = self._give_shards_to(optimizer)
        super().__init__(
            cluster, settings, sharded.model, optimizer, sharded.meta_state, sharded.first_names, cluster, slices
        )
        self._loss = torch.zeros((), dtype=torch.float64, device=cluster.device)

    def _give_shards_to(self, optimizer: torch.optim.Optimizer) -> dict[Tensor, TensorSlice]:
        """Have `optimizer` update this rank's slices in place of the parameters, in the same groups."""
        slices: dict[Tensor, TensorSlice] = {}
        for group in optimizer.param_groups:
            held = []
            for parameter in group["params"]:
                if (found := self._sharded.slices.get(self._sharded.names[parameter])) is not None:
                    flat, flat_slice = found
                    values = nn.Parameter(flat_slice.of(flat.shard), requires_grad=not flat.is_frozen)
                    if flat.gradient_shard is not None:
                        values.grad = flat_slice.of(flat.gradient_shard)
                    slices[values] = flat_slice.tensor_slice
                    held.append(values)
            group["params"] = held
        if optimizer.state:
            raise ValueError(f"{type(optimizer).__name__} makes its state before the first step: it cannot be cut")
        return slices

    # -- updates ---------------------------------------------------------------------------------------------------

    def zero_gradients(self) -> None:
        self._sharded.zero_gradients()
        self._loss.zero_()

    def forward_backward(self, batch: Batch, objective: Objective, seed: int) -> Tensor:
        return accumulate_gradients(self, batch, objective, seed)

    def micro_batches(self, batch: Batch) -> Sequence[Batch]:
        """As many on every rank, since each is a collective; some may be empty."""
        largest = -(-batch.global_size // self._cluster.size)
        return batch.split(max(1, min(self._num_micro_batches, largest)), allow_empty=True)

    def loss_divisor(self, batch: Batch) -> int:
        return batch.global_size

    def backward(self, loss: Tensor, is_last: bool) -> None:  # noqa: ARG002  # each is reduced by itself
        """Collective: add the gradients of a micro-batch's `loss`."""
        self._loss += loss.detach()
        loss.backward()
        self._sharded.end_pass()

    def reduce_gradients(self) -> None:
        self._sharded.reduce_gradients()

    def squared_gradient_norm(self) -> float:
        squares = [torch.linalg.vector_norm(shard).double() ** 2 for shard in self.reduced_gradients()]
        sums = torch.stack([self._loss, torch.stack(squares).sum()])
        loss, squared_norm = self._cluster.sum_(sums, name="norm").tolist()
        return squared_norm if math.isfinite(loss) else math.nan

    def reduced_gradients(self) -> Sequence[Tensor]:
        return [flat.gradient_shard for flat in self._sharded.flats if flat.gradient_shard is not None]

    @contextmanager
    def local_gradients(self) -> Iterator[list[str]]:
        with self._sharded.local_gradients() as names:
            yield names
        if not self._loss.isfinite():
            names.insert(0, "the loss")

    def optimizer_step(self) -> None:
        super().optimizer_step()
        self._gather_parameters()

    def _gather_parameters(self) -> None:
        self._sharded.gather_parameters()

    def forward(self, objective: Objective, inputs: Tree) -> Any:
        with torch.no_grad():
            return objective.outputs(self.model, inputs)

    # -- state -----------------------------------------------------------------------------------------------------

    def _model_state(self) -> State:
        state = {
            name: Shard.of(flat_slice.of(flat.shard), flat_slice.tensor_slice)
            for name, (flat, flat_slice) in self._sharded.slices.items()
        }
        for name, first in self._sharded.first_names.items():
            if first in state:
                state[name] = state[first]
        if self._cluster.is_root:
            state |= {name: Shard.whole(buffer) for name, buffer in self._saved_buffers().items()}
        return {f"model/{name}": state[name] for name in self.meta_state if name in state}

    def _saved_buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.model.named_buffers() if name in self.meta_state}

    def _load_model(self, saved: SavedState) -> None:
        for flat, flat_slice in self._sharded.slices.values():
            load_slice(flat_slice.of(flat.shard), flat_slice.tensor_slice, saved)
        for name, buffer in self._saved_buffers().items():
            load_slice(buffer, TensorSlice.whole(name, buffer), saved)
        self._sharded.gather_parameters(with_frozen=True)

    def _replicated(self) -> dict[str, Tensor]:
        buffers = {f"model/{name}": buffer for name, buffer in self._saved_buffers().items()}
        if self._stage == 3:
            return buffers
        return {f"model/{name}": tensor for name, tensor in state_tensors(self.model).items()}

    def _part_to_merge(self, name: str) -> Tensor:
        name = self._sharded.first_names.get(name, name)
        if name in self._sharded.slices:
            flat, flat_slice = self._sharded.slices[name]
            return flat_slice.of(flat.shard)
        buffers = self._saved_buffers() if self._cluster.is_root else {}
        return (
            buffers[name].detach().flatten() if name in buffers else torch.empty(0, dtype=self.meta_state[name].dtype)
        )

    @property
    def is_saved_here(self) -> bool:
        return True
