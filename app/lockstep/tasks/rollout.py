"""Collect rollouts of T steps from every environment for PPO (Schulman et al. 2017, section 5).

Everything random is a pure function of (seed, environment, update), so a rollout does not depend on how the
environments are divided over the ranks.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.sharding import Ids, shard_bounds
from lockstep.models.actions import Actions
from lockstep.runtime.seeding import update_seed
from lockstep.settings import Settings
from lockstep.tasks.environments import Environments, Step
from lockstep.tasks.rollout_preemption import RolloutPreemption
from lockstep.tasks.task import evaluating

MIN_SHARE = 0.25  # of its steps that a rank collects before it may be preempted (Wijmans et al. 2020, appendix)


@dataclass(frozen=True)
class Rollout:
    """T steps of this rank's n environments.

    Attributes:
        index: number of the update, from 0.
        steps_of_ranks: T of every rank; smaller than `ppo.num_steps` where a rank was preempted.
        envs_of_ranks: n of every rank.
        observations: (T, n, ...), as the environments give them.
        actions: (T, n, ...).
        outputs: (T, n, k), of the policy before the update.
        rewards: (T, n).
        next_values: (T, n), value of the state after each step; 0 if it is terminal.
        ends: (T, n) bool, whether an episode ends with this step.
        generators: one random generator for each environment, for this update.
        episodes: sum of returns, sum of lengths and number of the episodes that ended, (3,) float64.
    """

    index: int
    steps_of_ranks: list[int]
    envs_of_ranks: list[int]
    observations: Tensor
    actions: Tensor
    outputs: Tensor
    rewards: Tensor
    next_values: Tensor
    ends: Tensor
    generators: list[np.random.Generator]
    episodes: Tensor

    @cached_property
    def ids(self) -> Ids:
        """Empty: there is no data set."""
        return np.empty(0, dtype=np.int64)

    @property
    def global_size(self) -> int:
        """Number of steps over the environments of all ranks."""
        return sum(steps * envs for steps, envs in zip(self.steps_of_ranks, self.envs_of_ranks, strict=True))


class RolloutLoader:
    """A loader (see `Loader`) that collects rollouts; an epoch is one update.

    Environments keep their state from one update to the next, but are reset after a checkpoint, which does not hold
    that state. The steps of the interrupted episodes are learned from, but their returns are not counted.
    """

    num_samples = 0
    updates_per_epoch = 1

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        environments: Environments,
        actions: Actions,
        model: nn.Module,
        outputs: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            environments: the environments of this rank.
            model: the policy; it is in evaluation mode while a rollout is collected.
            outputs: computes the policy's outputs for observations (n, ...).
            dtype: data type of noise, rewards and values.
        """
        self._settings = settings
        self._cluster = cluster
        self._environments = environments
        self._actions = actions
        self._model = model
        self._outputs = outputs
        self._dtype = dtype
        bounds = shard_bounds(settings.env.num_envs, cluster.size)
        self._envs_of_ranks = [stop - start for start, stop in pairwise(bounds)]
        self._envs = range(bounds[cluster.rank], bounds[cluster.rank + 1])  # this rank's, numbered over all ranks
        threshold = settings.ppo.preemption_threshold
        self._preemption = RolloutPreemption(cluster) if threshold is not None and cluster.size > 1 else None
        self._num_to_preempt = math.ceil((threshold or 1.0) * cluster.size)  # finished ranks that stop the others
        self._current: NDArray[Any] | None = None  # observations; None: reset the environments first
        self._returns = np.zeros(len(self._envs))
        self._lengths = np.zeros(len(self._envs))
        self.epoch = 0
        self.consumed = 0

    def position_after(self, num_updates: int) -> tuple[int, int]:
        """Compute (epoch, consumed) after `num_updates`: still in the last update's epoch, before its evaluation."""
        return max(num_updates - 1, 0), min(num_updates, 1)

    def after_checkpoint(self) -> None:
        """Reset the environments before the next rollout, as a resumed run would."""
        self._current = None

    def rest_of_epoch(self) -> Iterator[Rollout]:
        """Collective: yield the rollout of this epoch, unless it is consumed."""
        if not self.consumed:
            self._cluster.recorder.enter("steps of the environments", self.epoch + 1)
            with torch.no_grad(), evaluating(self._model):
                rollout = self._collect(self.epoch)
            yield rollout
        self.epoch, self.consumed = self.epoch + 1, 0

    def _collect(self, update: int) -> Rollout:
        num_steps, num_envs = self._settings.ppo.num_steps, len(self._envs)
        generators = [np.random.default_rng((self._settings.seed, env, update)) for env in self._envs]
        drawn = np.stack([self._actions.noise(generator, num_steps) for generator in generators], axis=1)
        noise = torch.from_numpy(drawn).to(self._cluster.device, self._dtype)
        if self._current is None:
            self._reset(update)
        observations: list[Tensor] = []
        actions: list[Tensor] = []
        outputs: list[Tensor] = []
        steps: list[Step] = []
        episodes = np.zeros(3)
        for index in range(num_steps):
            if self._is_preempted(index):
                break
            self._cluster.recorder.beat()
            observations.append(self._to_device(self._current))
            outputs.append(self._outputs(observations[-1]))
            actions.append(self._actions.sample(outputs[-1][:, :-1], noise[index]))
            steps.append(self._environments.step(self._actions.for_environments(actions[-1])))
            self._current = steps[-1].observations
            episodes += self._count(steps[-1])
        values = torch.stack(
            [*(output[:, -1] for output in outputs), self._outputs(self._to_device(self._current))[:, -1]]
        )
        rewards = np.stack([step.rewards for step in steps])
        if self._settings.ppo.clip_rewards:
            rewards = np.sign(rewards)
        terminated, truncated = (
            torch.from_numpy(np.stack(each)).to(self._cluster.device)
            for each in ([step.terminated for step in steps], [step.truncated for step in steps])
        )
        next_values = values[1:].masked_fill(terminated, 0.0)
        last = [step.last_observations for step in steps if step.last_observations is not None]
        if last:
            next_values[truncated] = self._outputs(self._to_device(np.concatenate(last)))[:, -1]
        num_done = len(steps)
        return Rollout(
            update,
            self._preemption.finish(num_done) if self._preemption else [num_done] * self._cluster.size,
            self._envs_of_ranks,
            torch.stack(observations),
            torch.stack(actions),
            torch.stack(outputs),
            torch.from_numpy(rewards).to(self._cluster.device, self._dtype).view(num_done, num_envs),
            next_values,
            terminated | truncated,
            generators,
            torch.from_numpy(episodes).to(self._cluster.device),
        )

    def _reset(self, update: int) -> None:
        seed = self._settings.seed
        self._current = self._environments.begin([update_seed(seed, update, env) % 2**31 for env in self._envs])
        self._returns[:] = 0
        self._lengths[:] = 0

    def _is_preempted(self, num_done: int) -> bool:
        """Whether enough other ranks have finished and this one has enough steps (Wijmans et al. 2020, section 3)."""
        if self._preemption is None or num_done < MIN_SHARE * self._settings.ppo.num_steps:
            return False
        return self._preemption.num_finished() >= self._num_to_preempt

    def _count(self, step: Step) -> NDArray[np.float64]:
        """Sum returns and lengths of the episodes that end with `step`, and count them: (3,)."""
        self._returns += step.rewards
        self._lengths += 1
        ended = step.terminated | step.truncated
        if not ended.any():
            return np.zeros(3)
        counted = np.array([self._returns[ended].sum(), self._lengths[ended].sum(), ended.sum()], dtype=np.float64)
        self._returns[ended] = 0
        self._lengths[ended] = 0
        return counted

    def _to_device(self, observations: Any) -> Tensor:
        return torch.from_numpy(observations).to(self._cluster.device)
