"""The parameters of one block in one flat buffer, cut into as many equal parts as there are ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.cluster.comm import Cluster
from app.parallel.merge import shard_model
from app.parallel.parts import Piece


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


class FlatBuffer:
    """A flat tensor whose memory can be given back and taken again, while views of it stay what they are.

    Autograd keeps views of parameters from the forward to the backward pass: they must find the content again.

    Attributes:
        whole: (size * n,), padded with zeros.
        part: this rank's (n,), a view of `whole`.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype, cluster: Cluster) -> None:
        padded = -(-num_elements // cluster.size) * cluster.size
        self.whole = torch.zeros(padded, dtype=dtype, device=cluster.device)
        self.part = shard_model({"flat": self.whole}, cluster.size)["flat"][cluster.rank]

    @property
    def is_there(self) -> bool:
        return self.whole.numel() == 0 or self.whole.untyped_storage().nbytes() > 0

    def take(self) -> None:
        """Have memory again, with any content."""
        if not self.is_there:
            self.whole.untyped_storage().resize_(self.whole.nbytes)

    def give_back(self) -> None:
        """Have no memory."""
        self.whole.untyped_storage().resize_(0)

    def as_views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the buffer, one after the other, in the shapes of `tensors`."""
        sizes = [tensor.numel() for tensor in tensors]
        pieces = self.whole[: sum(sizes)].split(sizes)
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


class FlatParameters:
    """Parameters of one data type that all learn or are all frozen, in one buffer; their gradients in another.

    Attributes:
        part: this rank's part of the parameters (n,): what the optimizer updates. A view of the whole, or a copy
            where the whole comes and goes.
        gradient_part: this rank's part of the reduced gradients (n,); None of frozen parameters.
        shares: what `part` holds.
    """

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter], cluster: Cluster, stage: int) -> None:
        """
        Args:
            name: of the buffer, the same on every rank.
            stage: of ZeRO: from 2 on, gradients are there during a backward pass only; from 3 on, so are parameters.
        """
        self._name = name
        self._cluster = cluster
        self._stage = stage
        self._parameters = list(parameters.values())
        first = self._parameters[0]
        self.is_frozen = not first.requires_grad
        self.num_elements = sum(parameter.numel() for parameter in self._parameters)
        self._values = FlatBuffer(self.num_elements, first.dtype, cluster)
        for parameter, view in zip(self._parameters, self._values.as_views(self._parameters), strict=True):
            view.copy_(parameter.data)
            parameter.data = view
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.shares = shares_of(shapes, len(self._values.part), cluster.rank)
        self.part = self._values.part
        self._arrives: Callable[[], None] | None = None
        if stage == 3:
            self.part = self.part.clone()
            self._values.give_back()
        self.gradient_part: Tensor | None = None
        self._gradients: FlatBuffer | None = None
        if not self.is_frozen:
            self._gradients = FlatBuffer(self.num_elements, first.dtype, cluster)
            for parameter, view in zip(self._parameters, self._gradients.as_views(self._parameters), strict=True):
                parameter.grad = view
            self.gradient_part = self._gradients.part
            if stage >= 2:
                self.gradient_part = torch.zeros_like(self.part)
                self._gradients.give_back()

    # -- parameters ------------------------------------------------------------------------------------------------

    def begin_gather(self) -> None:
        """Collective: every rank's part is on its way to this one, unless all are here."""
        if self._arrives is None and (self._stage < 3 or not self._values.is_there):
            self._values.take()
            self._arrives = self._cluster.begin_all_gather_(self._values.whole, self.part, f"gather.{self._name}")

    def finish_gather(self) -> None:
        if self._arrives is not None:
            self._arrives()
            self._arrives = None

    def free(self) -> None:
        """Keep this rank's part of the parameters only."""
        self.finish_gather()
        self._values.give_back()

    # -- gradients -------------------------------------------------------------------------------------------------

    def begin_gradients(self) -> None:
        """Zeros, for a backward pass to add to."""
        if self._gradients:
            self._gradients.take()
            self._gradients.whole.zero_()

    def begin_reduce(self) -> Callable[[], None]:
        """Collective: the ranks' gradients are on their way; when the returned function has been called, this rank's
        part of their sum has been added to `gradient_part` (below stage 2: has become it).
        """
        if self._gradients is None or self.gradient_part is None:
            return lambda: None
        gradients, mine = self._gradients, self.gradient_part
        arrives = self._cluster.begin_reduce_scatter(gradients.whole, f"reduce.{self._name}")

        def finish() -> None:
            if self._stage >= 2:
                mine.add_(arrives())
                gradients.give_back()
            else:
                mine.copy_(arrives())

        return finish

    def not_finite(self, names: Mapping[Tensor, str]) -> list[str]:
        """The gradients of this rank's own, before they are reduced, that are infinite or not a number."""
        return [
            f"the gradient of {names[parameter]}"
            for parameter in self._parameters
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
