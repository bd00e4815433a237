"""One rank's samples of an optimizer step."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """This rank's samples of a global batch. Tasks subclass it and add tensors or arrays with one row for each sample.

    Attributes:
        inputs: (n, ...), the model's inputs; n may be 0 if a ragged last batch has fewer samples than there are ranks.
        global_size: number of samples over all ranks.
    """

    inputs: Tensor
    global_size: int

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Tensor, global_size: int) -> Self:
        """Select the samples in `rows` (k,); all ranks together select `global_size`."""
        chosen: dict[str, Any] = {
            item.name: value[rows] for item in fields(self) if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **{**chosen, "global_size": global_size})

    def split(self, num_parts: int, allow_empty: bool = False) -> list[Self]:
        """Split this rank's samples into up to `num_parts` micro-batches of nearly equal size; only an empty batch
        gives an empty one.

        With `allow_empty` exactly `num_parts`, some of which may be empty: for strategies whose forward pass is a
        collective, which every rank must enter equally often.
        """
        if not allow_empty:
            num_parts = max(1, min(num_parts, len(self)))
        if num_parts == 1:
            return [self]
        rows = {item.name: getattr(self, item.name) for item in fields(self)}
        cut: dict[str, Any] = {
            name: torch.tensor_split(value, num_parts)
            if isinstance(value, Tensor)
            else np.array_split(value, num_parts)
            for name, value in rows.items()
            if isinstance(value, Tensor | np.ndarray)
        }
        return [replace(self, **{name: values[part] for name, values in cut.items()}) for part in range(num_parts)]
