"""The networks that classify, each an ordered list of named blocks: the reference's, a convolutional one (reference,
section 5.2), and the vision transformer, a model of any size (Dosovitskiy et al. 2021, section 3.1).
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class LogProbabilities(nn.Module):
    """The last block of each: log-softmax of scores (N, classes), in float32 if they are bfloat16, as autocast does."""

    def forward(self, scores: Tensor) -> Tensor:
        return (scores.float() if scores.dtype == torch.bfloat16 else scores).log_softmax(1)


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


class Patches(nn.Module):
    """Maps images (N, channels, size, size) to tokens (N, 1 + patches, width): a class token, then one for each patch,
    all with learned position embeddings (equation 1)."""

    def __init__(self, image_size: int, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (image_size // patch_size) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.projection(images).flatten(2).transpose(1, 2)
        # Not len(images), which tracing would turn into a constant.
        return torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1) + self.positions


class ClassToken(nn.Module):
    """Selects the class token of tokens (N, tokens, width) and normalises it, (N, width) (equation 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.norm(tokens[:, 0])
        return output


def vit_blocks(
    width: int,
    depth: int,
    num_heads: int,
    patch_size: int,
    dropout: float,
    image_size: int = 28,
    channels: int = 1,
    num_classes: int = 10,
) -> Iterator[tuple[str, nn.Module]]:
    """Build the vision transformer block by block, in order; it has about 12 `depth` `width`^2 parameters.

    Raises:
        ValueError: the image size is not a multiple of the patch size.
    """
    if image_size % patch_size:
        raise ValueError(f"model.vit.patch_size is {patch_size}: the images' side, {image_size}, must be a multiple")
    yield "patches", Patches(image_size, channels, patch_size, width)
    for index in range(depth):
        yield (
            f"layer{index}",
            nn.TransformerEncoderLayer(
                width, num_heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            ),
        )
    yield "class_token", ClassToken(width)
    yield "head", nn.Linear(width, num_classes)
    yield "log_softmax", LogProbabilities()
