"""Data parallelism with replicas: a rank that holds a parameter holds all of it, and gradients are summed over the
replicas after each backward pass.

`Replicated` has the whole model on every rank. A pipeline's stages (pipeline.py) are replicated in the same way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import Batch, Tree
from lockstep.parallel.merge import first_names, meta_state_of, shard_model, state_tensors
from lockstep.parallel.step import accumulate_gradients
from lockstep.parallel.strategy import Objective, Strategy
from lockstep.parallel.tensor_slices import (
    SavedState,
    State,
    TensorState,
    load_model,
    model_state,
    whole_tensors,
)
from lockstep.runtime.errors import SettingsError
from lockstep.settings import GradientSettings

BUCKET_MIB_ON_GPUS = 25.0
WIRE_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class UnshardedStrategy(Strategy):
    """What replicas of the whole model and of a pipeline's stage have in common.

    Attributes:
        gradients: of what this rank holds; after an update, over all `replicas`.
    """

    gradients: "GradientBuffer"  # a subclass makes it, after `Strategy.__init__`
    _sends_gradients = True

    def zero_gradients(self) -> None:
        self.gradients.zero()

    def micro_batches(self, batch: Batch) -> Sequence[Batch]:
        """`batch` in at most as many parts as are set; not empty ones, but for an empty batch."""
        return batch.split(self._num_micro_batches)

    def reduce_gradients(self) -> None:
        self.gradients.reduce()

    def reduced_gradients(self) -> Sequence[Tensor]:
        return [self.gradients.flat]

    @contextmanager
    def local_gradients(self) -> Iterator[list[str]]:
        names: list[str] = []
        self._sends_gradients = False
        yield names
        self._sends_gradients = True
        names += self.gradients.names_of_non_finite(self.model)

    def _backward(self, loss: Tensor, gradient: Tensor | None, is_last: bool) -> None:
        """Collective: the backward pass of a micro-batch; gradients are sent during an update's last one."""
        if is_last and self._sends_gradients:
            self.gradients.send_as_ready()
        loss.backward(gradient)

    def _model_state(self) -> State:
        return model_state(self.model)

    def _load_model(self, saved: SavedState) -> None:
        load_model(self.model, saved)


class Replicated(UnshardedStrategy):
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
        super().__init__(cluster, settings, model, optimizer, meta_state_of(model), first_names(model), cluster)
        self.gradients = GradientBuffer(model, cluster, settings)

    def forward_backward(self, batch: Batch, objective: Objective, seed: int) -> Tensor:
        return accumulate_gradients(self, batch, objective, seed)

    def loss_divisor(self, batch: Batch) -> int:
        """The global number of samples; of Adasum, which combines means, this rank's own."""
        return max(1, len(batch)) if self.gradients.reduction == "adasum" else batch.global_size

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Collective: add the gradients of a micro-batch's `loss`."""
        self.gradients.add_loss(loss)
        self._backward(loss, None, is_last)

    def squared_gradient_norm(self) -> float:
        if not self.gradients.are_finite():  # waits for the device
            return math.nan
        return self.gradients.squared_norm() if self.clip_norm is not None else 0.0

    def forward(self, objective: Objective, inputs: Tree) -> Any:
        with torch.no_grad():
            return objective.outputs(self.model, inputs)

    # -- state -----------------------------------------------------------------------------------------------------

    def synchronise(self) -> None:
        self._cluster.broadcast_parameters(state_tensors(self.model))
        super().synchronise()

    def load_state(self, saved: SavedState) -> None:
        """Collective: rank 0 reads `saved`, and broadcasts it unchanged.

        Horovod's `broadcast_optimizer_state` would instead make ranks without state take a step with gradients of zero,
        which weight decay and momentum turn into another model.
        """
        read = self._cluster.on_root_only(lambda: whole_tensors(saved))
        layout = self._cluster.on_root(lambda: {name: (part.shape, part.dtype) for name, part in (read or {}).items()})
        received = read or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        self._cluster.broadcast_parameters(received)
        super().load_state(TensorState(received))

    def _part_to_merge(self, name: str) -> Tensor:
        """Rank r gives shard r of every tensor, so that the merged model comes from all ranks."""
        tensor = state_tensors(self.model)[name]
        return shard_model({name: tensor}, self._cluster.size)[name][self._cluster.rank]

    @property
    def is_saved_here(self) -> bool:
        return self._cluster.is_root


