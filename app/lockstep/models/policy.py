"""Policy networks, which map observations to the parameters of an action distribution and the value of the state.

Initial weights are orthogonal (Saxe et al. 2014), with a small gain in the last layer of the actor, so that the initial
policy is close to uniform.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod, sqrt
from typing import TypeVar

import torch
from torch import Tensor, nn

from lockstep.models.actions import Actions, Gaussian
from lockstep.runtime.errors import SettingsError
from lockstep.runtime.importing import construct
from lockstep.settings import ModelSettings

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class Heads(nn.Module):
    """The actor's and the critic's last layers.

    They map features (N, width) to the logits of discrete actions and the value, (N, num_actions + 1); or, for
    `gaussian` actions, to the means, the log standard deviations, which do not depend on the state, and the value,
    (N, 2 num_actions + 1).

    Args:
        actor, critic: layers of each before its last one.
        width: number of features that these layers give.
    """

    def __init__(self, actor: nn.Module, critic: nn.Module, width: int, num_actions: int, gaussian: bool) -> None:
        super().__init__()
        self.actor = nn.Sequential(actor, _orthogonal(nn.Linear(width, num_actions), gain=0.01))
        self.critic = nn.Sequential(critic, _orthogonal(nn.Linear(width, 1), gain=1.0))
        self.log_std = nn.Parameter(torch.zeros(num_actions)) if gaussian else None

    def forward(self, features: Tensor) -> Tensor:
        actions, values = self.actor(features), self.critic(features)
        if self.log_std is None:
            return torch.cat([actions, values], dim=1)
        return torch.cat([actions, self.log_std.expand_as(actions), values], dim=1)


class Pixels(nn.Module):
    """Scales bytes from 0 ... 255 to 0 ... 1."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels / 255


def policy_blocks(settings: ModelSettings, shape: Sequence[int], actions: Actions) -> Iterator[tuple[str, nn.Module]]:
    """Build the policy that the settings name block by block, in order, for observations (n, *shape).

    Raises:
        SettingsError: on every rank: the policy is unknown, or does not fit such observations.
    """
    gaussian = isinstance(actions, Gaussian)
    try:
        if settings.name == "mlp":
            yield from mlp_blocks(shape, actions.num_actions, gaussian, settings.mlp_widths)
        elif settings.name == "nature_cnn":
            yield from nature_cnn_blocks(shape, actions.num_actions, gaussian)
        elif "." in settings.name:
            yield (
                "policy",
                construct(settings.name, "model.name", nn.Module, shape, actions.num_outputs + 1, **settings.options),
            )
        else:
            raise ValueError("ppo takes mlp, nature_cnn or a policy of your own, my_package.MyPolicy")
    except SettingsError as error:
        raise error.as_shared() from None
    except (ValueError, TypeError) as error:
        raise SettingsError(f"model.name is {settings.name}: {error}").as_shared() from error


def mlp_blocks(
    shape: Sequence[int], num_actions: int, gaussian: bool, widths: Sequence[int]
) -> Iterator[tuple[str, nn.Module]]:
    """Build separate actor and critic networks of tanh layers of `widths` units (Schulman et al. 2017, section 6.1)."""
    yield "flatten", nn.Flatten()
    actor, critic = _layers(prod(shape), widths), _layers(prod(shape), widths)
    yield "heads", Heads(actor, critic, widths[-1], num_actions, gaussian)


def nature_cnn_blocks(shape: Sequence[int], num_actions: int, gaussian: bool) -> Iterator[tuple[str, nn.Module]]:
    """Build the network of Mnih et al. 2015 with actor and critic heads, for uint8 images (channels, height, width).

    Raises:
        ValueError: the observations are not images, or too small.
    """
    if len(shape) != 3:
        raise ValueError(f"it takes images, and observations are {tuple(shape)}: use mlp")
    yield "pixels", Pixels()
    channels, side = shape[0], list(shape[1:])
    for index, (filters, size, stride) in enumerate(((32, 8, 4), (64, 4, 2), (64, 3, 1)), start=1):
        side = [(length - size) // stride + 1 for length in side]
        if min(side) < 1:
            raise ValueError("images of at least 36 x 36 are needed")
        yield f"conv{index}", _orthogonal(nn.Conv2d(channels, filters, size, stride))
        yield f"relu{index}", nn.ReLU()
        channels = filters
    yield "flatten", nn.Flatten()
    yield "fc", _orthogonal(nn.Linear(channels * prod(side), 512))
    yield "relu4", nn.ReLU()
    yield "heads", Heads(nn.Identity(), nn.Identity(), 512, num_actions, gaussian)


def _layers(width: int, widths: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise((width, *widths)):
        layers += [_orthogonal(nn.Linear(before, after)), nn.Tanh()]
    return nn.Sequential(*layers)


def _orthogonal(layer: Layer, gain: float = sqrt(2)) -> Layer:
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
