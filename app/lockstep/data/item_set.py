"""Images that are read on demand: folders of files, or a user's own data set.

Worker processes read ahead. They are started by forkserver and never load MPI: a fork of a rank would copy the state of
its MPI library, which does not survive that.
"""

import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lockstep.data.augmentation import augmented
from lockstep.data.image_set import Samples, normalised
from lockstep.data.sharding import Ids
from lockstep.runtime.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCHES_AHEAD = 4  # prefetched by each worker

Key = tuple[int, tuple[int, ...] | None]
"""A sample's number and the seed of its augmentation."""


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
            image, label = self.samples[number]
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
        self._keys.set([(number, seed) for number in batch_ids.tolist()] for batch_ids in ids)
        with _without_main():
            try:
                batches = iter(self._reader)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                raise DataError(
                    f"the data set cannot be pickled for its workers ({error}): define it at the top level of a "
                    "module, or read without workers: --data.num_workers 0"
                ) from error
        for batch in batches:
            images, labels = self._checked(batch)
            pixels = images.to(self.device, non_blocking=True)
            yield normalised(pixels, self.mean, self.std, dtype), labels.to(self.device, non_blocking=True)

    def pictures(self, ids: Ids) -> Tensor:
        return self._checked(_Collate(self.shape)([self.items[number, None] for number in ids.tolist()]))[0]

    @cached_property
    def _keys(self) -> "_Keys":
        return _Keys()

    @cached_property
    def _reader(self) -> DataLoader[Any]:
        """The one loader of the whole run, so that its worker processes persist."""
        several = self.num_workers > 0
        forkserver = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload([__name__, "torchvision.transforms.v2"])  # once, not in each worker
        return DataLoader(
            self.items,
            batch_sampler=self._keys,
            collate_fn=_Collate(self.shape),
            num_workers=self.num_workers,
            multiprocessing_context=forkserver if several else None,
            persistent_workers=several,
            prefetch_factor=BATCHES_AHEAD if several else None,
            pin_memory=self.device.type == "cuda",
        )

    def _checked(self, batch: tuple[Tensor, Tensor] | DataError) -> tuple[Tensor, Tensor]:
        if isinstance(batch, DataError):
            raise batch
        labels = batch[1]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(f"a label is {labels.tolist()}: they must lie in 0 ... {len(self.classes) - 1}")
        return batch


class _Keys:
    """A batch sampler whose batches are set anew for each pass over the loader."""

    def __init__(self) -> None:
        self._batches: Iterable[list[Key]] = ()

    def set(self, batches: Iterable[list[Key]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self._batches)


@dataclass(frozen=True)
class _Collate:
    """Stack samples to a batch, or return the first error among them instead."""

    shape: tuple[int, int, int]

    def __call__(self, items: Sequence[tuple[Tensor, int] | DataError]) -> tuple[Tensor, Tensor] | DataError:
        good = []
        for item in items:
            if isinstance(item, DataError):
                return item
            good.append(item)
        pixels = torch.stack([image for image, _ in good]) if good else torch.empty((0, *self.shape), dtype=torch.uint8)
        return pixels, torch.tensor([label for _, label in good], dtype=torch.int64)


@contextmanager
def _without_main() -> Iterator[None]:
    """Inside, worker processes start without importing the main program, which would join the job as a rank."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), main.__spec__
    try:
        main.__file__, main.__spec__ = None, None
        yield
    finally:
        main.__file__, main.__spec__ = file, spec


def _as_tensor(image: Any, channels: int) -> Tensor:
    from torchvision.transforms import v2

    if not isinstance(image, Tensor):
        image = v2.functional.pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))
    tensor: Tensor = image
    return tensor if len(tensor) == channels else tensor.expand(channels, -1, -1)
