"""Image augmentation with torchvision's transforms (v2).

The random numbers of a transform depend on (seed, epoch, sample) alone, so an image is augmented in the same way on any
rank and after a resume.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.data.sharding import content_hash
from lockstep.settings.data import Augmentation

RESIZED = 256 / 224  # resized side over cropped side, for the centre crop of an evaluation (Krizhevsky et al. 2012)


def build_augmentation(kind: Augmentation, size: tuple[int, int]) -> Callable[[Any], Tensor] | None:
    """Build the augmentation of training images, from any size to `size` (height, width); None for `kind` none."""
    if kind == "none":
        return None
    from torchvision.transforms import v2  # imported here: it takes a second

    padding = [max(1, side // 8) for side in size]
    transforms: list[Any] = {
        "shift": [v2.Resize(size), v2.RandomCrop(size, padding=[padding[1], padding[0]])],
        "crop_flip": [
            v2.Resize(size),
            v2.RandomCrop(size, padding=[padding[1], padding[0]]),
            v2.RandomHorizontalFlip(),
        ],
        "resized_crop": [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()],
    }[kind]
    chain: Callable[[Any], Tensor] = v2.Compose(transforms)
    return chain


def build_centre(size: tuple[int, int], enlarged: float) -> Callable[[Any], Tensor]:
    """Build the transform without chance: resize to `enlarged` times `size` (height, width), then crop the centre."""
    from torchvision.transforms import v2

    resize = v2.Resize(round(max(size) * enlarged), antialias=True)
    centre: Callable[[Any], Tensor] = v2.Compose([resize, v2.CenterCrop(size)])
    return centre


def augmented(transform: Callable[[Any], Tensor], image: Any, seed: tuple[int, ...]) -> Tensor:
    """Apply a random `transform` to `image` with the random numbers of `seed`."""
    torch.default_generator.manual_seed(int(content_hash(seed)[:15], 16))
    return transform(image)
