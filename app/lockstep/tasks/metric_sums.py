"""Metrics as exact sums, which are added up over samples, updates and ranks before anything is divided."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lockstep.runtime.errors import UserCodeError

Number = Tensor | float
Metric = tuple[Number, Number] | Tensor
"""A mean as (sum, weight), or counts of any shape, such as a confusion matrix, which are added up."""


@dataclass(frozen=True)
class MetricLayout:
    """Where each metric lies in one vector of sums, which is equal on all ranks.

    Attributes:
        shapes: of each metric's counts; None for a mean.
    """

    shapes: Mapping[str, tuple[int, ...] | None]

    @staticmethod
    def of(metrics: Mapping[str, Metric]) -> "MetricLayout":
        """Find the layout of what a task has computed for one batch."""
        shapes = {name: None if isinstance(value, tuple) else tuple(value.shape) for name, value in metrics.items()}
        return MetricLayout(shapes)

    @property
    def size(self) -> int:
        """Number of sums."""
        return sum(self._sizes())

    def pack(self, metrics: Mapping[str, Metric], device: torch.device) -> Tensor:
        """Put metrics into one vector (size,) float64.

        Raises:
            UserCodeError: they are not those of the layout.
        """
        if (found := MetricLayout.of(metrics)) != self:
            raise UserCodeError(f"the metrics of a batch are {found.shapes}, and were {self.shapes}: all need the same")
        values = [metrics[name] for name in self.shapes]  # in this order, whatever order a batch has them in
        numbers = [number for value in values for number in (value if isinstance(value, tuple) else (value,))]
        return torch.cat([_vector(number, device) for number in numbers])

    def unpack(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return the means by name, without those of weight 0, and the counts by name.

        Args:
            sums: (size,) float64 on the CPU.
        """
        means: dict[str, float] = {}
        counts: dict[str, Tensor] = {}
        for (name, shape), part in zip(self.shapes.items(), sums.split(self._sizes()), strict=True):
            if shape is not None:
                counts[name] = part.view(shape)
            elif part[1]:
                means[name] = float(part[0] / part[1])
        return means, counts

    def _sizes(self) -> list[int]:
        return [2 if shape is None else torch.Size(shape).numel() for shape in self.shapes.values()]


def check_metrics(metrics: Any, name: str) -> dict[str, Metric]:
    """Check what a user's method has returned.

    Raises:
        UserCodeError: it is no dictionary of means and counts.
    """
    if not isinstance(metrics, Mapping):
        raise UserCodeError(f"{name} must return a dictionary of metrics, and returned {type(metrics).__name__}")
    for metric, value in metrics.items():
        is_mean = isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))
        if not is_mean and not isinstance(value, Tensor):
            message = f"{name} must give {metric} as (sum, weight), two numbers, or as a tensor of counts"
            raise UserCodeError(f"{message}, and gave {value!r}")
    return {str(metric): value for metric, value in metrics.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _vector(number: Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().to(device, torch.float64).reshape(-1)
    return torch.full((1,), number, dtype=torch.float64, device=device)  # as_tensor would wait for a GPU
