"""The parameters of one block in one flat buffer, cut into as many equal parts as there are ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.parallel.merge import shard_model
from lockstep.parallel.tensor_slices import Piece


@dataclass(frozen=True)
class Share:
    """What one rank's part of a flat buffer holds of a parameter: `piece` lies at start ... of the part."""

    piece: Piece
    start: int

    def of(self, part: Tensor) -> Tensor:
        """A view (n,)."""
        return part[self.start : self.start + self.piece.stop - self.piece.start]


def shares_of(shapes: Mapping[str, torch.Size], part_size: int, shard_id: int) -> list[Share]:
    """What part `shard_id` holds of parameters that lie one after the other and are cut every `part_size` elements."""
    shares = []
    begin, end = shard_id * part_size, (shard_id + 1) * part_size
    offset = 0
    for name, shape in shapes.items():
        start, stop = max(offset, begin), min(offset + shape.numel(), end)
        if start < stop:
            shares.append(Share(Piece(name, start - offset, stop - offset, shape), start - begin))
        offset += shape.numel()
    return shares


class Slots:
    """Memory through which one flat tensor after the other passes, each when its turn has come.

    Each kind has two slots, taken in turn, so that what comes next can arrive while its neighbour is in use. Tensors
    that share a slot are different views of the same bytes. (Memory that is taken and given back at every turn would
    fall into pieces between the activations.)
    """

    def __init__(self) -> None:
        self._storages: dict[object, torch.UntypedStorage] = {}

    def tensor(self, kind: str, turn: int, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view (num_elements,) of the slot of a kind whose turn it is, which grows if need be."""
        like = torch.empty(0, dtype=dtype, device=device)
        storage = self._storages.setdefault((kind, turn % 2, dtype), like.untyped_storage())
        num_bytes = num_elements * like.element_size()
        if storage.nbytes() < num_bytes:
            storage.resize_(num_bytes)  # in place: views stay what they are
        tensor: Tensor = like.set_(storage, 0, (num_elements,))  # type: ignore[call-overload]
        return tensor


class FlatParameters:
    """Parameters of one data type that all learn or are all frozen, in one buffer; their gradients in another.

    Attributes:
        part: this rank's part of the parameters (n,): what the optimizer updates. A view of the whole, or a copy
            where the whole comes and goes.
        gradient_part: this rank's part of the reduced gradients (n,); None of frozen parameters.
        shares: what `part` holds.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, nn.Parameter], cluster: Cluster, stage: int, slots: Slots, turn: int
    ) -> None:
        """
        Args:
            name: of the buffer, the same on every rank.
            stage: of ZeRO: from 2 on, gradients are there during a backward pass only; from 3 on, so are parameters.
            turn: which slot is whose.
        """
        self._name = name
        self._cluster = cluster
        self._parameters = list(parameters.values())
        first = self._parameters[0]
        num_elements = sum(parameter.numel() for parameter in self._parameters)
        padded = -(-num_elements // cluster.size) * cluster.size
        self.is_frozen = not first.requires_grad
        self._kind = "frozen" if self.is_frozen else "learning"
        self._slot = partial(slots.tensor, turn=turn, dtype=first.dtype, device=first.device)
        self._own = partial(torch.zeros, padded, dtype=first.dtype, device=first.device)
        self.comes_and_goes = stage == 3
        self._stays_here = False
        self._is_here = not self.comes_and_goes
        self._arrives: Callable[[], None] | None = None
        self._whole = self._slot(self._kind, num_elements=padded) if self.comes_and_goes else self._own()
        self._whole[num_elements:] = 0
        for parameter, view in zip(self._parameters, self._views_of(self._whole), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
        self.part = self._part_of(self._whole)
        if self.comes_and_goes:
            self.part = self.part.clone()
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.shares = shares_of(shapes, len(self.part), cluster.rank)
        self.gradient_part: Tensor | None = None
        if not self.is_frozen:
            self._gradients = self._slot("gradients", num_elements=padded) if stage >= 2 else self._own()
            self._received = slots.tensor("received", 0, padded, first.dtype, first.device)
            self.gradient_part = torch.zeros_like(self.part) if stage >= 2 else self._part_of(self._gradients)
            self._hang_up_gradients()

    def stay_here(self) -> None:
        """Collective: from now on the whole has memory of its own: for tied weights, which are used out of turn."""
        if self._stays_here:
            return
        self._stays_here = True
        if self.comes_and_goes:
            self.comes_and_goes, self._whole = False, self._own()
            for parameter, view in zip(self._parameters, self._views_of(self._whole), strict=True):
                parameter.data = view
            self.begin_gather()
            self.finish_gather()
        if self.gradient_part is not None and not self._is_part_of(self._gradients, self.gradient_part):
            self._gradients = self._own()
            self._hang_up_gradients()

    def _views_of(self, flat: Tensor) -> list[Tensor]:
        """One after the other, in the shapes of the parameters."""
        sizes = [parameter.numel() for parameter in self._parameters]
        pieces = flat[: sum(sizes)].split(sizes)
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self._parameters, strict=True)]

    def _part_of(self, flat: Tensor) -> Tensor:
        return shard_model({"flat": flat}, self._cluster.size)["flat"][self._cluster.rank]

    @staticmethod
    def _is_part_of(whole: Tensor, part: Tensor) -> bool:
        return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()

    def _hang_up_gradients(self) -> None:
        for parameter, view in zip(self._parameters, self._views_of(self._gradients), strict=True):
            parameter.grad = view

    # -- parameters ------------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Collective: if the whole comes and goes, and is not here, every rank's part is on its way."""
        if self.comes_and_goes and not self._is_here:
            self._is_here = True
            self.begin_gather()

    def begin_gather(self, turn: int = 0) -> None:
        """Collective: every rank's part is on its way to the others; `turn` differs from what is on its way already."""
        part = self.part
        if self._is_part_of(self._whole, part):
            # MPI forbids that what is sent lies in what is received.
            part = self._slot("sent", turn=turn, num_elements=len(part)).copy_(part)
        self._arrives = self._cluster.begin_all_gather_(self._whole, part, f"gather.{self._name}")

    def finish_gather(self) -> None:
        if self._arrives is not None:
            self._arrives()
            self._arrives = None

    def free(self) -> None:
        """The slot may be another's now."""
        self.finish_gather()
        self._is_here = not self.comes_and_goes

    # -- gradients -------------------------------------------------------------------------------------------------

    def begin_gradients(self) -> None:
        """Zeros, for a backward pass to add to."""
        if self.gradient_part is not None:
            self._gradients.zero_()

    def begin_reduce(self) -> Callable[[], None]:
        """Collective: the ranks' gradients are on their way; when the returned function has been called, this rank's
        part of their sum has been added to `gradient_part` (below stage 2: has become it).
        """
        if self.gradient_part is None:
            return lambda: None
        mine = self.gradient_part
        arrives = self._cluster.begin_reduce_scatter(self._gradients, self._received, f"reduce.{self._name}")
        is_of_whole = self._is_part_of(self._gradients, mine)

        def finish() -> None:
            parts = arrives()
            if not is_of_whole:
                for part in parts:
                    mine.add_(part)
            elif self._cluster.size > 1:
                torch.sum(parts, 0, out=mine)

        return finish

    def not_finite(self, names: Mapping[Tensor, str]) -> list[str]:
        """The gradients of this rank's own, before they are reduced, that are infinite or not a number."""
        return [
            f"the gradient of {names[parameter]}"
            for parameter in self._parameters
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
