"""A model whose parameters are sharded over the ranks, block by block, as in ZeRO and FSDP.

`FlatParameters` are one block's parameters in one flat buffer, cut into one shard a rank. `ShardedModel` has hooks that
unshard a block, and reduce its gradients, as a forward or backward pass reaches it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import tensors_of
from lockstep.models.block_sequence import BlockSequence
from lockstep.parallel.merge import meta_state_of, shard_model, state_tensors
from lockstep.parallel.strategy import Blocks
from lockstep.parallel.tensor_slices import TensorSlice
from lockstep.runtime.errors import UserCodeError


@dataclass(frozen=True)
class FlatSlice:
    """What one rank's shard of a flat buffer holds of a parameter.

    Attributes:
        tensor_slice: these elements of the parameter ...
        start: ... begin here in the shard.
    """

    tensor_slice: TensorSlice
    start: int

    def of(self, shard: Tensor) -> Tensor:
        """A view (n,) of them in `shard`."""
        return shard[self.start : self.start + self.tensor_slice.stop - self.tensor_slice.start]


def flat_slices_of(shapes: Mapping[str, torch.Size], shard_size: int, shard_id: int) -> list[FlatSlice]:
    """List what shard `shard_id` holds of parameters that lie one after the other, cut every `shard_size` elements."""
    slices = []
    begin, end = shard_id * shard_size, (shard_id + 1) * shard_size
    offset = 0
    for name, shape in shapes.items():
        start, stop = max(offset, begin), min(offset + shape.numel(), end)
        if start < stop:
            slices.append(FlatSlice(TensorSlice(name, start - offset, stop - offset, shape), start - begin))
        offset += shape.numel()
    return slices


class BufferPool:
    """Buffers that the blocks use in turn: of each kind two, so that the next block's can be filled meanwhile.

    Tensors that share a buffer are different views of the same bytes. (Memory that is allocated and freed for every
    block would be fragmented by the activations.)
    """

    def __init__(self) -> None:
        self._storages: dict[object, torch.UntypedStorage] = {}

    def tensor(self, kind: str, turn: int, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give a view (num_elements,) of the buffer of this `kind` and `turn`, which grows if it must."""
        empty = torch.empty(0, dtype=dtype, device=device)
        storage = self._storages.setdefault((kind, turn % 2, dtype), empty.untyped_storage())
        num_bytes = num_elements * empty.element_size()
        if storage.nbytes() < num_bytes:
            storage.resize_(num_bytes)  # in place: views stay what they are
        tensor: Tensor = empty.set_(storage, 0, (num_elements,))  # type: ignore[call-overload]
        return tensor


