"""What is done to an image before a model learns from it: torchvision's transforms (v2).

What they draw is a function of (seed, epoch, sample): an image is changed in the same way on whichever rank it is, and
after a resume.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.data.sharding import content_hash
from lockstep.settings.data import Augmentation

RESIZED = 256 / 224  # of an image's side, before its centre is cut out for an evaluation (Krizhevsky et al. 2012)


def build_augmentation(kind: Augmentation, size: tuple[int, int]) -> Callable[[Any], Tensor] | None:
    """An image of any size, which comes out with `size` (height, width)."""
    if kind == "none":
        return None
    from torchvision.transforms import v2  # a second of import that only this needs

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
    """The middle of an image of any size, `enlarged` beyond `size`: for evaluations, and where nothing is drawn."""
    from torchvision.transforms import v2

    resize = v2.Resize(round(max(size) * enlarged), antialias=True)
    centre: Callable[[Any], Tensor] = v2.Compose([resize, v2.CenterCrop(size)])
    return centre


def augmented(transform: Callable[[Any], Tensor], image: Any, seed: tuple[int, ...]) -> Tensor:
    """`image`, changed by what `seed` draws."""
    torch.default_generator.manual_seed(int(content_hash(seed)[:15], 16))
    return transform(image)
