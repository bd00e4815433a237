"""Images that are read on demand: folders of files, or a user's own data set."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lockstep.data.augmentation import augmented
from lockstep.data.image_set import Samples, normalised
from lockstep.data.item_reader import ItemReader, Key, raise_if_error
from lockstep.data.sharding import Ids
from lockstep.data.tree_set import seeded
from lockstep.runtime.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Items(Dataset[tuple[Tensor, int] | DataError]):
    """The samples of a map-style data set as uint8 images of one size.

    Args:
        samples: maps 0 ... len - 1 to (a PIL image or a uint8 tensor (channels, height, width), its label).
        augment, centre: transform an image to the common size, with and without random augmentation.
        describe: names a sample in error messages.
    """

    def __init__(
        self,
        samples: Any,
        augment: Callable[[Any], Tensor] | None,
        centre: Callable[[Any], Tensor],
        channels: int,
        describe: Callable[[int], str],
    ) -> None:
        self.samples = samples
        self.channels = channels
        self._augment = augment
        self._centre = centre
        self._describe = describe

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | DataError:
        """Return the image and its label, or the error: a DataLoader would re-raise another one, with a traceback."""
        number, seed = key
        try:
            with seeded((*(seed or ()), number)):
                image, label = image_and_label(self.samples[number])
            tensor = _as_tensor(image, self.channels)
            if seed is None or self._augment is None:
                return self._centre(tensor), int(label)
            return augmented(self._augment, tensor, (*seed, number)), int(label)
        except Exception as error:  # a decoder or a user's data set may raise anything
            return DataError(f"{self._describe(number)} cannot be used ({type(error).__name__}: {error})")


@dataclass(frozen=True)
class ItemSet:
    """Labelled images that are read on demand (see `LabelledImages`).

    Attributes:
        num_workers: processes that read ahead; with 0 the rank reads its images itself.
        mean, std: one value for each channel, or one for all.
    """

    items: Items
    shape: tuple[int, int, int]
    classes: Sequence[str]
    num_workers: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.items)

    def to(self, device: torch.device) -> "ItemSet":
        return ItemSet(self.items, self.shape, self.classes, self.num_workers, self.mean, self.std, device)

    def batches(self, ids: Iterable[Ids], dtype: torch.dtype, seed: tuple[int, ...] | None = None) -> Iterator[Samples]:
        """Yield one batch of samples for each array in `ids`.

        Raises:
            DataError: a sample cannot be read; the message names it.
        """
        for batch in self._reader.read(ids, seed):
            images, labels = self._checked(batch)
            pixels = images.to(self.device, non_blocking=True)
            yield normalised(pixels, self.mean, self.std, dtype), labels.to(self.device, non_blocking=True)

    def pictures(self, ids: Ids) -> Tensor:
        items = [raise_if_error(self.items[number, None]) for number in ids.tolist()]
        return self._checked(_Collate(self.shape)(items))[0]

    @cached_property
    def _reader(self) -> ItemReader:
        return ItemReader(self.items, _Collate(self.shape), self.num_workers, self.device.type == "cuda")

    def _checked(self, batch: Samples) -> Samples:
        labels = batch[1]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(f"a label is {labels.tolist()}: they must lie in 0 ... {len(self.classes) - 1}")
        return batch


@dataclass(frozen=True)
class _Collate:
    """Stack images and labels to a batch, which may be empty."""

    shape: tuple[int, int, int]

    def __call__(self, items: Sequence[tuple[Tensor, int]]) -> Samples:
        images, labels = [image for image, _ in items], [label for _, label in items]
        pixels = torch.stack(images) if images else torch.empty((0, *self.shape), dtype=torch.uint8)
        return pixels, torch.tensor(labels, dtype=torch.int64)


@dataclass(frozen=True)
class ImageFiles:
    """The images in files, as a map-style data set.

    Attributes:
        names: of the files, below `folder`.
    """

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Any:
        from PIL import Image

        return Image.open(self.folder / self.names[number])

    def describe(self, number: int) -> str:
        return str(self.folder / self.names[number])


@dataclass(frozen=True)
class WithoutLabels:
    """The images of a map-style data set whose items may lack a label, each with the label 0."""

    samples: Any

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return image_of(self.samples[number]), 0


def image_and_label(item: Any) -> tuple[Any, Any]:
    """Return the image and the label of a data set's item: a pair, or Hugging Face's dictionary of both."""
    if isinstance(item, Mapping):
        return image_of(item), item["label" if "label" in item else "labels"]
    image, label = item
    return image, label


def image_of(item: Any) -> Any:
    """Return the image of a data set's item, which may have a label."""
    if isinstance(item, Mapping):
        return item[next(name for name in ("image", "img", "pixel_values", *item) if name in item)]
    return item[0] if isinstance(item, tuple | list) else item


def _as_tensor(image: Any, channels: int) -> Tensor:
    from torchvision.transforms import v2

    if not isinstance(image, Tensor):
        image = v2.functional.pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    tensor: Tensor = image
    return tensor if len(tensor) == channels else tensor.expand(channels, -1, -1)