class FlatParameters:
    """Parameters of one data type, all trainable or all frozen, in one flat buffer; their gradients in another.

    Attributes:
        shard: this rank's shard of the parameters (n,): what the optimizer updates. A view of the unsharded buffer, or
            a copy if that is resharded after use.
        gradient_shard: this rank's shard of the reduced gradients (n,); None of frozen parameters.
        slices: what `shard` holds.
        reshard_after_forward: the unsharded parameters live in a buffer of the pool, and only while they are used.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        cluster: Cluster,
        stage: int,
        buffers: BufferPool,
        turn: int,
    ) -> None:
        """
        Args:
            name: of the buffer, the same on every rank.
            stage: of ZeRO: from 2 on, whole gradients live during a backward pass only; at 3, so do whole parameters.
            buffers: where they live then.
            turn: the number of this block, by which neighbours use different buffers.
        """
        self._name = name
        self._cluster = cluster
        self._parameters = list(parameters.values())
        first = self._parameters[0]
        num_elements = sum(parameter.numel() for parameter in self._parameters)
        padded = -(-num_elements // cluster.size) * cluster.size
        self.is_frozen = not first.requires_grad
        self._kind = "frozen" if self.is_frozen else "learning"
        self._pooled = partial(buffers.tensor, turn=turn, dtype=first.dtype, device=first.device)
        self._own_buffer = partial(torch.zeros, padded, dtype=first.dtype, device=first.device)
        self.reshard_after_forward = stage == 3
        self._is_kept = False
        self._is_unsharded = not self.reshard_after_forward
        self._arrives: Callable[[], None] | None = None
        self._unsharded = (
            self._pooled(self._kind, num_elements=padded) if self.reshard_after_forward else self._own_buffer()
        )
        self._unsharded[num_elements:] = 0
        for parameter, view in zip(self._parameters, self._views_of(self._unsharded), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
        self.shard = self._shard_of(self._unsharded)
        if self.reshard_after_forward:
            self.shard = self.shard.clone()
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.slices = flat_slices_of(shapes, len(self.shard), cluster.rank)
        self.gradient_shard: Tensor | None = None
        if not self.is_frozen:
            self._gradients = self._pooled("gradients", num_elements=padded) if stage >= 2 else self._own_buffer()
            self._received = buffers.tensor("received", 0, padded, first.dtype, first.device)
            self.gradient_shard = torch.zeros_like(self.shard) if stage >= 2 else self._shard_of(self._gradients)
            self._set_gradients()

    def keep_unsharded(self) -> None:
        """Collective: give the unsharded parameters their own memory: tied weights are used out of turn."""
        if self._is_kept:
            return
        self._is_kept = True
        if self.reshard_after_forward:
            self.reshard_after_forward, self._unsharded = False, self._own_buffer()
            for parameter, view in zip(self._parameters, self._views_of(self._unsharded), strict=True):
                parameter.data = view
            self.begin_gather()
            self.finish_gather()
        if self.gradient_shard is not None and not self._is_view_of(self._gradients, self.gradient_shard):
            self._gradients = self._own_buffer()
            self._set_gradients()

    def _views_of(self, flat: Tensor) -> list[Tensor]:
        """Views of `flat` in the shapes of the parameters, one after the other."""
        sizes = [parameter.numel() for parameter in self._parameters]
        views = flat[: sum(sizes)].split(sizes)
        return [view.view(parameter.shape) for view, parameter in zip(views, self._parameters, strict=True)]

    def _shard_of(self, flat: Tensor) -> Tensor:
        return shard_model({"flat": flat}, self._cluster.size)["flat"][self._cluster.rank]

    @staticmethod
    def _is_view_of(unsharded: Tensor, shard: Tensor) -> bool:
        return shard.untyped_storage().data_ptr() == unsharded.untyped_storage().data_ptr()

    def _set_gradients(self) -> None:
        for parameter, view in zip(self._parameters, self._views_of(self._gradients), strict=True):
            parameter.grad = view

    # -- parameters ------------------------------------------------------------------------------------------------

    def unshard_async(self) -> None:
        """Collective: begin to gather the parameters, if they were resharded."""
        if self.reshard_after_forward and not self._is_unsharded:
            self._is_unsharded = True
            self.begin_gather()

    def begin_gather(self, turn: int = 0) -> None:
        """Collective: begin to gather every rank's shard; `turn` differs from that of a gathering still under way."""
        shard = self.shard
        if self._is_view_of(self._unsharded, shard):
            # MPI forbids that what is sent lies in what is received.
            shard = self._pooled("sent", turn=turn, num_elements=len(shard)).copy_(shard)
        self._arrives = self._cluster.begin_all_gather_(self._unsharded, shard, f"gather.{self._name}")

    def finish_gather(self) -> None:
        """Wait for the gathered parameters."""
        if self._arrives is not None:
            self._arrives()
            self._arrives = None

    def reshard(self) -> None:
        """Let another block have the buffer of the unsharded parameters."""
        self.finish_gather()
        self._is_unsharded = not self.reshard_after_forward

    # -- gradients -------------------------------------------------------------------------------------------------

    def zero_gradients(self) -> None:
        """Zero the whole gradients, for a backward pass to add to."""
        if self.gradient_shard is not None:
            self._gradients.zero_()

    def begin_reduce(self) -> Callable[[], None]:
        """Collective: begin to reduce-scatter the gradients. The returned function waits, and adds this rank's shard of
        their sum to `gradient_shard` (below stage 2: replaces it).
        """
        if self.gradient_shard is None:
            return lambda: None
        mine = self.gradient_shard
        arrives = self._cluster.begin_reduce_scatter(self._gradients, self._received, f"reduce.{self._name}")
        is_view = self._is_view_of(self._gradients, mine)

        def finish() -> None:
            addends = arrives()
            if not is_view:
                for addend in addends:
                    mine.add_(addend)
            elif self._cluster.size > 1:
                torch.sum(addends, 0, out=mine)

        return finish

    def names_of_non_finite(self, names: Mapping[Tensor, str]) -> list[str]:
        """Name this rank's gradients, before they are reduced, that are infinite or not a number."""
        return [
            f"the gradient of {names[parameter]}"
            for parameter in self._parameters
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]


