"""One rank's part of what an optimizer step learns from."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples; a task adds what it needs to know of them, as tensors or arrays with a row for each.

    Attributes:
        inputs: (n, ...) of the model; n may be 0 where a ragged batch has fewer samples than ranks.
        global_size: samples of all ranks.
    """

    inputs: Tensor
    global_size: int

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Tensor, global_size: int) -> Self:
        """The samples in these `rows` (k,), where all ranks together take `global_size`."""
        chosen: dict[str, Any] = {
            item.name: value[rows] for item in fields(self) if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **{**chosen, "global_size": global_size})

    def split(self, num_pieces: int, allow_empty: bool = False) -> list[Self]:
        """Up to `num_pieces` pieces of this rank's part, of nearly equal size; none is empty unless all of it is.

        With `allow_empty` as many as asked for: the same number on every rank, where a piece is a collective.
        """
        if not allow_empty:
            num_pieces = max(1, min(num_pieces, len(self)))
        if num_pieces == 1:
            return [self]
        rows = {item.name: getattr(self, item.name) for item in fields(self)}
        cut: dict[str, Any] = {
            name: torch.tensor_split(value, num_pieces)
            if isinstance(value, Tensor)
            else np.array_split(value, num_pieces)
            for name, value in rows.items()
            if isinstance(value, Tensor | np.ndarray)
        }
        return [
            replace(self, **{name: of_pieces[piece] for name, of_pieces in cut.items()}) for piece in range(num_pieces)
        ]
