"""What learns."""

from dataclasses import dataclass, field
from typing import Any

from lockstep.settings.check import check


@dataclass(frozen=True)
class VitSettings:
    """The vision transformer's size: about 12 times depth times the square of width parameters."""

    width: int = 128
    """Numbers in a token."""

    depth: int = 4
    """Layers."""

    num_heads: int = 4
    """Heads of attention in each layer."""

    patch_size: int = 7
    """Side of the patches, in pixels, that an image is cut into; the images' side must be a multiple of it."""

    dropout: float = 0.0
    """Probability of dropping a unit within the layers."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads", "patch_size"):
            check(getattr(self, name) >= 1, f"model.vit.{name}", getattr(self, name), "it must be at least 1")
        check(self.width % self.num_heads == 0, "model.vit.width", self.width, "it must be a multiple of num_heads")
        check(0 <= self.dropout < 1, "model.vit.dropout", self.dropout, "a probability below 1 is needed")


@dataclass(frozen=True)
class ModelSettings:
    """What learns."""

    name: str = "net"
    """net: the reference network, a convolutional one; vit: a vision transformer of any size (Dosovitskiy et al. 2021);
    resnet18 and every other classifier of torchvision.models; for ppo mlp or nature_cnn; or a network of your own
    by its name, my_package.MyNet."""

    options: dict[str, Any] = field(default_factory=dict)
    """What a network of torchvision's or of your own is made with, beside the shape of its inputs and outputs."""

    dropout1: float = 0.25
    """net: probability of dropping a channel after the convolutions."""

    dropout2: float = 0.5
    """net: probability of dropping a unit after the first linear layer."""

    mlp_widths: list[int] = field(default_factory=lambda: [64, 64])
    """mlp: units of each of its layers, of the policy and of the value function alike."""

    vit: VitSettings = field(default_factory=VitSettings)

    channels_last: bool = True
    """Keep images and filters with their channels innermost, which convolutions compute on fastest."""

    compile: bool = False
    """Compile the model with torch.compile: worth its first minute on GPUs and for models of many small layers."""

    def __post_init__(self) -> None:
        widths = self.mlp_widths
        check(bool(widths) and min(widths) >= 1, "model.mlp_widths", widths, "layers of at least one unit are needed")
        for name in ("dropout1", "dropout2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"model.{name}", value, "a probability of at least 0 and below 1 is needed")