class ShardedUnit:
    """What is unsharded, reduced and resharded at once: the parameters that a block is the first to have.

    Attributes:
        borrowed: the units of earlier blocks whose parameters this block uses, too (tied weights); they stay unsharded.
        is_open: a backward pass adds to its gradients, and they have not been sent.
    """

    def __init__(self, flats: list[FlatParameters], borrowed: list["ShardedUnit"]) -> None:
        self.flats = flats
        self.borrowed = borrowed
        self.is_open = False

    def unshard_async(self) -> None:
        """Collective: begin to gather the parameters."""
        for flat in self.flats:
            flat.unshard_async()

    def unshard(self) -> None:
        """Collective: gather the parameters, and wait for them."""
        self.unshard_async()
        for flat in self.flats:
            flat.finish_gather()

    def reshard(self) -> None:
        """Let other blocks have the buffers of the unsharded parameters."""
        for flat in self.flats:
            flat.reshard()

    def open(self) -> None:
        """Zero the gradients; those of a tied weight with the last block that uses it: backward, that is the first."""
        for unit in (self, *self.borrowed):
            if not unit.is_open:
                unit.is_open = True
                for flat in unit.flats:
                    flat.zero_gradients()


class ShardedModel:
    """The blocks of a model, with hooks by which forward and backward passes work as if all of it were unsharded.

    Attributes:
        model: the blocks, one after the other; a resharded parameter has its shape and no values.
        meta_state: names, shapes and data types of all parameters and buffers.
        flats: the parameters of all blocks.
        slices: what this rank's shards of them hold of each parameter, by its name.
        names: of the parameters; one that has several (tied weights) goes by its first.
        first_names: each name of each parameter -> the one that it goes by.
    """

    def __init__(self, blocks: Blocks, cluster: Cluster, stage: int) -> None:
        """Collective: take this rank's shards of rank 0's `blocks`, one block after the other.

        Args:
            stage: of ZeRO.
        """
        self._stage = stage
        self._buffer_pool = BufferPool()
        self._units: list[ShardedUnit] = []
        self._unit_of: dict[Tensor, ShardedUnit] = {}
        self._sent: list[Callable[[], None]] = []
        self._non_finite: list[str] | None = None
        self.model = BlockSequence()
        self.meta_state: dict[str, Tensor] = {}
        self.flats: list[FlatParameters] = []
        self.names: dict[Tensor, str] = {}
        self.first_names: dict[str, str] = {}
        for name, block in blocks:
            cluster.broadcast_parameters(state_tensors(block))
            self.meta_state |= {f"{name}.{inner}": tensor for inner, tensor in meta_state_of(block).items()}
            self.model.add_module(name, block)
            self._shard_block(name, block, cluster)
        self.slices: dict[str, tuple[FlatParameters, FlatSlice]] = {
            flat_slice.tensor_slice.name: (flat, flat_slice) for flat in self.flats for flat_slice in flat.slices
        }

    def _shard_block(self, name: str, block: nn.Module, cluster: Cluster) -> None:
        """Collective: shard those parameters of `block` that no block before it has, and hook into its passes."""
        mine: dict[tuple[torch.dtype, bool], dict[str, nn.Parameter]] = {}
        borrowed: dict[int, ShardedUnit] = {}
        for inner, parameter in block.named_parameters(remove_duplicate=False):
            full_name = f"{name}.{inner}"
            self.first_names[full_name] = self.names.setdefault(parameter, full_name)
            if self.first_names[full_name] == full_name:
                mine.setdefault((parameter.dtype, parameter.requires_grad), {})[full_name] = parameter
            elif (owner := self._unit_of.get(parameter)) is not None:
                borrowed[id(owner)] = owner
        flats = [
            FlatParameters(
                f"{name}.{index}", parameters, cluster, self._stage, self._buffer_pool, turn=len(self._units)
            )
            for index, parameters in enumerate(mine.values())
        ]
        self.flats += flats
        if flats or borrowed:
            for owner in borrowed.values():
                for flat in owner.flats:
                    flat.keep_unsharded()
            unit = ShardedUnit(flats, list(borrowed.values()))
            self._units.append(unit)
            self._unit_of |= {parameter: unit for parameters in mine.values() for parameter in parameters.values()}
            if self._stage > 1:
                block.register_forward_pre_hook(partial(self._before_forward, len(self._units) - 1))
                block.register_forward_hook(partial(self._after_forward, len(self._units) - 1))

    def gather_parameters(self, with_frozen: bool = False) -> None:
        """Collective: gather those parameters that stay unsharded from all ranks' shards, which have changed; the next
        are on their way while the last arrive.
        """
        flats = [flat for flat in self.flats if not flat.reshard_after_forward and (with_frozen or not flat.is_frozen)]
        for turn, (before, flat) in enumerate(zip([None, *flats], [*flats, None], strict=True)):
            if flat:
                flat.begin_gather(turn)
            if before:
                before.finish_gather()

    def zero_gradients(self) -> None:
        """Zero the gradients, for backward passes to add to."""
        for flat in self.flats:
            if flat.gradient_shard is not None:
                flat.gradient_shard.zero_()
            if self._stage == 1:
                flat.zero_gradients()

    def end_pass(self) -> None:
        """Collective: after a backward pass, finish what no hook has finished: the first block, whose input has no
        gradient, and blocks that the pass has left out.
        """
        if self._stage == 1:
            return
        for index in reversed(range(len(self._units))):
            if self._units[index].is_open:
                self._end_backward(index)
            if self._stage == 3:
                self._units[index].reshard()
        self._receive()  # the next pass may begin with a block that uses the same buffer

    def reduce_gradients(self) -> None:
        """Collective: finish what is left to do until each `gradient_shard` is of all ranks' gradients."""
        if self._stage == 1:
            for unit in self._units:
                self._send(unit)
        self._receive()

    @contextmanager
    def local_gradients(self) -> Iterator[list[str]]:
        """Inside, gradients are not reduced. Gives the names of this rank's that were infinite or not a number,
        complete on leaving.
        """
        names: list[str] = []
        self._non_finite = names
        yield names
        self._non_finite = None
        if self._stage == 1:
            names += [name for flat in self.flats for name in flat.names_of_non_finite(self.names)]

    # -- a pass through the blocks ---------------------------------------------------------------------------------

    def _before_forward(self, index: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._stage == 3:
            self._units[index].unshard()
            if index + 1 < len(self._units):
                self._units[index + 1].unshard_async()
        # A first block may have any inputs: its backward pass ends with the whole one.
        if index > 0 and torch.is_grad_enabled() and inputs[0].requires_grad:
            inputs[0].register_hook(partial(self._between, index))

    def _after_forward(self, index: int, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if self._stage == 3:
            self._units[index].reshard()
        if index == len(self._units) - 1 and torch.is_grad_enabled():
            tensors = [*tensors_of(output)]
            if not tensors:
                needed = "zero2 and zero3 need a tensor, or a tuple or dictionary of tensors"
                raise UserCodeError(f"the network gave {type(output).__name__}: {needed}")
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._from_output, index))

    def _from_output(self, index: int, _: Tensor) -> None:
        """Called when a backward pass has reached one of the model's outputs, which may be several."""
        if not self._units[index].is_open:
            self._begin_backward(index)

    def _between(self, index: int, _: Tensor) -> None:
        """Called when a backward pass has reached the input of unit `index`: all its gradients are complete."""
        self._end_backward(index)
        if index > 0:
            self._begin_backward(index - 1)

    def _begin_backward(self, index: int) -> None:
        if self._stage == 3:
            self._units[index].unshard()
            if index > 0:
                self._units[index - 1].unshard_async()
        self._units[index].open()

    def _end_backward(self, index: int) -> None:
        unit = self._units[index]
        if self._stage == 3:
            unit.reshard()
        unit.is_open = False
        if self._non_finite is not None:
            self._non_finite += [name for flat in unit.flats for name in flat.names_of_non_finite(self.names)]
        else:
            self._send(unit)

    def _send(self, unit: ShardedUnit) -> None:
        """Collective: send one unit's gradients while the next one's are computed."""
        self._receive()
        self._sent = [flat.begin_reduce() for flat in unit.flats]

    def _receive(self) -> None:
        for finish in self._sent:
            finish()
        self._sent = []
