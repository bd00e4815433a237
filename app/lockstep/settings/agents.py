"""Settings of `task: ppo`: environments and the PPO algorithm."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.runtime.errors import check


@dataclass(frozen=True)
class EnvSettings:
    """The environments of an agent."""

    id: str = "CartPole-v1"
    """An id of Gymnasium, ALE/... or highway-env; my_package:MyEnv-v0, which imports the package that registers it; or
    a class, my_package.MyEnv."""

    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments for making the environment."""

    num_envs: int = 8
    """Number of environments over all ranks; at least one for each."""

    frame_stack: int = 1
    """Number of last observations that are stacked as the policy's input."""

    sticky_actions: float = 0.0
    """ALE: probability that the previous action is repeated instead (Machado et al. 2018, section 5.2: 0.25)."""

    num_evaluation_episodes: int = 100
    """Number of seeded episodes in an evaluation, divided over the ranks."""

    evaluation_actions: Literal["likeliest", "drawn"] = "likeliest"
    """Actions in an evaluation: the most likely ones, or drawn from the policy with the seed of the episode."""

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
    """Environment steps of the run over all environments, rounded down to whole updates."""

    num_steps: int = 128
    """T: steps of each environment for one update."""

    num_epochs: int = 4
    """K: epochs over the collected steps in an update."""

    num_minibatches: int = 4
    """Minibatches, and so optimizer steps, of each of these epochs."""

    gamma: float = 0.99
    """Discount factor of rewards."""

    gae_lambda: float = 0.95
    """Lambda of the generalised advantage estimate (Schulman et al. 2016)."""

    clip: float = 0.2
    """Epsilon: the probability ratio is clipped to 1 - epsilon ... 1 + epsilon."""

    clip_rewards: bool = False
    """Replace rewards by their sign (Mnih et al. 2015)."""

    clip_value: float | None = None
    """Clip the change of value estimates in an update to this; by default they are not clipped."""

    value_coefficient: float = 0.5
    """c1: weight of the value loss."""

    entropy_coefficient: float = 0.0
    """c2: weight of the entropy bonus."""

    target_kl: float | None = None
    """End an update after the epoch in which the KL divergence from the old policy, over all ranks, exceeds this."""

    preemption_threshold: float | None = None
    """Share of the ranks that must have collected their steps for the others to stop collecting (Wijmans et al. 2020,
    section 3: 0.6); by default all wait for the slowest. With it, two equal runs give different results."""

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
