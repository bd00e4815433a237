"""ZeRO (Rajbhandari et al. 2020, section 5): what every rank would hold alike is cut, and each rank holds one part.

    stage 1   the optimizer's state                                  P_os
    stage 2   and the gradients, block by block as they are reduced  P_os+g
    stage 3   and the parameters, gathered block by block, one block ahead of use, and freed after it   P_os+g+p

A model is an ordered list of blocks; what a block's parameters are is found as the list is dealt, so that at stage 3 no
rank ever holds more than one block whole. With P parameters of b bytes on N ranks and an optimizer that keeps k values
for each of them, a rank holds b P (2 + k/N), b P (1 + (1 + k)/N) or b P (2 + k)/N bytes, and besides, in passing, two
blocks. An update sends b P (N - 1)/N bytes a rank twice at stage 1; at stages 2 and 3, where each of m micro-batches is
reduced by itself, 1 + m times and 3 m times.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import Batch
from lockstep.parallel.merge import state_tensors
from lockstep.parallel.parted import PartedModel
from lockstep.parallel.strategy import Blocks, BuildOptimizer, Objective, Strategy
from lockstep.parallel.tensor_slices import Part, Piece, SavedState, State, load_piece
from lockstep.runtime.seeding import seed_update
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
        self._num_micro_batches = settings.num_micro_batches
        self._parted = parted = PartedModel(blocks, cluster, stage)
        optimizer = build_optimizer(parted.model)
        pieces = self._hand_parts_to(optimizer)
        super().__init__(
            cluster, settings, parted.model, optimizer, pieces, parted.like, parted.first_names, replicas=cluster
        )
        self._loss = torch.zeros((), dtype=torch.float64, device=cluster.device)

    def _hand_parts_to(self, optimizer: torch.optim.Optimizer) -> dict[Tensor, Piece]:
        """In place of whole parameters, `optimizer` shall update this rank's pieces of them, in the same groups."""
        pieces: dict[Tensor, Piece] = {}
        for group in optimizer.param_groups:
            held = []
            for parameter in group["params"]:
                if (found := self._parted.shares.get(self._parted.names[parameter])) is not None:
                    flat, share = found
                    piece = nn.Parameter(share.of(flat.part), requires_grad=not flat.is_frozen)
                    if flat.gradient_part is not None:
                        piece.grad = share.of(flat.gradient_part)
                    pieces[piece] = share.piece
                    held.append(piece)
            group["params"] = held
        if optimizer.state:
            raise ValueError(f"{type(optimizer).__name__} makes its state before the first step: it cannot be cut")
        return pieces

    # -- updates ---------------------------------------------------------------------------------------------------

    def _backward(self, batch: Batch, objective: Objective, seed: int) -> Tensor:
        seed_update(seed, batch.inputs.device)
        self._parted.begin_gradients()
        self._loss.zero_()
        tallies: list[Tensor] = []
        for piece in self._equal_pieces(batch):
            loss, tally = objective.loss_sum(objective.outputs(self.model, piece.inputs), piece)
            loss = loss / batch.global_size
            self._loss += loss.detach()
            loss.backward()
            self._parted.end_pass()
            tallies.append(tally)
        return reduce(torch.add, tallies)

    def _equal_pieces(self, batch: Batch) -> list[Batch]:
        """As many micro-batches on every rank, since each is a collective; some may be empty."""
        largest = -(-batch.global_size // self._cluster.size)
        return batch.split(max(1, min(self._num_micro_batches, largest)), allow_empty=True)

    def reduce_gradients(self) -> None:
        self._parted.reduce_gradients()

    def _squared_norm(self) -> float:
        squares = [torch.linalg.vector_norm(part).double() ** 2 for part in self._reduced_gradients()]
        sums = torch.stack([self._loss, torch.stack(squares).sum()])
        loss, squared_norm = self._cluster.sum_(sums, name="norm").tolist()
        return squared_norm if math.isfinite(loss) else math.nan

    def _reduced_gradients(self) -> Sequence[Tensor]:
        return [flat.gradient_part for flat in self._parted.flats if flat.gradient_part is not None]

    def _not_finite(self, batch: Batch, objective: Objective, seed: int) -> list[str]:
        with self._parted.inspecting() as found:
            self._backward(batch, objective, seed)
        return [*([] if self._loss.isfinite() else ["the loss"]), *found]

    def _step(self) -> None:
        super()._step()
        self._publish()

    def _publish(self) -> None:
        self._parted.publish()

    def forward(self, objective: Objective, inputs: Tensor) -> Tensor | None:
        with torch.no_grad():
            return objective.outputs(self.model, inputs)

    # -- state -----------------------------------------------------------------------------------------------------

    def _model_state(self) -> State:
        state = {name: Part.of(share.of(flat.part), share.piece) for name, (flat, share) in self._parted.shares.items()}
        for name, first in self._parted.first_names.items():
            if first in state:
                state[name] = state[first]
        if self._cluster.is_root:
            state |= {name: Part.whole(buffer) for name, buffer in self._saved_buffers().items()}
        return {f"model/{name}": state[name] for name in self.like if name in state}

    def _saved_buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.model.named_buffers() if name in self.like}

    def _load_model(self, saved: SavedState) -> None:
        for flat, share in self._parted.shares.values():
            load_piece(share.of(flat.part), share.piece, saved)
        for name, buffer in self._saved_buffers().items():
            load_piece(buffer, Piece.whole(name, buffer), saved)
        self._parted.publish(with_frozen=True)

    def _replicated(self) -> dict[str, Tensor]:
        buffers = {f"model/{name}": buffer for name, buffer in self._saved_buffers().items()}
        if self._stage == 3:
            return buffers
        return {f"model/{name}": tensor for name, tensor in state_tensors(self.model).items()}

    def _part_to_merge(self, name: str) -> Tensor:
        name = self._parted.first_names.get(name, name)
        if name in self._parted.shares:
            flat, share = self._parted.shares[name]
            return share.of(flat.part)
        buffers = self._saved_buffers() if self._cluster.is_root else {}
        return buffers[name].detach().flatten() if name in buffers else torch.empty(0, dtype=self.like[name].dtype)

    @property
    def is_saved_here(self) -> bool:
        return True
