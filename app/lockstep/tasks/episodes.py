"""Evaluation episodes: a fixed policy plays each from its seed to its end."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lockstep.settings import EnvSettings
from lockstep.tasks.environments import Environments

MAX_ENVS = 50  # environments of a rank that are played at a time
EVALUATION = 2**30  # the first seed of evaluations; training draws its own from 2^31, of which these are a handful
Generators = Sequence[np.random.Generator]
Act = Callable[[Any, Generators], Any]
"""A policy: actions (n, ...) for observations (n, ...), with one random generator for each episode."""


@dataclass(frozen=True)
class Episode:
    """The result of one whole episode."""

    seed: int
    total_reward: float
    length: int


@dataclass(frozen=True)
class Episodes:
    """The results of a policy's evaluation episodes.

    Attributes:
        episodes: in the order of their seeds.
    """

    episodes: tuple[Episode, ...]

    @staticmethod
    def of(ranks: Iterable[Sequence[Episode]]) -> "Episodes":
        return Episodes(tuple(episode for of_rank in ranks for episode in of_rank))

    @property
    def mean(self) -> float:
        return statistics.fmean(self._returns)

    @property
    def spread(self) -> float:
        """The standard deviation of the returns."""
        return statistics.stdev(self._returns) if len(self.episodes) > 1 else 0.0

    @property
    def scores(self) -> dict[str, float]:
        returns = self._returns
        return {
            "return": self.mean,
            "return_std": self.spread,
            "return_min": min(returns),
            "return_max": max(returns),
            "length": statistics.fmean(episode.length for episode in self.episodes),
        }

    @property
    def counts(self) -> dict[str, int]:
        return {"num_episodes": len(self.episodes)}

    @property
    def details(self) -> dict[str, Any]:
        return {"episodes": [asdict(episode) for episode in self.episodes]}

    @property
    def _returns(self) -> list[float]:
        return [episode.total_reward for episode in self.episodes]

    def __str__(self) -> str:
        scores = self.scores
        return (
            f"Return: {self.mean:.2f} +- {self.spread:.2f} in {len(self.episodes)} episodes "
            f"({scores['return_min']:.2f} ... {scores['return_max']:.2f}), of {scores['length']:.1f} steps on average"
        )


def play(act: Act, settings: EnvSettings, numbers: range) -> list[Episode]:
    """Play the episodes with these `numbers`. Each depends on its number alone, not on the others played with it.

    Raises:
        SettingsError: the environment cannot be made.
    """
    episodes: list[Episode] = []
    for first in range(numbers.start, numbers.stop, MAX_ENVS):
        seeds = [EVALUATION + number for number in range(first, min(first + MAX_ENVS, numbers.stop))]
        with closing(Environments(settings, len(seeds))) as environments:
            episodes += _play_at_once(act, environments, seeds)
    return episodes


def _play_at_once(act: Act, environments: Environments, seeds: Sequence[int]) -> list[Episode]:
    """Play one episode in each environment; the steps after its end are ignored."""
    observations, generators = environments.begin(seeds), [np.random.default_rng(seed) for seed in seeds]
    running = np.ones(len(seeds), dtype=bool)
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=int)
    while running.any():
        step = environments.step(act(observations, generators))
        observations = step.observations
        returns[running] += step.rewards[running]
        lengths[running] += 1
        running &= ~(step.terminated | step.truncated)
    return [Episode(*each) for each in zip(seeds, returns.tolist(), lengths.tolist(), strict=True)]
