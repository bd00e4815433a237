"""Small data sets that torchvision downloads once and that fit in memory: MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100.

CIFAR's files are pickles. torchvision checks their MD5, then opens them again to unpickle them. Their owner could
change them between the two, so the unpickler here accepts nothing but arrays.
"""

import contextlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lockstep.data.image_set import ImageSet
from lockstep.runtime.errors import DataError

DAMAGES = (
    AssertionError,
    ValueError,
    KeyError,
    EOFError,
    pickle.UnpicklingError,
)  # what torchvision raises for damaged files
ARRAYS = {
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "_codecs.encode",
}
MNIST_FILES = tuple(
    f"{part}-{kind}.gz" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
)


@dataclass(frozen=True)
class Download:
    """A data set that torchvision can download.

    Attributes:
        published: its class in torchvision.datasets.
        folder: where its files lie, below `data.root`.
        files: the files to copy there by hand if there is no network.
        mean, std: of its pixels, by channel; for MNIST the 0.5 of the reference.
    """

    published: str
    folder: str
    files: tuple[str, ...]
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)


DOWNLOADS = {
    "mnist": Download("MNIST", "MNIST/raw", MNIST_FILES),
    "fashion_mnist": Download("FashionMNIST", "FashionMNIST/raw", MNIST_FILES, (0.2860,), (0.3530,)),
    "cifar10": Download("CIFAR10", "", ("cifar-10-python.tar.gz",), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Download(
        "CIFAR100", "", ("cifar-100-python.tar.gz",), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
}


def download(name: str, root: Path) -> None:
    """Download the data set into `root` unless it is there. One rank calls this while the others wait.

    Raises:
        DataError: it cannot be fetched, or the folder cannot be written.
    """
    known = DOWNLOADS[name]
    folder = root.absolute() / known.folder
    if known.files is MNIST_FILES and all((folder / file.removesuffix(".gz")).exists() for file in known.files):
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hides the progress bar and failed mirrors
            _published(known)(str(root), download=True)
    except (OSError, RuntimeError, *DAMAGES) as error:
        raise DataError(
            f"{known.published} is not in {folder} and cannot be downloaded ({_first_line(error)}). Copy "
            f"{', '.join(known.files)} there from a machine that has a network, or train on the 5,000 digits that are "
            "already here: --data.name digits"
        ) from error


def load(name: str, root: Path, train: bool) -> ImageSet:
    """Load the training or test images of a downloaded data set into memory.

    Raises:
        DataError: the files in `root`, which all nodes must share, are missing or damaged.
    """
    known = DOWNLOADS[name]
    try:
        found = _published(known)(str(root), train=train)
    except (OSError, RuntimeError, *DAMAGES) as error:
        raise DataError(
            f"{known.published} cannot be read in {root.absolute() / known.folder} ({_first_line(error)}). Set "
            "--data.root to a folder that all nodes share; if the files are there, they are damaged: delete that "
            "folder and try again"
        ) from error
    images, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, labels, len(found.classes), known.mean, known.std)


class _Arrays(pickle.Unpickler):
    """An unpickler of numbers, strings, lists and NumPy arrays that refuses to import anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in ARRAYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it imports {module}.{name}, which CIFAR's files do not need")


def _published(known: Download) -> Any:
    from torchvision import datasets  # imported here: it takes a second

    datasets.cifar.pickle = SimpleNamespace(load=lambda file, encoding: _Arrays(file, encoding=encoding).load())
    return getattr(datasets, known.published)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
