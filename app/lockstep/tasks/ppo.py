"""Proximal policy optimization (PPO, Schulman et al. 2017), distributed as in DD-PPO (Wijmans et al. 2020).

Each update collects T steps of every environment (rollout.py), computes advantages (equation 11) and normalises them
over all ranks. Then follow K epochs of minibatches, each one optimizer step along the exact mean gradient of

    L^CLIP (equation 7)  -  c1 L^VF  +  c2 S  (equation 9)

Minibatches are drawn environment by environment, equally many steps from each. So ranks with equally many environments
have equally many samples, and the content of a global minibatch does not depend on the number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import Batch
from lockstep.data.sharding import shard_bounds
from lockstep.models.actions import build_actions
from lockstep.models.policy import policy_blocks
from lockstep.parallel.step import FORWARD_BACKWARD, train_step
from lockstep.parallel.strategy import Strategy
from lockstep.runtime.errors import SettingsError
from lockstep.runtime.seeding import seed_model, update_seed
from lockstep.settings import Settings
from lockstep.tasks.environments import Environments
from lockstep.tasks.episodes import Episodes, Generators, play
from lockstep.tasks.rollout import Rollout, RolloutLoader
from lockstep.tasks.rollout_preemption import WHY_MPI
from lockstep.tasks.task import Forward, Task, evaluating

LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
KL = LOSSES.index("approx_kl")
COUNT = len(LOSSES)  # index of the number of samples among the metric sums; the sums over episodes follow


@dataclass(frozen=True)
class Minibatch(Batch):
    """Steps of this rank's environments; `inputs` are the observations.

    Attributes:
        actions: (n, ...).
        log_probs: (n,), of the actions under the policy before the update.
        advantages: (n,), normalised.
        returns: (n,), the targets of the value function.
        values: (n,), the value estimates before the update.
    """

    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    values: Tensor


class Ppo(Task):
    """The PPO task: policy, environments, loss and evaluation."""

    samples = "steps"
    num_metric_sums = len(LOSSES) + 1 + 3
    curves = ("return", "policy_loss", "value_loss", "entropy")

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        """Collective: make this rank's environments.

        Raises:
            SettingsError: on every rank: the environments cannot be made, or there are fewer of them than ranks.
        """
        super().__init__(settings, cluster)
        num_envs = settings.env.num_envs
        if num_envs < cluster.size:
            message = f"env.num_envs is {num_envs}: each of the {cluster.size} ranks needs one or more"
            raise SettingsError(message).as_shared()
        if settings.ppo.preemption_threshold is not None:
            cluster.require_mpi(WHY_MPI)
        start, stop = shard_bounds(num_envs, cluster.size)[cluster.rank : cluster.rank + 2]
        self.environments = cluster.on_every_rank(lambda: Environments(settings.env, int(stop - start)))
        self.actions = cluster.on_every_rank(lambda: build_actions(self.environments.action_space))
        ppo = settings.ppo
        weights = [1.0, ppo.value_coefficient, -ppo.entropy_coefficient]
        self._weights = torch.tensor(weights, dtype=self.dtype, device=cluster.device)
        self._shape: tuple[int, ...] = self.environments.observation_space.shape or ()

    # -- the model -------------------------------------------------------------------------------------------------

    def model_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Build the policy block by block.

        Raises:
            SettingsError: on every rank: the policy does not fit the environment.
        """
        seed_model(self.settings.seed)
        for name, block in policy_blocks(self.settings.model, self._shape, self.actions):
            yield name, block.to(self.cluster.device, self.dtype).to(memory_format=self._layout)

    def example_inputs(self, num_samples: int) -> Tensor:
        return torch.zeros((num_samples, *self._shape), device=self.cluster.device)

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Compute the parameters of the action distribution and the value of the state: (n, num_outputs + 1)."""
        # Not in bfloat16: the ratio of two almost equal likelihoods needs their last digits.
        outputs: Tensor = super().outputs(model, inputs.to(self.dtype))
        return outputs.to(self.dtype)

    # -- learning --------------------------------------------------------------------------------------------------

    @property
    def num_epochs(self) -> int:
        """Number of updates: an epoch is one update."""
        ppo = self.settings.ppo
        return max(1, ppo.total_steps // (ppo.num_steps * self.settings.env.num_envs))

    @property
    def evaluate_every(self) -> int:
        return self.settings.evaluate_every or 0

    def build_loader(self, shard_id: int, num_shards: int, strategy: Strategy | None = None) -> RolloutLoader:
        assert strategy is not None
        assert (shard_id, num_shards) == (self.cluster.rank, self.cluster.size)
        forward = partial(self.outputs, strategy.model)
        return RolloutLoader(
            self.settings, self.cluster, self.environments, self.actions, strategy.model, forward, self.dtype
        )

    @override
    def learn(
        self, item: Rollout, strategy: Strategy, seed: int, before_step: Callable[[], None] | None = None
    ) -> Tensor:
        """Collective: K epochs over the rollout; all ranks stop early if the KL divergence exceeds `target_kl`."""
        ppo = self.settings.ppo
        strategy.recorder.enter(FORWARD_BACKWARD)  # its preparation counts for it
        with torch.no_grad():
            all_steps = self._flatten_rollout(item)
        orders = [
            generator.permuted(np.tile(np.arange(len(item.rewards)), (ppo.num_epochs, 1)), axis=1)
            for generator in item.generators
        ]
        metric_sums = torch.zeros(self.num_metric_sums, dtype=torch.float64, device=self.cluster.device)
        metric_sums[COUNT + 1 :] = item.episodes
        for epoch in range(ppo.num_epochs):
            epoch_sums = torch.zeros_like(metric_sums[: COUNT + 1])
            order = np.stack([env_order[epoch] for env_order in orders], axis=1)
            for index, minibatch in enumerate(self._minibatches(all_steps, item, order)):
                step_seed = update_seed(seed, epoch, index)
                epoch_sums += train_step(strategy, minibatch, self, step_seed, before_step)
            metric_sums[: COUNT + 1] += epoch_sums
            if ppo.target_kl is not None:
                sums = self.cluster.sum_(epoch_sums, name="divergence")
                if float(sums[KL]) > ppo.target_kl * float(sums[COUNT]):
                    break
        return metric_sums

    def _flatten_rollout(self, item: Rollout) -> Minibatch:
        """Collective: flatten (T, n) steps to (T n,), with advantages normalised over all ranks."""
        ppo = self.settings.ppo
        distributions, values = _split(item.outputs)
        advantages = generalised_advantages(
            item.rewards, values, item.next_values, item.ends, ppo.gamma, ppo.gae_lambda
        )
        returns = (advantages + values).flatten()
        actions = item.actions.flatten(0, 1)
        return Minibatch(
            item.observations.flatten(0, 1),
            item.global_size,
            actions,
            self.actions.log_prob_and_entropy(distributions.flatten(0, 1), actions)[0],
            normalise(advantages.flatten(), self.cluster),
            returns,
            values.flatten(),
        )

    def _minibatches(self, all_steps: Minibatch, item: Rollout, order: Any) -> Iterator[Minibatch]:
        """Split the steps of a rollout into minibatches.

        Args:
            order: (T, n), the shuffled steps of each environment.
        """
        num_minibatches = self.settings.ppo.num_minibatches
        if num_minibatches == 1:
            yield all_steps
            return
        num_envs = order.shape[1]
        sizes = [
            sum(len(steps) * envs for steps, envs in zip(steps_of_ranks, item.envs_of_ranks, strict=True))
            for steps_of_ranks in zip(
                *(np.array_split(np.arange(steps), num_minibatches) for steps in item.steps_of_ranks), strict=True
            )
        ]
        for rows, global_size in zip(np.array_split(order, num_minibatches), sizes, strict=True):
            chosen = torch.from_numpy((rows * num_envs + np.arange(num_envs)).ravel()).to(self.cluster.device)
            yield all_steps.take(chosen, global_size)

    def loss_sum(self, outputs: Tensor, batch: Minibatch) -> tuple[Tensor, Tensor]:
        """The negative of equation 9, which is minimised."""
        ppo = self.settings.ppo
        distributions, values = _split(outputs)
        log_probs, entropy = self.actions.log_prob_and_entropy(distributions, batch.actions)
        if ppo.entropy_coefficient == 0:
            entropy = entropy.detach()  # saves a third of a small policy's backward pass
        log_ratio = log_probs - batch.log_probs
        ratio = log_ratio.exp()
        surrogate = torch.min(ratio * batch.advantages, ratio.clamp(1 - ppo.clip, 1 + ppo.clip) * batch.advantages)
        value_loss = (values - batch.returns) ** 2
        if ppo.clip_value is not None:
            clipped_values = batch.values + (values - batch.values).clamp(-ppo.clip_value, ppo.clip_value)
            value_loss = torch.max(value_loss, (clipped_values - batch.returns) ** 2)
        sums = torch.stack([-surrogate, value_loss, entropy]).sum(1)
        with torch.no_grad():
            divergence = ratio - 1 - log_ratio  # KL divergence KL(old, new), estimator k3 (Schulman 2020)
            clipped = ((ratio - 1).abs() > ppo.clip).to(ratio.dtype)
            diagnostics = torch.stack([divergence, clipped, torch.ones_like(ratio)]).sum(1)
            metric_sums = torch.cat([sums, diagnostics]).double()
        return self._weights @ sums, metric_sums

    def scores(self, metric_sums: Sequence[float]) -> dict[str, float]:
        count, (returns, lengths, num_episodes) = metric_sums[COUNT], metric_sums[COUNT + 1 :]
        if not count:
            return {}
        means = {name: metric_sums[index] / count for index, name in enumerate(LOSSES)}
        if num_episodes:
            means |= {"return": returns / num_episodes, "length": lengths / num_episodes, "episodes": num_episodes}
        return means

    @override
    def line(self, epoch: int, item: Rollout, num_samples: int, mean: dict[str, float], last: dict[str, float]) -> str:
        episodes = f"{mean['return']:.2f} in {mean['episodes']:.0f} episodes" if "return" in mean else "no episode yet"
        return f"Update: {epoch + 1}, Steps: {num_samples}, Return: {episodes}, Entropy: {mean['entropy']:.3f}"

    @override
    def immutable_settings(self, loader: RolloutLoader, num_shards: int) -> dict[str, Any]:
        env = self.settings.env
        return {
            "env.id": env.id,
            "env.options": env.options,
            "env.num_envs": env.num_envs,
            "env.frame_stack": env.frame_stack,
            "env.sticky_actions": env.sticky_actions,
            "ppo.num_steps": self.settings.ppo.num_steps,
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module, forward: Forward, shard_id: int, num_shards: int) -> Episodes:
        """Collective: play the seeded evaluation episodes, divided over the shards."""
        env = self.settings.env
        bounds = shard_bounds(env.num_evaluation_episodes, num_shards)
        numbers = range(bounds[shard_id], bounds[shard_id + 1])
        with evaluating(model):
            mine = self.cluster.on_every_rank(lambda: play(partial(self.act, forward), env, numbers))
        return Episodes.of(self.cluster.all_gather_object(mine))

    @torch.no_grad()
    def act(self, forward: Forward, observations: Any, generators: Generators) -> Any:
        """Choose actions (n, ...) for `observations` (n, ...), both arrays as environments use them."""
        self.cluster.recorder.beat()
        outputs = forward(torch.from_numpy(observations).to(self.cluster.device))
        assert outputs is not None
        distributions, actions = _split(outputs)[0], self.actions
        if self.settings.env.evaluation_actions == "likeliest":
            return actions.for_environments(actions.mode(distributions))
        noise = np.concatenate([actions.noise(generator, 1) for generator in generators])
        return actions.for_environments(actions.sample(distributions, torch.from_numpy(noise).to(distributions)))


def generalised_advantages(
    rewards: Tensor, values: Tensor, next_values: Tensor, ends: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Compute generalised advantage estimates for (T, n) steps: equation 11 (Schulman et al. 2016, equation 16).

    Args:
        next_values: value of the state after each step; 0 if it is terminal.
        ends: whether an episode ends with the step; later rewards then do not count.
    """
    deltas = rewards + gamma * next_values - values
    weights = gamma * gae_lambda * (~ends).to(deltas.dtype)
    advantages = torch.empty_like(deltas)
    after = torch.zeros_like(deltas[0])
    for step in range(len(deltas) - 1, -1, -1):
        after = torch.addcmul(deltas[step], weights[step], after, out=advantages[step])
    return advantages


def normalise(advantages: Tensor, cluster: Cluster) -> Tensor:
    """Collective: normalise `advantages` (n,) by the mean and standard deviation over the steps of all ranks."""
    exact = advantages.double()
    sums = torch.stack([exact.sum(), (exact**2).sum(), exact.new_tensor(len(exact))])
    total, squares, count = cluster.sum_(sums, name="advantages").tolist()
    mean = total / count
    variance = max(0.0, squares / count - mean**2)
    normalised: Tensor = (exact - mean) / (variance**0.5 + 1e-8)
    return normalised.to(advantages.dtype)


def _split(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Split a policy's outputs (..., k + 1) into distribution parameters (..., k) and values (...)."""
    distributions, values = outputs.split([outputs.shape[-1] - 1, 1], dim=-1)
    return distributions, values.squeeze(-1)
