"""The vision transformer (Dosovitskiy et al. 2021, section 3.1): a model of any size."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lockstep.models.log_probabilities import LogProbabilities


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
    """Build the network block by block, in order; it has about 12 `depth` `width`^2 parameters.

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
