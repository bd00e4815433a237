"""The 60,000 + 10,000 digits of MNIST through torchvision, which downloads them once."""

import contextlib
import io
from pathlib import Path

from app.cluster.failure import DataError
from app.data.image_set import ImageSet

DAMAGES = (AssertionError, ValueError, KeyError, EOFError)  # what torchvision raises over files that are not MNIST's
FILES = tuple(f"{part}-{kind}.gz" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


def download_mnist(root: Path) -> None:
    """Fetch MNIST into `root`/MNIST unless it is there. One rank calls this while the others wait.

    Raises:
        DataError: it cannot be fetched, or the folder cannot be written.
    """
    from torchvision.datasets import MNIST  # a second of import that only this data set needs

    raw = root.absolute() / "MNIST" / "raw"
    if all((raw / file.removesuffix(".gz")).exists() for file in FILES):
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its own progress bar and one complaint a mirror
            MNIST(str(root), download=True)
    except (OSError, RuntimeError, *DAMAGES) as error:
        raise DataError(
            f"MNIST is not in {raw} and cannot be downloaded ({_first_line(error)}). Copy its four files "
            f"({', '.join(FILES)}) there from a machine that has a network, or train on the 5,000 digits that are "
            "already here: --data.name digits"
        ) from error


def load_mnist(root: Path, train: bool) -> ImageSet:
    """The training or the test digits.

    Raises:
        DataError: they are not in `root` or damaged; on a cluster, `root` must be a folder that all nodes share.
    """
    from torchvision.datasets import MNIST

    try:
        mnist = MNIST(str(root), train=train)
    except (OSError, RuntimeError, *DAMAGES) as error:
        raise DataError(
            f"MNIST cannot be read in {root.absolute() / 'MNIST'} ({_first_line(error)}). Set --data.root to a folder "
            "that all nodes share; if the files are there, they are damaged: delete that folder and try again"
        ) from error
    return ImageSet(mnist.data.unsqueeze(1), mnist.targets, num_classes=10)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
