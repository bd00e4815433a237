"""A data set of images in memory: one uint8 tensor, normalised batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lockstep.data.augmentation import augmented
from lockstep.data.sharding import Ids
from lockstep.data.tree_set import DataSet

Transform = Callable[[Tensor], Tensor]
Samples = tuple[Tensor, Tensor]
"""Normalised inputs (n, channels, height, width) and labels (n,) int64."""


class LabelledImages(DataSet, Protocol):
    """The interface of a labelled image data set, in memory or on disk."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the model's input images."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """The class names of the labels 0, 1, ..."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """One value for each channel, or one for all: a pixel p in 0 ... 1 becomes (p - mean) / std."""
        ...

    @property
    def std(self) -> tuple[float, ...]: ...

    def to(self, device: torch.device) -> "LabelledImages":
        """Return the data set with its batches on `device`."""
        ...

    def batches(self, ids: Iterable[Ids], dtype: torch.dtype, seed: tuple[int, ...] | None = None) -> Iterator[Samples]:
        """Yield inputs and labels for each array in `ids`; with a `seed`, augmented."""
        ...

    def pictures(self, ids: Ids) -> Tensor:
        """Return the samples `ids` (n,) for display, without normalisation: (n, channels, height, width) uint8."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory (see `LabelledImages`).

    Attributes:
        images: (N, channels, height, width) uint8.
        labels: (N,) int64 in 0 ... num_classes - 1.
        num_classes: the number of classes.
        mean, std: one value for each channel or one for all: a pixel p in 0 ... 1 becomes (p - mean) / std.
        transform: augments one uint8 image (channels, height, width); None for no augmentation.
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
        for batch_ids in ids:
            chosen = torch.from_numpy(batch_ids).to(self.labels.device)
            pixels = self.images[chosen]
            if self.transform is not None and seed is not None:
                rows = zip(pixels, batch_ids.tolist(), strict=True)
                changed = [augmented(self.transform, image, (*seed, number)) for image, number in rows]
                pixels = torch.stack(changed) if changed else pixels
            yield normalised(pixels, self.mean, self.std, dtype), self.labels[chosen]

    def pictures(self, ids: Ids) -> Tensor:
        return self.images[torch.from_numpy(ids).to(self.images.device)]


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Scale uint8 `pixels` (n, channels, height, width) to 0 ... 1, normalise them, and return them as `dtype`."""
    numbers = pixels.to(dtype).div_(255)
    if len(mean) == 1:
        return numbers.sub_(mean[0]).div_(std[0])
    by_channel = (torch.tensor(each, dtype=dtype, device=pixels.device).view(-1, 1, 1) for each in (mean, std))
    return numbers.sub_(next(by_channel)).div_(next(by_channel))
