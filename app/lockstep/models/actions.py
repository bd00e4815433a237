"""Action distributions as pure functions of a policy's outputs.

The noise of a sample is an argument, so that the caller can draw the same actions on any number of ranks.
"""

import math
from abc import ABC, abstractmethod

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep.runtime.errors import SettingsError


class Actions(ABC):
    """A distribution over actions, given by the outputs of a policy.

    Attributes:
        num_actions: number of discrete actions, or of components of a continuous one.
        num_outputs: number of policy outputs that parametrise the distribution.
    """

    num_actions: int
    num_outputs: int

    @abstractmethod
    def noise(self, generator: np.random.Generator, num_steps: int) -> NDArray[np.float64]:
        """Draw the noise (num_steps, num_actions) for `sample`."""

    @abstractmethod
    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Sample actions (n, ...) from `outputs` (n, num_outputs) and `noise` (n, num_actions)."""

    @abstractmethod
    def mode(self, outputs: Tensor) -> Tensor:
        """Return the most likely actions (n, ...)."""

    @abstractmethod
    def log_prob_and_entropy(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log-probability (n,) and entropy (n,) of `actions` (n, ...) under `outputs` (n, num_outputs)."""

    @abstractmethod
    def for_environments(self, actions: Tensor) -> NDArray[np.generic]:
        """Convert actions (n, ...) to the array that environments expect."""


class Categorical(Actions):
    """A categorical distribution over n discrete actions."""

    def __init__(self, space: gym.spaces.Discrete) -> None:
        self.num_actions = self.num_outputs = int(space.n)
        self._start = int(space.start)

    def noise(self, generator: np.random.Generator, num_steps: int) -> NDArray[np.float64]:
        return generator.gumbel(size=(num_steps, self.num_actions))

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Sample by the Gumbel-max trick (Maddison et al. 2014): the argmax of logits plus Gumbel noise."""
        return (outputs + noise).argmax(1)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    def log_prob_and_entropy(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        log_probabilities = outputs.log_softmax(1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(1)
        return log_probabilities.gather(1, actions[:, None]).squeeze(1), entropy

    def for_environments(self, actions: Tensor) -> NDArray[np.generic]:
        chosen: NDArray[np.generic] = actions.cpu().numpy() + self._start
        return chosen


class Gaussian(Actions):
    """Independent normal distributions over continuous actions, which are clipped to the bounds of the environment."""

    def __init__(self, space: gym.spaces.Box) -> None:
        self.num_actions = math.prod(space.shape)
        self.num_outputs = 2 * self.num_actions
        self._shape = space.shape
        self._low, self._high = space.low, space.high

    def noise(self, generator: np.random.Generator, num_steps: int) -> NDArray[np.float64]:
        return generator.standard_normal((num_steps, self.num_actions))

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = outputs.chunk(2, dim=1)
        return torch.addcmul(mean, log_std.exp(), noise)

    def mode(self, outputs: Tensor) -> Tensor:
        return outputs.chunk(2, dim=1)[0]

    def log_prob_and_entropy(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = outputs.chunk(2, dim=1)
        deviation = (actions - mean) * (-log_std).exp()
        log_prob = -(0.5 * deviation**2 + log_std + 0.5 * math.log(2 * math.pi)).sum(1)
        return log_prob, (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(1)

    def for_environments(self, actions: Tensor) -> NDArray[np.generic]:
        numbers = actions.cpu().numpy().reshape(-1, *self._shape)
        inside: NDArray[np.generic] = np.clip(numbers, self._low, self._high).astype(self._low.dtype)
        return inside


def build_actions(space: gym.Space) -> Actions:  # type: ignore[type-arg]
    """Build the distribution for an action space.

    Raises:
        SettingsError: the space is neither Discrete nor Box.
    """
    if isinstance(space, gym.spaces.Discrete):
        return Categorical(space)
    if isinstance(space, gym.spaces.Box):
        return Gaussian(space)
    raise SettingsError(
        f"the actions of the environment (env.id) are {space}: one of several (Discrete), or numbers (Box), are needed"
    )
