"""What every strategy does: one exact optimizer step over all ranks, and a state that knows nothing of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import Batch
from lockstep.parallel.buffers import Buffers
from lockstep.parallel.merge import merge_on_root
from lockstep.parallel.replica_check import compare_replicas
from lockstep.parallel.tensor_slices import Piece, SavedState, State, load_optimizer, optimizer_state
from lockstep.parallel.weight_average import exchange_with_average, has_average
from lockstep.runtime.errors import NonFiniteError
from lockstep.settings import GradientSettings

Blocks = Iterable[tuple[str, nn.Module]]
"""A model as an ordered list of named blocks, each of which takes one tensor and gives one; made as they are asked for,
so that a rank which keeps none of them needs memory for one."""

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Objective(Protocol):
    """What is minimised, in two halves that may lie on different ranks."""

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What `model`, or a part of it, makes of `inputs` (n, ...)."""
        ...

    def loss_sum(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss *summed* over `batch`, of the task's own kind, with its graph, and tallies (k,) float64 that add
        up."""
        ...


class Strategy(ABC):
    """Where the model lives on the ranks. The model's code knows nothing of it.

    Attributes:
        model: this rank's: the whole, the whole but for parameters that come and go, or a stage.
        optimizer: over what this rank updates.
        like: names, shapes and data types of the whole model.
        num_parameters: of the whole model, each once; buffers are none.
        tied_weights: further names of parameters that have several -> the first, which the optimizer's state goes by.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: GradientSettings,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        pieces: Mapping[Tensor, Piece],
        like: Mapping[str, Tensor],
        first_names: Mapping[str, str],
        replicas: Cluster,
    ) -> None:
        """
        Args:
            pieces: which of the whole model's elements each of the optimizer's parameters holds.
            first_names: of the whole model: see merge.py.
            replicas: the ranks that hold different samples, but the same buffers.
        """
        self._cluster = cluster
        self._clip_norm = settings.clip_norm
        self.model = model
        self.optimizer = optimizer
        self._pieces = pieces
        self.like = like
        self.num_parameters = sum(like[name].numel() for name in set(first_names.values()) & like.keys())
        self.tied_weights = {name: first for name, first in first_names.items() if name != first}
        self._buffers = Buffers(model, replicas)

    # -- what a strategy is ----------------------------------------------------------------------------------------

    @abstractmethod
    def _backward(self, batch: Batch, objective: Objective, seed: int) -> Tensor:
        """Collective: gradients of this rank's samples, and the sum of their tallies."""

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Collective: what is left to do until gradients are those of all ranks."""

    @abstractmethod
    def _squared_norm(self) -> float:
        """Collective: the square of the gradient's norm over the whole model if it is to be clipped, else any finite
        number; an infinite one, or NaN, on every rank, if a loss or gradient is not finite on any.
        """

    @abstractmethod
    def _reduced_gradients(self) -> Sequence[Tensor]:
        """This rank's, after `reduce_gradients`."""

    @abstractmethod
    def _not_finite(self, batch: Batch, objective: Objective, seed: int) -> list[str]:
        """Collective: compute this rank's part once more, by itself; what of it is infinite or not a number."""

    def _step(self) -> None:
        """Collective: the optimizer's step; afterwards parameters are where they are needed."""
        self.optimizer.step()

    @abstractmethod
    def _model_state(self) -> State:
        """What this rank holds of the parameters and buffers."""

    @abstractmethod
    def _load_model(self, saved: SavedState) -> None:
        """Collective."""

    @abstractmethod
    def _part_to_merge(self, name: str) -> Tensor:
        """This rank's part of a tensor of the model: flat, and empty where another rank gives it."""

    @property
    @abstractmethod
    def is_saved_here(self) -> bool:
        """What this rank holds is not held by another rank, or this one shall save it."""

    @abstractmethod
    def forward(self, objective: Objective, inputs: Tensor) -> Tensor | None:
        """Collective: the model's outputs for this rank's `inputs`, without gradients; None where others have them.

        Every rank must call it equally often, with as many samples as it has.
        """

    # -- updates ---------------------------------------------------------------------------------------------------

    def update(
        self, batch: Batch, objective: Objective, seed: int, before_step: Callable[[], None] | None = None
    ) -> Tensor:
        """Collective: one optimizer step along the exact mean gradient over the global batch.

        Each rank divides its summed loss by the *global* number of samples, and the gradients are summed: ranks may
        hold different numbers of samples, or none. Adasum combines the means over each rank's own samples instead.

        Args:
            batch: this rank's samples of a global batch.
            objective: what to minimise.
            seed: of everything random in this update, on this rank.
            before_step: called after the backward pass, before parameters and optimizer state change.

        Returns:
            The sum of this rank's tallies (k,); the other ranks' are not in it.

        Raises:
            NonFiniteError: on every rank, with nothing of the model changed, if a loss or gradient is infinite or not a
                number on any rank; names the first such rank and tensor.
        """
        tally = self._backward(batch, objective, seed)
        self.reduce_gradients()
        squared_norm = self._squared_norm()
        if not math.isfinite(squared_norm):  # so all ranks stop or skip in this update
            raise self._non_finite(batch, objective, seed)
        self._buffers.agree(len(batch) / batch.global_size)
        if self._clip_norm is not None:
            self._clip(math.sqrt(squared_norm), self._clip_norm)
        self._cluster.recorder.enter("optimizer step")
        if before_step:
            before_step()
        self._step()
        return tally

    def _clip(self, norm: float, limit: float) -> None:
        """Pascanu et al. 2013, algorithm 1."""
        if norm > limit:
            for gradient in self._reduced_gradients():
                gradient.mul_(limit / norm)

    def _non_finite(self, batch: Batch, objective: Objective, seed: int) -> NonFiniteError:
        """Collective: find the rank and the tensor. Buffers are again what they were before the update."""
        self.forget_changes()
        mine = self._not_finite(batch, objective, seed)
        self.forget_changes()
        first = self._cluster.all_gather_object(mine[:1])
        culprits = [f"{names[0]} on rank {rank}" for rank, names in enumerate(first) if names]
        where = culprits[0] if culprits else "the sum of the ranks' finite gradients"
        return NonFiniteError(f"{where} is infinite or not a number").on_all_ranks()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Collective: inside, the model is the moving average of its weights, if the optimizer keeps one."""
        if not has_average(self.optimizer):
            yield
            return
        exchange_with_average(self.optimizer)
        self._publish()
        try:
            yield
        finally:
            exchange_with_average(self.optimizer)
            self._publish()

    def _publish(self) -> None:  # noqa: B027  # most have nothing to do
        """Collective: parameters are where they are needed, after some have changed."""

    # -- state -----------------------------------------------------------------------------------------------------

    def forget_changes(self) -> None:
        """After an update that was broken off, before the optimizer's step: the model is again what it was before."""
        self._buffers.forget_changes()

    def synchronise(self) -> None:
        """Collective: every rank takes rank 0's model, and all make sure that they agree.

        Raises:
            ReplicasDifferError: on every rank, naming the first tensor and the ranks that differ.
        """
        self._buffers.remember()
        self.compare("after the broadcast of parameters")

    def compare(self, when: str) -> None:
        """Collective: make sure that ranks which hold the same part of the model, of the optimizer's state or the same
        learning rate hold it bit for bit.

        Raises:
            ReplicasDifferError: on every rank, naming the first tensor and the ranks that differ.
        """
        groups = {
            f"optimizer group {index}": {key: value for key, value in group.items() if key != "params"}
            for index, group in enumerate(self.optimizer.param_groups)
        }
        compare_replicas(self._cluster, {**self._replicated(), **groups}, when)

    def _replicated(self) -> dict[str, Tensor]:
        """By name, what every rank that has that name must hold alike."""
        return {name: part.values for name, part in self.state().items()}

    def state(self) -> State:
        """What this rank holds of what must be saved to go on. No copies; it knows nothing of the number of ranks."""
        return {**self._model_state(), **optimizer_state(self.optimizer, self._pieces)}

    def saved_state(self) -> State:
        """Of `state`, what this rank shall save: all ranks together save every element once."""
        return self.state() if self.is_saved_here else {}

    @property
    def changed_by_forward(self) -> list[str]:
        """The names in `state` of what a forward pass may change: buffers, such as running means."""
        return [f"model/{name}" for name, _ in self.model.named_buffers() if name in self.like]

    def load_state(self, saved: SavedState) -> None:
        """Collective: go on from the `saved` state of an earlier run, under whatever strategy and on however many ranks
        it was. All ranks must see its files.

        Raises:
            ReplicasDifferError: on every rank, if they do not agree afterwards.
        """
        self._load_model(saved)
        load_optimizer(self.optimizer, self._pieces, saved)
        self._buffers.remember()
        self.compare("after loading a checkpoint")

    def merge(self, write: Callable[[str, Tensor], None] | None) -> None:
        """Collective: give the merged model, tensor by tensor, to rank 0's `write` (reference, step 5 of section 3).

        Raises:
            ReplicasDifferError: on every rank, if they do not agree; on rank 0, if parts were lost on the way.
        """
        self.compare("at the merge")
        merge_on_root(self._cluster, self.like, self._part_to_merge, write)
