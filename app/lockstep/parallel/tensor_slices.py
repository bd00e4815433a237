"""What a rank holds of a run's state: tensors, or slices of them, under names that do not depend on the ranks.

`model/<tensor>` are parameters and buffers, `optimizer/<kind>/<parameter>` the optimizer's state. A slice is a range of
a tensor's elements in row-major order, so that a state can be cut and merged in any way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lockstep.parallel.merge import state_tensors, sync_params


@dataclass(frozen=True)
class TensorSlice:
    """Elements start ... stop - 1, in row-major order, of the parameter `name` of `shape`."""

    name: str
    start: int
    stop: int
    shape: torch.Size

    @staticmethod
    def whole(name: str, tensor: Tensor) -> "TensorSlice":
        """The slice that is all of `tensor`."""
        return TensorSlice(name, 0, tensor.numel(), tensor.shape)


@dataclass(frozen=True)
class Shard:
    """Elements `start` ... of a tensor of `shape`: all of them in that shape, or some of them flat."""

    values: Tensor
    start: int
    shape: torch.Size

    @staticmethod
    def of(values: Tensor, tensor_slice: TensorSlice) -> "Shard":
        """Take `values` for those of `tensor_slice`."""
        is_whole = values.numel() == tensor_slice.shape.numel()
        return Shard(values.view(tensor_slice.shape) if is_whole else values, tensor_slice.start, tensor_slice.shape)

    @staticmethod
    def whole(values: Tensor) -> "Shard":
        """The shard that is all of a tensor."""
        return Shard(values, 0, values.shape)

    @property
    def is_whole(self) -> bool:
        return self.values.shape == self.shape


State = dict[str, Shard]


class SavedState(Protocol):
    """A saved state, however it was cut when it was saved. `shapes` are those of the whole tensors."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read elements start ... stop - 1 of a tensor, (n,), on the CPU."""
        ...


class TensorState:
    """A `SavedState` in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._tensors[name].reshape(-1)[start:stop]


def whole_tensors(saved: SavedState) -> dict[str, Tensor]:
    """Read all of `saved` into memory."""
    return {name: saved.read(name).view(shape) for name, shape in saved.shapes.items()}


def model_state(model: nn.Module) -> State:
    """Collect every parameter and persistent buffer of `model`, whole, without copies."""
    return {f"model/{name}": Shard.whole(tensor) for name, tensor in state_tensors(model).items()}


def load_model(model: nn.Module, saved: SavedState) -> None:
    """Overwrite every parameter and persistent buffer of `model`.

    Raises:
        ValueError: `saved` lacks one of them, or has it in another size.
    """
    for name, tensor in state_tensors(model).items():
        load_slice(tensor, TensorSlice.whole(name, tensor), saved)


def load_slice(values: Tensor, tensor_slice: TensorSlice, saved: SavedState) -> None:
    """Overwrite `values` with the saved values of `tensor_slice`, a slice of a parameter.

    Raises:
        ValueError: `saved` lacks the parameter, or has it in another shape.
    """
    name = f"model/{tensor_slice.name}"
    if name not in saved.shapes or tuple(saved.shapes[name]) != tuple(tensor_slice.shape):
        raise ValueError(
            f"{tensor_slice.name} is saved as {saved.shapes.get(name)}: {tuple(tensor_slice.shape)} is needed"
        )
    read = saved.read(name, tensor_slice.start, tensor_slice.stop)
    if values.is_contiguous():
        sync_params({name: [values.view(-1)]}, {name: [read]})
    else:
        values.copy_(read.view(values.shape))


def optimizer_state(optimizer: torch.optim.Optimizer, slices: Mapping[Tensor, TensorSlice]) -> State:
    """Collect the state of `optimizer`, whose parameters are `slices` of the model's, without copies.

    Raises:
        ValueError: it keeps something that is neither one number for each element nor one for all.
    """
    state: State = {}
    for parameter, kinds in optimizer.state.items():
        tensor_slice = slices[parameter]
        for kind, value in kinds.items():
            if value is None:
                continue
            tensor, name = torch.as_tensor(value), f"optimizer/{kind}/{tensor_slice.name}"
            if tensor.shape == parameter.shape and kind != "step":
                state[name] = Shard.of(tensor, tensor_slice)
            elif tensor.dim() == 0:
                if tensor_slice.start == 0:  # every rank has the same number
                    state[name] = Shard.whole(tensor)
            else:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {kind} of {tuple(tensor.shape)} for {tensor_slice.name}: only "
                    "an optimizer that works element by element can be saved and cut"
                )
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, slices: Mapping[Tensor, TensorSlice], saved: SavedState) -> None:
    """Replace the state of `optimizer` by the saved state of its `slices`."""
    kinds = {name.split("/")[1] for name in saved.shapes if name.startswith("optimizer/")}
    by_index: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        tensor_slice = slices[parameter]
        for kind in sorted(kinds):
            name = f"optimizer/{kind}/{tensor_slice.name}"
            if name not in saved.shapes:
                continue
            if kind == "step" or saved.shapes[name] != tuple(tensor_slice.shape):
                value = saved.read(name).view(()).clone()
            else:
                # Fused optimizers walk through memory: with other strides they would pair the wrong elements.
                value = torch.empty_like(parameter)
                value.copy_(saved.read(name, tensor_slice.start, tensor_slice.stop).view(parameter.shape))
            by_index.setdefault(index, {})[kind] = value.detach()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})
