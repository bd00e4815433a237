"""Settings of the model."""

from dataclasses import dataclass, field
from typing import Any

from lockstep.runtime.errors import check


@dataclass(frozen=True)
class VitSettings:
    """The size of the vision transformer: about 12 x depth x width^2 parameters."""

    width: int = 128
    """Number of features of a token."""

    depth: int = 4
    """Number of layers."""

    num_heads: int = 4
    """Number of attention heads in each layer."""

    patch_size: int = 7
    """Side of the patches in pixels; the side of the images must be a multiple of it."""

    dropout: float = 0.0
    """Dropout probability within the layers."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads", "patch_size"):
            check(getattr(self, name) >= 1, f"model.vit.{name}", getattr(self, name), "it must be at least 1")
        check(self.width % self.num_heads == 0, "model.vit.width", self.width, "it must be a multiple of num_heads")
        check(0 <= self.dropout < 1, "model.vit.dropout", self.dropout, "a probability below 1 is needed")


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    name: str = "net"
    """net: the reference network, a small convolutional one; vit: a vision transformer (Dosovitskiy et al. 2021);
    resnet18 or any other classifier of torchvision.models; for ppo mlp or nature_cnn; or a network of your own,
    my_package.MyNet."""

    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments for making a network of torchvision or of your own."""

    dropout1: float = 0.25
    """net: dropout probability of channels after the convolutions."""

    dropout2: float = 0.5
    """net: dropout probability after the first linear layer."""

    mlp_widths: list[int] = field(default_factory=lambda: [64, 64])
    """mlp: units of the hidden layers, for actor and critic alike."""

    vit: VitSettings = field(default_factory=VitSettings)

    channels_last: bool = True
    """Store images and filters in channels-last memory format, in which convolutions are fastest."""

    compile: bool = False
    """Compile the model with torch.compile: worth its first minute on GPUs and for models of many small layers."""

    def __post_init__(self) -> None:
        widths = self.mlp_widths
        check(bool(widths) and min(widths) >= 1, "model.mlp_widths", widths, "layers of at least one unit are needed")
        for name in ("dropout1", "dropout2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"model.{name}", value, "a probability of at least 0 and below 1 is needed")
