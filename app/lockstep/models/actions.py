"""Distributions over actions, as pure functions of what a policy gives. Noise comes from outside, so that what is drawn
is the same on any number of ranks.
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
    """
    Attributes:
        num_actions: how many there are to choose from, or numbers in one.
        num_outputs: numbers of a policy that stand for a distribution.
    """

    num_actions: int
    num_outputs: int

    @abstractmethod
    def noise(self, generator: np.random.Generator, num_steps: int) -> NDArray[np.float64]:
        """(num_steps, num_actions): what `sample` takes."""

    @abstractmethod
    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Actions (n, ...) from `outputs` (n, num_outputs) and `noise` (n, num_actions)."""

    @abstractmethod
    def mode(self, outputs: Tensor) -> Tensor:
        """The likeliest actions (n, ...)."""

    @abstractmethod
    def log_prob_and_entropy(self, outputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Of `actions` (n, ...) under `outputs` (n, num_outputs): (n,) and (n,)."""

    @abstractmethod
    def for_environments(self, actions: Tensor) -> NDArray[np.generic]:
        """As environments take them."""


class Categorical(Actions):
    """One of n."""

    def __init__(self, space: gym.spaces.Discrete) -> None:
        self.num_actions = self.num_outputs = int(space.n)
        self._start = int(space.start)

    def noise(self, generator: np.random.Generator, num_steps: int) -> NDArray[np.float64]:
        return generator.gumbel(size=(num_steps, self.num_actions))

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """The Gumbel-max trick (Maddison et al. 2014): the largest of logits plus Gumbel noise is distributed as they
        say.
        """
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
    """Numbers, each by a normal distribution of its own; environments take them cut to their bounds, -1 ... 1."""

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
    """
    Raises:
        SettingsError: there is no distribution for such actions.
    """
    if isinstance(space, gym.spaces.Discrete):
        return Categorical(space)
    if isinstance(space, gym.spaces.Box):
        return Gaussian(space)
    raise SettingsError(
        f"the actions of the environment (env.id) are {space}: one of several (Discrete), or numbers (Box), are needed"
    )
