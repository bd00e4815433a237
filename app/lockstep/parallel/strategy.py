"""What every strategy offers: the parts of an update over all ranks (step.py), and a state that knows no ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import Batch, Tree
from lockstep.parallel.buffers import Buffers
from lockstep.parallel.merge import merge_on_root
from lockstep.parallel.replica_check import compare_replicas
from lockstep.parallel.tensor_slices import SavedState, State, TensorSlice, load_optimizer, optimizer_state
from lockstep.parallel.weight_average import exchange_with_average, has_average
from lockstep.runtime.errors import NonFiniteError
from lockstep.runtime.flight_recorder import FlightRecorder
from lockstep.settings import GradientSettings

Blocks = Iterable[tuple[str, nn.Module]]
"""A model as an ordered list of named blocks, each of which takes one tensor and returns one. They are built one at a
time, so that a rank which keeps none of them needs memory for one."""

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Objective(Protocol):
    """What is minimised, in two halves that may be computed on different ranks."""

    @property
    def num_metric_sums(self) -> int:
        """k, the number of metric sums."""
        ...

    def outputs(self, model: nn.Module, inputs: Tree) -> Any:
        """Compute the outputs of `model`, or of one of its blocks, for `inputs` (n, ...)."""
        ...

    def loss_sum(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the loss *summed* over `batch`, with its graph, and the batch's metric sums (k,) float64."""
        ...

    def weight(self, metric_sums: Tensor) -> Tensor | None:
        """The weight () of this rank's loss in an update, by which the sum over all ranks is divided; None: the number
        of samples.
        """
        ...


