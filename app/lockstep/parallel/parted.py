"""A model whose blocks are in parts on the ranks: which come, are reduced and go as a pass reaches them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.parallel.flat import FlatParameters, Share, Slots
from lockstep.parallel.merge import layout_of, state_tensors
from lockstep.parallel.strategy import Blocks


class Unit:
    """What is gathered, reduced and freed at once: the parameters that a block is the first to have.

    Attributes:
        borrowed: the units of earlier blocks whose parameters this block uses, too (tied weights); they stay here.
        is_open: its gradients have begun, and not been sent.
    """

    def __init__(self, flats: list[FlatParameters], borrowed: list["Unit"]) -> None:
        self.flats = flats
        self.borrowed = borrowed
        self.is_open = False

    def fetch(self) -> None:
        """Collective: parameters are on their way."""
        for flat in self.flats:
            flat.fetch()

    def have(self) -> None:
        """Collective: parameters are here."""
        self.fetch()
        for flat in self.flats:
            flat.finish_gather()

    def free(self) -> None:
        for flat in self.flats:
            flat.free()

    def open(self) -> None:
        """Gradients begin, of a tied weight with the last block that uses it: backward, that is the first."""
        for unit in (self, *self.borrowed):
            if not unit.is_open:
                unit.is_open = True
                for flat in unit.flats:
                    flat.begin_gradients()


class PartedModel:
    """The blocks of a model, with hooks that make a forward and a backward pass as if all of it were here.

    Attributes:
        model: the blocks, one after the other; of a parameter that is not here, only the shape is.
        like: names, shapes and data types of all parameters and buffers.
        flats: the parameters of all blocks.
        shares: what this rank's parts of them hold of each parameter, by its name.
        names: of the parameters; one that has several (tied weights) goes by its first.
        first_names: each name of each parameter -> the one that it goes by.
    """

    def __init__(self, blocks: Blocks, cluster: Cluster, stage: int) -> None:
        """Collective: take this rank's part of rank 0's `blocks`, one block after the other.

        Args:
            stage: of ZeRO.
        """
        self._stage = stage
        self._slots = Slots()
        self._units: list[Unit] = []
        self._unit_of: dict[Tensor, Unit] = {}
        self._sent: list[Callable[[], None]] = []
        self._inspected: list[str] | None = None
        self.model = nn.Sequential()
        self.like: dict[str, Tensor] = {}
        self.flats: list[FlatParameters] = []
        self.names: dict[Tensor, str] = {}
        self.first_names: dict[str, str] = {}
        for name, block in blocks:
            cluster.broadcast_parameters(state_tensors(block))
            self.like |= {f"{name}.{inner}": tensor for inner, tensor in layout_of(block).items()}
            self.model.add_module(name, block)
            self._deal(name, block, cluster)
        self.shares: dict[str, tuple[FlatParameters, Share]] = {
            share.piece.name: (flat, share) for flat in self.flats for share in flat.shares
        }

    def _deal(self, name: str, block: nn.Module, cluster: Cluster) -> None:
        """Collective: cut those parameters of `block` that no block before it has, and let them come and go."""
        mine: dict[tuple[torch.dtype, bool], dict[str, nn.Parameter]] = {}
        borrowed: dict[int, Unit] = {}
        for inner, parameter in block.named_parameters(remove_duplicate=False):
            full_name = f"{name}.{inner}"
            self.first_names[full_name] = self.names.setdefault(parameter, full_name)
            if self.first_names[full_name] == full_name:
                mine.setdefault((parameter.dtype, parameter.requires_grad), {})[full_name] = parameter
            elif (owner := self._unit_of.get(parameter)) is not None:
                borrowed[id(owner)] = owner
        flats = [
            FlatParameters(f"{name}.{index}", parameters, cluster, self._stage, self._slots, turn=len(self._units))
            for index, parameters in enumerate(mine.values())
        ]
        self.flats += flats
        if flats or borrowed:
            for owner in borrowed.values():
                for flat in owner.flats:
                    flat.stay_here()
            unit = Unit(flats, list(borrowed.values()))
            self._units.append(unit)
            self._unit_of |= {parameter: unit for parameters in mine.values() for parameter in parameters.values()}
            if self._stage > 1:
                block.register_forward_pre_hook(partial(self._before_forward, len(self._units) - 1))
                block.register_forward_hook(partial(self._after_forward, len(self._units) - 1))

    def publish(self, with_frozen: bool = False) -> None:
        """Collective: parameters that are here for good become those of all ranks' parts, the next on their way while
        the last arrive.
        """
        flats = [flat for flat in self.flats if not flat.comes_and_goes and (with_frozen or not flat.is_frozen)]
        for turn, (before, flat) in enumerate(zip([None, *flats], [*flats, None], strict=True)):
            if flat:
                flat.begin_gather(turn)
            if before:
                before.finish_gather()

    def begin_gradients(self) -> None:
        """Zeros, for backward passes to add to."""
        for flat in self.flats:
            if flat.gradient_part is not None:
                flat.gradient_part.zero_()
            if self._stage == 1:
                flat.begin_gradients()

    def end_pass(self) -> None:
        """Collective: after a backward pass, end what no hook has ended: the first block, whose input has no gradient,
        and what the pass has left out.
        """
        if self._stage == 1:
            return
        for index in reversed(range(len(self._units))):
            if self._units[index].is_open:
                self._end_backward(index)
            if self._stage == 3:
                self._units[index].free()
        self._receive()  # the next pass may begin with a block that passes through the same slot

    def reduce_gradients(self) -> None:
        """Collective: what is left to do until `gradient_part` of all flats are those of all ranks."""
        if self._stage == 1:
            for unit in self._units:
                self._send(unit)
        self._receive()

    @contextmanager
    def inspecting(self) -> Iterator[list[str]]:
        """Inside, gradients are not reduced; those of this rank that are infinite or not a number are listed by name,
        once all passes are done.
        """
        found: list[str] = []
        self._inspected = found
        yield found
        self._inspected = None
        if self._stage == 1:
            found += [name for flat in self.flats for name in flat.not_finite(self.names)]

    # -- a pass through the blocks ---------------------------------------------------------------------------------

    def _before_forward(self, index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._stage == 3:
            self._units[index].have()
            if index + 1 < len(self._units):
                self._units[index + 1].fetch()
        if torch.is_grad_enabled() and inputs[0].requires_grad:
            inputs[0].register_hook(partial(self._between, index))

    def _after_forward(self, index: int, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if self._stage == 3:
            self._units[index].free()
        if index == len(self._units) - 1 and output.requires_grad:
            output.register_hook(lambda _: self._begin_backward(index))

    def _between(self, index: int, _: Tensor) -> None:
        """The backward pass has reached the input of unit `index`, so that all its gradients are there."""
        self._end_backward(index)
        if index > 0:
            self._begin_backward(index - 1)

    def _begin_backward(self, index: int) -> None:
        if self._stage == 3:
            self._units[index].have()
            if index > 0:
                self._units[index - 1].fetch()
        self._units[index].open()

    def _end_backward(self, index: int) -> None:
        unit = self._units[index]
        if self._stage == 3:
            unit.free()
        unit.is_open = False
        if self._inspected is not None:
            self._inspected += [name for flat in unit.flats for name in flat.not_finite(self.names)]
        else:
            self._send(unit)

    def _send(self, unit: Unit) -> None:
        """Collective: one unit's gradients leave while the next one's are computed."""
        self._receive()
        self._sent = [flat.begin_reduce() for flat in unit.flats]

    def _receive(self) -> None:
        for finish in self._sent:
            finish()
        self._sent = []
