"""The reference network, a convolutional one (reference, section 5.2)."""

from collections import OrderedDict
from collections.abc import Iterator

from torch import nn

from lockstep.models.log_probabilities import LogProbabilities


def net_blocks(
    dropout1: float = 0.25, dropout2: float = 0.5, shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10
) -> Iterator[tuple[str, nn.Module]]:
    """Build the blocks of `Net`, in order, for images of any `shape` (channels, height, width).

    Raises:
        ValueError: the images are too small.
    """
    channels, height, width = shape
    if min(height, width) < 6:
        raise ValueError(f"it takes images of 6 x 6 or more, and these are {height} x {width}")
    yield "conv1", nn.Conv2d(channels, 32, 3, 1)
    yield "relu1", nn.ReLU()
    yield "conv2", nn.Conv2d(32, 64, 3, 1)
    yield "pool", nn.MaxPool2d(2)
    yield "dropout1", nn.Dropout2d(dropout1)
    yield "flatten", nn.Flatten()
    yield "fc1", nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
    yield "relu2", nn.ReLU()
    yield "dropout2", nn.Dropout(dropout2)
    yield "fc2", nn.Linear(128, num_classes)
    yield "log_softmax", LogProbabilities()


class Net(nn.Sequential):
    """Two convolutions and two linear layers: (N, 1, 28, 28) images to (N, 10) log-probabilities; 1,199,882 parameters.

    Args:
        dropout1: probability of dropping a channel after the convolutions.
        dropout2: probability of dropping a unit after the first linear layer. The reference uses `Dropout2d`
            here too, which for inputs (N, units) is deprecated in PyTorch and does the same as `Dropout`.
    """

    def __init__(self, dropout1: float = 0.25, dropout2: float = 0.5) -> None:
        super().__init__(OrderedDict(net_blocks(dropout1, dropout2)))
