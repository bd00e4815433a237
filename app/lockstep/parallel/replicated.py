"""Every rank holds the whole model; gradients are summed over all ranks after each backward pass."""

import math
from functools import reduce

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import Batch
from lockstep.parallel.merge import first_names, layout_of, shard_model, state_tensors
from lockstep.parallel.strategy import Objective
from lockstep.parallel.tensor_slices import SavedState, TensorState, whole_tensors
from lockstep.parallel.whole import WholeParameters
from lockstep.runtime.seeding import seed_update
from lockstep.settings import GradientSettings


class Replicated(WholeParameters):
    """Synchronous data parallelism: the same model, the same step, on every rank."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        cluster: Cluster,
        settings: GradientSettings | None = None,
    ) -> None:
        """
        Args:
            optimizer: over parameters of `model`.

        Raises:
            SettingsError: on every rank: the number of ranks does not fit `settings`.
        """
        settings = settings or GradientSettings()
        super().__init__(cluster, settings, model, optimizer, layout_of(model), first_names(model), cluster)

    def _backward(self, batch: Batch, objective: Objective, seed: int, send: bool = True) -> Tensor:
        seed_update(seed, batch.inputs.device)
        gradients = self.gradients
        gradients.begin()
        num_samples = max(1, len(batch)) if gradients.reduction == "adasum" else batch.global_size
        tallies: list[Tensor] = []
        pieces = batch.split(self._num_micro_batches)
        for piece in pieces:
            loss, tally = objective.loss_sum(objective.outputs(self.model, piece.inputs), piece)
            loss = loss / num_samples
            gradients.add_loss(loss)
            if send and piece is pieces[-1]:
                gradients.send_from_now_on()
            loss.backward()
            tallies.append(tally)
        return reduce(torch.add, tallies)

    def _squared_norm(self) -> float:
        if not self.gradients.are_finite():  # waits for the device
            return math.nan
        return self.gradients.squared_norm() if self._clip_norm is not None else 0.0

    def forward(self, objective: Objective, inputs: Tensor) -> Tensor | None:
        with torch.no_grad():
            return objective.outputs(self.model, inputs)

    # -- state -----------------------------------------------------------------------------------------------------

    def synchronise(self) -> None:
        self._cluster.broadcast_parameters(state_tensors(self.model))
        super().synchronise()

    def load_state(self, saved: SavedState) -> None:
        """Rank 0 alone reads, and the others get it as it is.

        Horovod's `broadcast_optimizer_state` would instead make ranks without state take a step with gradients of zero,
        which weight decay and momentum turn into another model.
        """
        read = self._cluster.on_root_alone(lambda: whole_tensors(saved))
        layout = self._cluster.on_root(lambda: {name: (part.shape, part.dtype) for name, part in (read or {}).items()})
        received = read or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        self._cluster.broadcast_parameters(received)
        super().load_state(TensorState(received))

    def _part_to_merge(self, name: str) -> Tensor:
        """Rank r gives part r of every tensor, so that the merged model comes from all ranks alike."""
        tensor = state_tensors(self.model)[name]
        return shard_model({name: tensor}, self._cluster.size)[name][self._cluster.rank]

    @property
    def is_saved_here(self) -> bool:
        return self._cluster.is_root
