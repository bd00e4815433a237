"""What an agent does in its environments, T steps at a time, as PPO learns from it (Schulman et al. 2017, section 5).

Everything random is a pure function of (seed, environment, update): what happens does not depend on how the
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

LEAST_SHARE = 0.25  # of its steps that a preempted rank has done (Wijmans et al. 2020, appendix)


@dataclass(frozen=True)
class Rollout:
    """T steps of this rank's n environments.

    Attributes:
        index: the number of the update, from 0.
        steps_of_ranks: T of every rank; fewer than was asked for where a rank was preempted.
        envs_of_ranks: n of every rank.
        observations: (T, n, ...), as the environments give them.
        actions: (T, n, ...).
        outputs: (T, n, k) of the policy, before its step.
        rewards: (T, n).
        next_values: (T, n) of the state that an action has led to; 0 where the episode has ended there.
        ends: (T, n) bool, an episode ends with this step.
        generators: of each environment in this update.
        episodes: sum of the returns, sum of the lengths and number of the episodes that have ended, (3,) float64.
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
        """There is no data set."""
        return np.empty(0, dtype=np.int64)

    @property
    def global_size(self) -> int:
        """Steps of all environments of all ranks."""
        return sum(steps * envs for steps, envs in zip(self.steps_of_ranks, self.envs_of_ranks, strict=True))


class Rollouts:
    """A loader (see `Loader`) that yields rollouts; an epoch is one update. Environments go on from one update to the
    next, but begin anew after a checkpoint, which does not hold their states: the episodes that are cut are learned
    from up to there, and are not counted.
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
            environments: this rank's.
            model: the policy, which is put into evaluation mode meanwhile.
            outputs: of the policy for observations (n, ...), with no graph.
            dtype: of what is computed with.
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
        self._envs = range(bounds[cluster.rank], bounds[cluster.rank + 1])  # this rank's, in the whole vector
        threshold = settings.ppo.preemption_threshold
        self._race = RolloutPreemption(cluster) if threshold is not None and cluster.size > 1 else None
        self._enough = math.ceil((threshold or 1.0) * cluster.size)  # ranks that make the others stop
        self._current: NDArray[Any] | None = None  # observations; None: to begin anew
        self._returns = np.zeros(len(self._envs))
        self._lengths = np.zeros(len(self._envs))
        self.epoch = 0
        self.consumed = 0

    def position_after(self, num_updates: int) -> tuple[int, int]:
        """After an update still in its epoch, as after the last batch of a data set: the evaluation is yet to come."""
        return max(num_updates - 1, 0), min(num_updates, 1)

    def after_checkpoint(self) -> None:
        self._current = None

    def rest_of_epoch(self) -> Iterator[Rollout]:
        """Collective: one rollout, unless it is consumed."""
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
            self._begin_anew(update)
        observations: list[Tensor] = []
        actions: list[Tensor] = []
        outputs: list[Tensor] = []
        steps: list[Step] = []
        episodes = np.zeros(3)
        for index in range(num_steps):
            if self._must_stop(index):
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
            self._race.finish(num_done) if self._race else [num_done] * self._cluster.size,
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

    def _begin_anew(self, update: int) -> None:
        seed = self._settings.seed
        self._current = self._environments.begin([update_seed(seed, update, env) % 2**31 for env in self._envs])
        self._returns[:] = 0
        self._lengths[:] = 0

    def _must_stop(self, num_done: int) -> bool:
        """Enough other ranks have finished, and this one has done the least (Wijmans et al. 2020, section 3)."""
        if self._race is None or num_done < LEAST_SHARE * self._settings.ppo.num_steps:
            return False
        return self._race.num_finished() >= self._enough

    def _count(self, step: Step) -> NDArray[np.float64]:
        """The episodes that end with `step`: returns, lengths and how many."""
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
