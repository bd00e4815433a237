"""Where an agent acts, and how it learns from that: settings of `task: ppo`."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.settings.check import check


@dataclass(frozen=True)
class EnvSettings:
    """The environments that an agent acts in."""

    id: str = "CartPole-v1"
    """Of Gymnasium, ALE/... or of highway-env; my_package:MyEnv-v0 to import a package that registers it; or a class by
    its name, my_package.MyEnv."""

    options: dict[str, Any] = field(default_factory=dict)
    """What the environment is made with, beside its own defaults."""

    num_envs: int = 8
    """Environments over all ranks, which are divided over them."""

    frame_stack: int = 1
    """How many of the last observations the agent sees at once."""

    sticky_actions: float = 0.0
    """Of ALE: the probability that an action is the one before once more (Machado et al. 2018, section 5.2: 0.25)."""

    num_evaluation_episodes: int = 100
    """Seeded episodes of an evaluation, divided over the ranks."""

    evaluation_actions: Literal["likeliest", "drawn"] = "likeliest"
    """In an evaluation: the likeliest action each time; or one drawn, as in training, by the episode's seed."""

    def __post_init__(self) -> None:
        check(self.num_envs >= 1, "env.num_envs", self.num_envs, "it must be at least 1")
        check(self.frame_stack >= 1, "env.frame_stack", self.frame_stack, "it must be at least 1")
        sticky = self.sticky_actions
        check(0 <= sticky < 1, "env.sticky_actions", sticky, "a probability below 1 is needed")
        episodes = self.num_evaluation_episodes
        check(episodes >= 1, "env.num_evaluation_episodes", episodes, "it must be at least 1")


@dataclass(frozen=True)
class PpoSettings:
    """Proximal policy optimization, in the terms of Schulman et al. 2017."""

    total_steps: int = 100_000
    """Steps of all environments together; as many updates are done as fit."""

    num_steps: int = 128
    """T: steps of each environment in an update."""

    num_epochs: int = 4
    """K: how often an update goes over what was collected."""

    num_minibatches: int = 4
    """Optimizer steps of each of those."""

    gamma: float = 0.99
    """The discount of rewards."""

    gae_lambda: float = 0.95
    """Of the generalised advantage estimate (Schulman et al. 2016)."""

    clip: float = 0.2
    """Epsilon: how far the probability ratio may go before it gains no more."""

    clip_rewards: bool = False
    """Learn from the sign of rewards alone (Mnih et al. 2015)."""

    clip_value: float | None = None
    """How far a value estimate may go from the one before the update before it gains no more; by default freely."""

    value_coefficient: float = 0.5
    """c1: the weight of the value function's loss."""

    entropy_coefficient: float = 0.0
    """c2: the weight of the entropy bonus."""

    target_kl: float | None = None
    """An update ends after the epoch in which the policy's divergence from what it was exceeds this, over all ranks."""

    preemption_threshold: float | None = None
    """The share of ranks which have collected their steps that makes the others stop collecting (Wijmans et al. 2020,
    section 3: 0.6); by default all wait for the slowest. Then a run is not the same twice."""

    def __post_init__(self) -> None:
        for name in ("total_steps", "num_steps", "num_epochs", "num_minibatches"):
            check(getattr(self, name) >= 1, f"ppo.{name}", getattr(self, name), "it must be at least 1")
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"ppo.{name}", value, "it must lie in 0 ... 1")
        for name in ("value_coefficient", "entropy_coefficient"):
            value = getattr(self, name)
            check(math.isfinite(value) and value >= 0, f"ppo.{name}", value, "it must be finite, not negative")
        for name in ("clip", "clip_value", "target_kl"):
            value = getattr(self, name)
            check(value is None or value > 0, f"ppo.{name}", value, "it must be above 0")
        minibatches = self.num_minibatches
        check(minibatches <= self.num_steps, "ppo.num_minibatches", minibatches, "ppo.num_steps must be no fewer")
        threshold = self.preemption_threshold
        check(threshold is None or 0 < threshold <= 1, "ppo.preemption_threshold", threshold, "it must lie in 0 ... 1")