class GradientBuffer:
    """All gradients in one flat buffer, of which each parameter's `.grad` is a view, so that none is copied.

    The buffer has the parameters in reverse, as a backward pass reaches them, and is cut into buckets. With more than
    one, each is sent as soon as the last backward pass of an update has filled it. Its last element is the loss: the
    all-reduce tells every rank of a loss that is not finite on one of them, without a message of its own.

    Attributes:
        flat: (number of trainable elements + 1,), of the parameters' data type.
    """

    def __init__(self, model: nn.Module, cluster: Cluster, settings: GradientSettings) -> None:
        """
        Raises:
            SettingsError: on every rank: the number of ranks is not one for Adasum, or the model too large for it.
        """
        if settings.reduction == "adasum" and cluster.size & (cluster.size - 1):
            message = f"gradient.reduction is adasum on {cluster.size} ranks: it needs 1, 2, 4, 8 ... of them"
            raise SettingsError(message).as_shared()
        if settings.reduction == "adasum" and cluster.device.type == "cuda":
            message = "gradient.reduction is adasum on GPUs, where Horovod takes the mean within a node: use sum"
            raise SettingsError(message).as_shared()
        self._cluster = cluster
        self.reduction = settings.reduction
        self._wire = WIRE_TYPES.get(settings.wire)
        parameters = [parameter for parameter in reversed(list(model.parameters())) if parameter.requires_grad]
        num_elements, most = sum(parameter.numel() for parameter in parameters), cluster.max_elements(torch.float32)
        if settings.reduction == "adasum" and cluster.size > 1 and num_elements > most:  # it is not exact in pieces
            message = f"gradient.reduction is adasum for {num_elements:,} parameters, more than its {most:,}: use sum"
            raise SettingsError(message).as_shared()
        self.flat = _flat_buffer(parameters)
        self._views = self.flat.split([parameter.numel() for parameter in parameters] + [1])
        on_gpu = self.flat.device.type == "cuda"
        size_mib = settings.bucket_mib or (BUCKET_MIB_ON_GPUS if on_gpu else math.inf)
        if self._wire is not None:  # it is sent in two steps; nothing could start the second one
            size_mib = math.inf
        self._buckets = self._cut(parameters, size_mib * 2**20) if settings.reduction == "sum" else []

    def zero(self) -> None:
        """Forget the last update."""
        self.flat.zero_()

    def add_loss(self, loss: Tensor) -> None:
        """Add a micro-batch's `loss`, a scalar, before its backward pass."""
        self.flat[-1] += loss.detach()

    def send_as_ready(self) -> None:
        """Collective: send each bucket as soon as the next backward pass has filled it; for an update's last one."""
        for bucket in self._buckets[:-1]:
            bucket.waits_for = len(bucket.parameters)

    def reduce(self) -> None:
        """Collective: send what is left, and wait until the buffer holds the reduced gradients."""
        if self.reduction == "adasum":
            self._cluster.adasum_(self._views, name="gradient")
            return
        for bucket in self._buckets:
            if bucket.arrives is None:
                bucket.send()
        for bucket in self._buckets:
            bucket.receive()

    def are_finite(self) -> bool:
        """Whether every gradient and the loss is finite; waits for the device."""
        # The sum is not finite if an element is not; but it may also overflow, which the second look tells apart.
        return math.isfinite(self.flat.sum()) or bool(self.flat.isfinite().all())

    def squared_norm(self) -> float:
        """The square of the 2-norm of all gradients together."""
        return float(torch.linalg.vector_norm(self.flat[:-1])) ** 2

    def names_of_non_finite(self, model: nn.Module) -> list[str]:
        """Name the loss and gradients of `model` that are infinite or not a number."""
        named = [(f"the gradient of {name}", parameter.grad) for name, parameter in model.named_parameters()]
        tensors = [("the loss", self.flat[-1]), *named]
        return [name for name, tensor in tensors if tensor is not None and not tensor.isfinite().all()]

    def _cut(self, parameters: list[nn.Parameter], num_bytes: float) -> list["_Bucket"]:
        """Cut the buffer into buckets of neighbouring parameters, up to `num_bytes` each; the last one has the loss."""
        groups: list[list[nn.Parameter]] = [[]]
        for parameter in parameters:
            if groups[-1] and sum(other.nbytes for other in groups[-1]) + parameter.nbytes > num_bytes:
                groups.append([])
            groups[-1].append(parameter)
        sizes = [sum(parameter.numel() for parameter in group) for group in groups]
        sizes[-1] += 1
        return [
            _Bucket(tensor, group, self._begin_sum(f"gradient.{index}"), hooked=len(groups) > 1)
            for index, (tensor, group) in enumerate(zip(self.flat.split(sizes), groups, strict=True))
        ]

    def _begin_sum(self, name: str) -> Callable[[Tensor], Callable[[], None]]:
        if self._wire is None:
            return lambda tensor: self._cluster.begin_sum_(tensor, name)
        wire = self._wire
        return lambda tensor: lambda: sum_over_wire_(self._cluster, tensor, wire, name)


