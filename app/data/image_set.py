"""A small data set of images, held whole as one tensor of bytes and normalised a batch at a time."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: (N, channels, height, width) uint8.
        labels: (N,) int64 in 0 ... num_classes - 1.
        num_classes: the number of classes.
        mean, std: each pixel p in 0 ... 1 becomes (p - mean) / std; the seed's are 0.5 and 0.5.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: float = 0.5
    std: float = 0.5

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batch(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The images `ids` (n,), normalised, (n, channels, height, width) of `dtype`, and their labels (n,)."""
        pixels = self.images[ids].to(dtype)
        return pixels.div_(255).sub_(self.mean).div_(self.std), self.labels[ids]
