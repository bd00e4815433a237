"""A network as a sequence of named blocks."""

from collections.abc import Mapping
from typing import Any

from torch import nn


class BlockSequence(nn.Sequential):
    """Blocks in order: the first takes the network's inputs, each other the output of the one before."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        first, *others = self
        outputs = first(*inputs, **named)
        for block in others:
            outputs = block(outputs)
        return outputs


def apply(model: nn.Module, inputs: Any) -> Any:
    """Call `model` with `inputs`: a tuple or list becomes several arguments, a dictionary named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)