class _Bucket:
    """A slice of the buffer that is sent at once.

    Attributes:
        parameters: those whose gradients it holds.
        waits_for: how many of them the backward pass has not reached yet, before it may be sent; 0: it does not wait.
        arrives: waits for its sum; None until it is sent.
    """

    def __init__(
        self,
        tensor: Tensor,
        parameters: list[nn.Parameter],
        begin_sum: Callable[[Tensor], Callable[[], None]],
        hooked: bool,
    ) -> None:
        self._tensor = tensor
        self._begin_sum = begin_sum
        self.parameters = parameters
        self.waits_for = 0
        self.arrives: Callable[[], None] | None = None
        if hooked:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._one_is_there)

    def send(self) -> None:
        self.arrives = self._begin_sum(self._tensor)

    def receive(self) -> None:
        assert self.arrives is not None
        self.arrives()
        self.arrives, self.waits_for = None, 0

    def _one_is_there(self, _: Tensor) -> None:
        if self.waits_for:
            self.waits_for -= 1
            if self.waits_for == 0:
                self.send()


def sum_over_wire_(cluster: Cluster, tensor: Tensor, wire: torch.dtype, name: str) -> None:
    """Collective: `tensor` (n,) summed over all ranks, in place, sent as the 2-byte type `wire`.

    Each rank adds up its slice of all ranks' tensors, in full precision and in the order of the ranks, and sends the
    sum to all: as many elements as in a ring all-reduce (Patarasuk and Yuan 2009), but rounded twice on any number of
    ranks, where a ring rounds at every hop. All ranks end with the same bits.
    """
    if cluster.size == 1:
        return
    if len(tensor) > (most := max(1, cluster.max_elements(wire) - cluster.size)):  # room to pad
        for index, piece in enumerate(tensor.split(most)):
            sum_over_wire_(cluster, piece, wire, f"{name}.{index}")
        return
    padded = torch.zeros(-(-len(tensor) // cluster.size) * cluster.size, dtype=wire, device=tensor.device)
    padded[: len(tensor)] = tensor
    # Horovod has no bfloat16: it moves the bits as integers.
    received = cluster.all_to_all(padded.view(torch.int16), f"{name}.scatter").view(wire)
    mine = received.view(cluster.size, -1).to(tensor.dtype).sum(0)
    summed = cluster.all_gather(mine.to(wire).view(torch.int16), f"{name}.gather").view(wire)
    tensor.copy_(summed[: len(tensor)])


def _flat_buffer(parameters: list[nn.Parameter]) -> Tensor:
    """Allocate one flat buffer with a view for the `.grad` of each of `parameters`, and one element more.

    A view has its parameter's own strides, because fused optimizers refuse channels-last weights otherwise.
    """
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) != 1:
        raise ValueError(f"the model's trainable parameters are of {kinds}: one data type on one device is needed")
    ((dtype, device),) = kinds
    buffer = torch.zeros(sum(parameter.numel() for parameter in parameters) + 1, dtype=dtype, device=device)
    offset = 0
    for parameter in parameters:
        parameter.grad = buffer.as_strided(parameter.size(), parameter.stride(), offset)
        offset += parameter.numel()
    return buffer
