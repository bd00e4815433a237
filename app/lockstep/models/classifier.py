"""Build a classifier by name: the reference network, a vision transformer, torchvision's, or a user's own."""

from collections.abc import Iterator
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from lockstep.models.networks import LogProbabilities, net_blocks, vit_blocks
from lockstep.runtime.errors import SettingsError
from lockstep.runtime.importing import construct
from lockstep.settings import ModelSettings

Blocks = Iterator[tuple[str, nn.Module]]
Shape = tuple[int, int, int]
"""(channels, height, width) of an image."""


class Colours(nn.Module):
    """Repeats the channel of grey images (N, 1, height, width) three times, for networks that expect RGB."""

    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1)


def classifier_blocks(settings: ModelSettings, shape: Shape, num_classes: int) -> Blocks:
    """Build the network block by block, in order; its outputs are log-probabilities (N, num_classes).

    Raises:
        SettingsError: on every rank: the network is unknown, or does not fit images of `shape`.
    """
    try:
        if settings.name == "net":
            yield from net_blocks(settings.dropout1, settings.dropout2, shape, num_classes)
        elif settings.name == "vit":
            channels, height, width = shape
            if height != width:
                raise ValueError(f"it takes square images, and these are {height} x {width}")
            yield from vit_blocks(**asdict(settings.vit), image_size=height, channels=channels, num_classes=num_classes)
        elif "." in settings.name:
            yield "network", construct(settings.name, "model.name", nn.Module, shape, num_classes, **settings.options)
            yield "log_softmax", LogProbabilities()
        else:
            yield from _torchvision_blocks(settings, shape, num_classes)
    except SettingsError as error:
        raise error.as_shared() from None
    except (ValueError, TypeError) as error:
        raise SettingsError(f"model.name is {settings.name}: {error}").as_shared() from error


def _torchvision_blocks(settings: ModelSettings, shape: Shape, num_classes: int) -> Blocks:
    """Yield a ResNet block by block, so that a pipeline can cut it into stages; any other network as one block."""
    from torchvision import models  # imported here: it takes a second

    names = models.list_models(module=models)
    if settings.name not in names:
        near = ", ".join(["net", "vit", *get_close_matches(settings.name, names)])
        raise ValueError(
            f"there is no such network: {near}, another of torchvision.models or your own, my_package.MyNet"
        )
    options: dict[str, Any] = {"weights": None, "num_classes": num_classes, **settings.options}
    if settings.name in ("googlenet", "inception_v3"):  # without auxiliary outputs and their slow initialisation
        options |= {"aux_logits": False, "init_weights": False}
    network = models.get_model(settings.name, **options)
    if shape[0] == 1:
        yield "colours", Colours()
    if isinstance(network, models.ResNet):
        for name, block in network.named_children():
            if name == "fc":
                yield "flatten", nn.Flatten()
            yield name, block
    else:
        yield "network", network
    yield "log_softmax", LogProbabilities()