class Strategy(ABC):
    """How the model is placed on the ranks. The model's code does not depend on it.

    Attributes:
        model: this rank's: the whole model, possibly with resharded parameters, or a pipeline's stage.
        optimizer: over the parameters, or slices of them, that this rank updates.
        clip_norm: what the gradient's norm over the whole model is clipped to; None: it is not.
        meta_state: names, shapes and data types of the whole model.
        num_parameters: elements of the whole model's parameters; tied weights count once, buffers not at all.
        tied_weights: of parameters with several names, each further name -> the first, under which state is saved.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: GradientSettings,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        meta_state: Mapping[str, Tensor],
        first_names: Mapping[str, str],
        replicas: Cluster,
        slices: Mapping[Tensor, TensorSlice] | None = None,
    ) -> None:
        """
        Args:
            first_names: of the whole model: see merge.py.
            replicas: the ranks that have the same buffers, and different samples.
            slices: which of the whole model's elements each of the optimizer's parameters holds; by default, all of its
                own.
        """
        self._cluster = cluster
        self.clip_norm = settings.clip_norm
        self._num_micro_batches = settings.num_micro_batches
        self.model = model
        self.optimizer = optimizer
        if slices is None:
            slices = {parameter: TensorSlice.whole(name, parameter) for name, parameter in model.named_parameters()}
        self._slices = slices
        self.meta_state = meta_state
        self.num_parameters = sum(meta_state[name].numel() for name in set(first_names.values()) & meta_state.keys())
        self.tied_weights = {name: first for name, first in first_names.items() if name != first}
        self._buffers = Buffers(model, replicas)

    # -- one update: what step.py is made of ------------------------------------------------------------------------

    @property
    def recorder(self) -> FlightRecorder:
        """The record of what this rank is doing."""
        return self._cluster.recorder

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._cluster.device

    def begin_sum(self, value: Tensor) -> Callable[[], Tensor]:
        """Collective: start to sum a small `value` over all ranks; the returned function waits and gives the sum."""
        total = value.double().clone()
        wait = self._cluster.begin_sum_(total, "weight")

        def finish() -> Tensor:
            wait()
            return total

        return finish

    @abstractmethod
    def zero_gradients(self) -> None:
        """Zero the gradients."""

    @abstractmethod
    def forward_backward(self, batch: Batch, objective: Objective, seed: int) -> Tensor:
        """Collective: add the gradients of this rank's samples; returns the sum of their metric sums (k,)."""

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Collective: finish what is left to do until gradients are those of all ranks."""

    @abstractmethod
    def squared_gradient_norm(self) -> float:
        """Collective: the square of the gradient's norm over the whole model if it is to be clipped, else any finite
        number; an infinite one, or NaN, on every rank, if a loss or gradient is not finite on any.
        """

    @abstractmethod
    def reduced_gradients(self) -> Sequence[Tensor]:
        """The gradients that this rank's optimizer reads, after `reduce_gradients`."""

    def average_buffers(self, share: float) -> None:
        """Collective: average what forward passes have changed in the buffers, such as running means, over the ranks.

        Args:
            share: this rank's share of the global batch, 0 ... 1.
        """
        self._buffers.average(share)

    def optimizer_step(self) -> None:
        """Collective: the optimizer's step; afterwards parameters are where they are needed."""
        self.optimizer.step()

    @abstractmethod
    def local_gradients(self) -> AbstractContextManager[list[str]]:
        """Inside, `forward_backward` leaves gradients unreduced. Gives the names of this rank's tensors that were
        infinite or not a number, complete on leaving.
        """

    def find_non_finite(self, batch: Batch, objective: Objective, seed: int) -> NonFiniteError:
        """Collective: compute this update's gradients once more, each rank by itself, to name the first rank and tensor
        that are infinite or not a number. Buffers are again what they were before the update.
        """
        self.forget_changes()
        self.zero_gradients()
        with self.local_gradients() as names:
            self.forward_backward(batch, objective, seed)
        self.forget_changes()
        first = self._cluster.all_gather_object(names[:1])
        culprits = [f"{found[0]} on rank {rank}" for rank, found in enumerate(first) if found]
        where = culprits[0] if culprits else "the sum of the ranks' finite gradients"
        return NonFiniteError(f"{where} is infinite or not a number").as_shared()

    # -- what a strategy is ----------------------------------------------------------------------------------------

    @abstractmethod
    def _model_state(self) -> State:
        """Collect what this rank holds of the parameters and buffers."""

    @abstractmethod
    def _load_model(self, saved: SavedState) -> None:
        """Collective: overwrite the model with the `saved` one."""

    @abstractmethod
    def _part_to_merge(self, name: str) -> Tensor:
        """Give this rank's flat part of a tensor for the merge; empty where another rank gives it."""

    @property
    @abstractmethod
    def is_saved_here(self) -> bool:
        """Whether this rank saves what it holds: one of the ranks that hold the same does."""

    @abstractmethod
    def forward(self, objective: Objective, inputs: Tree) -> Any:
        """Collective: compute outputs for this rank's `inputs`, without gradients; None where another rank has them.

        Every rank must call it equally often, with as many samples as it has.
        """

    # -- averaged weights ------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Collective: inside, the model has the moving average of its weights, if the optimizer keeps one."""
        if not has_average(self.optimizer):
            yield
            return
        exchange_with_average(self.optimizer)
        self._gather_parameters()
        try:
            yield
        finally:
            exchange_with_average(self.optimizer)
            self._gather_parameters()

    def _gather_parameters(self) -> None:  # noqa: B027  # most have nothing to do
        """Collective: send parameters that have changed to the ranks that compute with them."""

    # -- state -----------------------------------------------------------------------------------------------------

    def forget_changes(self) -> None:
        """Undo what an update has changed in buffers, if it was interrupted before the optimizer's step."""
        self._buffers.forget_changes()

    def synchronise(self) -> None:
        """Collective: broadcast rank 0's model, and check that all ranks have it.

        Raises:
            ReplicasDifferError: on every rank, naming the first tensor and the ranks that differ.
        """
        self._buffers.remember()
        self.compare("after the broadcast of parameters")

    def compare(self, when: str) -> None:
        """Collective: check that ranks which should hold the same tensors of model and optimizer, and the same learning
        rate, do so bit for bit.

        Raises:
            ReplicasDifferError: on every rank, naming the first tensor and the ranks that differ.
        """
        groups = {
            f"optimizer group {index}": {key: value for key, value in group.items() if key != "params"}
            for index, group in enumerate(self.optimizer.param_groups)
        }
        compare_replicas(self._cluster, {**self._replicated(), **groups}, when)

    def _replicated(self) -> dict[str, Tensor]:
        """What must be equal on all ranks that have an entry of that name."""
        return {name: part.values for name, part in self.state().items()}

    def state(self) -> State:
        """Collect what this rank holds of the state of model and optimizer, without copies."""
        return {**self._model_state(), **optimizer_state(self.optimizer, self._slices)}

    def saved_state(self) -> State:
        """What of `state` this rank saves: all ranks together save every element once."""
        return self.state() if self.is_saved_here else {}

    @property
    def changed_by_forward(self) -> list[str]:
        """The names in `state` of what a forward pass may change: buffers, such as running means."""
        return [f"model/{name}" for name, _ in self.model.named_buffers() if name in self.meta_state]

    def load_state(self, saved: SavedState) -> None:
        """Collective: load the `saved` state of a run under any strategy and on any number of ranks. All ranks must see
        its files.

        Raises:
            ReplicasDifferError: on every rank, if they do not agree afterwards.
        """
        self._load_model(saved)
        load_optimizer(self.optimizer, self._slices, saved)
        self._buffers.remember()
        self.compare("after loading a checkpoint")

    def merge(self, write: Callable[[str, Tensor], None] | None) -> None:
        """Collective: merge the model, tensor by tensor, into rank 0's `write` (reference, step 5 of section 3).

        Raises:
            ReplicasDifferError: on every rank, if replicas differ; on rank 0, if a shard was lost on the way.
        """
        self.compare("at the merge")
        merge_on_root(self._cluster, self.meta_state, self._part_to_merge, write)
