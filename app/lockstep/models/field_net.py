"""A convolutional network on a periodic grid, from fields to fields or to numbers."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class _Residual(nn.Module):
    """Two convolutions beside an identity (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(channels, channels), _convolution(channels, channels)

    def forward(self, fields: Tensor) -> Tensor:
        outputs: Tensor = fields + self.second(nn.functional.gelu(self.first(nn.functional.gelu(fields))))
        return outputs


class _Mean(nn.Module):
    """The mean of each channel (n, channels) over the grid."""

    def forward(self, fields: Tensor) -> Tensor:
        return fields.mean((2, 3))


def field_net_blocks(
    inputs: torch.Size, targets: torch.Size, width: int, num_blocks: int
) -> Iterator[tuple[str, nn.Module]]:
    """Build the network block by block.

    Args:
        inputs: (channels, height, width) of a sample.
        targets: of a sample: (channels, height, width) on the same grid, or (numbers,).
        width: channels of the hidden layers.

    Raises:
        ValueError: there is no such network for these shapes.
    """
    if len(inputs) != 3 or (len(targets) != 1 and targets[1:] != inputs[1:]):
        shapes = f"{tuple(inputs)} to {tuple(targets)}"
        raise ValueError(f"it takes (channels, height, width) to the same grid or to numbers, not {shapes}")
    yield "stem", _convolution(inputs[0], width)
    for index in range(num_blocks):
        yield f"block{index + 1}", _Residual(width)
    if len(targets) == 1:
        yield "mean", _Mean()
        yield "head", nn.Linear(width, targets[0])
    else:
        yield "head", _convolution(width, targets[0])


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 5, padding=2, padding_mode="circular")
