"""The 60,000 + 10,000 digits of MNIST through torchvision, which downloads them once."""

import contextlib
import io
from pathlib import Path

from app.cluster.failure import DataError
from app.data.image_set import ImageSet

FILES = tuple(f"{part}-{kind}.gz" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))


def download_mnist(root: Path) -> None:
    """Fetch MNIST into `root`/MNIST unless it is there. One rank calls this while the others wait.

    Raises:
        DataError: it cannot be fetched, or the folder cannot be written.
    """
    from torchvision.datasets import MNIST  # a second of import that only this data set needs

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its own progress bar and one complaint a mirror
            MNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"MNIST is not in {root.absolute()} and cannot be downloaded ({str(error).splitlines()[0]}). Copy its four "
            f"files ({', '.join(FILES)}) into {root.absolute() / 'MNIST' / 'raw'} from a machine that has a network, "
            "or train on the 5,000 digits that are already here: --data.name digits"
        ) from error


def load_mnist(root: Path, train: bool) -> ImageSet:
    """The training or the test digits.

    Raises:
        DataError: they are not in `root`; on a cluster, `root` must be a folder that all nodes share.
    """
    from torchvision.datasets import MNIST

    try:
        mnist = MNIST(str(root), train=train)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"MNIST cannot be read in {root.absolute()} ({str(error).splitlines()[0]}). "
            "Set --data.root to a folder that all nodes share"
        ) from error
    return ImageSet(mnist.data.unsqueeze(1), mnist.targets, num_classes=10)
