"""A small data set of images, held whole as one tensor of bytes and normalised a batch at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lockstep.data.augmentation import augmented
from lockstep.data.sharding import Ids

Transform = Callable[[Tensor], Tensor]
Samples = tuple[Tensor, Tensor]
"""Inputs (n, channels, height, width), normalised, and labels (n,) int64."""


class LabelledImages(Protocol):
    """Images with labels, wherever they are."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image, as a model takes it."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """The names of the labels 0, 1, ..."""
        ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> "LabelledImages":
        """As a set whose batches are there."""
        ...

    def batches(self, ids: Iterable[Ids], dtype: torch.dtype, seed: tuple[int, ...] | None = None) -> Iterator[Samples]:
        """The samples of each of `ids`, one after the other.

        Args:
            seed: where they are augmented, of what is random in that, together with a sample's own id.
        """
        ...

    def pictures(self, ids: Ids) -> Tensor:
        """The samples `ids` (n,), as people look at them: (n, channels, height, width) uint8."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, all in memory.

    Attributes:
        images: (N, channels, height, width) uint8.
        labels: (N,) int64 in 0 ... num_classes - 1.
        num_classes: the number of classes.
        mean, std: by channel, or one for all: each pixel p in 0 ... 1 becomes (p - mean) / std.
        transform: what augments one image (channels, height, width) of bytes.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def classes(self) -> list[str]:
        return [str(index) for index in range(self.num_classes)]

    def to(self, device: torch.device) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(self, ids: Iterable[Ids], dtype: torch.dtype, seed: tuple[int, ...] | None = None) -> Iterator[Samples]:
        for of_batch in ids:
            chosen = torch.from_numpy(of_batch).to(self.labels.device)
            pixels = self.images[chosen]
            if self.transform is not None and seed is not None:
                rows = zip(pixels, of_batch.tolist(), strict=True)
                changed = [augmented(self.transform, image, (*seed, number)) for image, number in rows]
                pixels = torch.stack(changed) if changed else pixels
            yield normalised(pixels, self.mean, self.std, dtype), self.labels[chosen]

    def pictures(self, ids: Ids) -> Tensor:
        return self.images[torch.from_numpy(ids).to(self.images.device)]


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """`pixels` (n, channels, height, width) uint8 as numbers of `dtype`."""
    numbers = pixels.to(dtype).div_(255)
    if len(mean) == 1:
        return numbers.sub_(mean[0]).div_(std[0])
    by_channel = (torch.tensor(each, dtype=dtype, device=pixels.device).view(-1, 1, 1) for each in (mean, std))
    return numbers.sub_(next(by_channel)).div_(next(by_channel))
