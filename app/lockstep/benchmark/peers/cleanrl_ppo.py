"""A peer: PPO in one file and one process, in the style of CleanRL."""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Categorical

from lockstep.benchmark.peers.ppo_common import GAMES, Meter, parse_args


def initialised(layer: Any, gain: float = 2**0.5) -> Any:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """For vectors, two tanh networks with two hidden layers of 64 units; for games, a Nature CNN with two heads."""

    def __init__(self, shape: tuple[int, ...], num_actions: int) -> None:
        super().__init__()
        self.body: nn.Module = nn.Identity()
        if len(shape) == 3:
            self.body = nn.Sequential(
                initialised(nn.Conv2d(shape[0], 32, 8, stride=4)),
                nn.ReLU(),
                initialised(nn.Conv2d(32, 64, 4, stride=2)),
                nn.ReLU(),
                initialised(nn.Conv2d(64, 64, 3, stride=1)),
                nn.ReLU(),
                nn.Flatten(),
                initialised(nn.Linear(64 * 7 * 7, 512)),
                nn.ReLU(),
            )
            self.actor: nn.Module = initialised(nn.Linear(512, num_actions), 0.01)
            self.critic: nn.Module = initialised(nn.Linear(512, 1), 1.0)
        else:
            self.actor = self._mlp(shape[0], num_actions, 0.01)
            self.critic = self._mlp(shape[0], 1, 1.0)

    @staticmethod
    def _mlp(num_inputs: int, num_outputs: int, gain: float) -> nn.Module:
        hidden = [initialised(nn.Linear(num_inputs, 64)), nn.Tanh(), initialised(nn.Linear(64, 64)), nn.Tanh()]
        return nn.Sequential(*hidden, initialised(nn.Linear(64, num_outputs), gain))

    def forward(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        """The distribution of actions, and the values (n,)."""
        if observations.dtype == torch.uint8:
            observations = observations.float() / 255.0
        features = self.body(observations)
        return Categorical(logits=self.actor(features)), self.critic(features).squeeze(-1)


def make_envs(arguments: argparse.Namespace) -> Any:
    """A vector of environments that steps one after the other; for games, `--vector fast` takes the one in C++."""
    if not arguments.env_id.startswith(GAMES):
        make = [lambda: gym.make(arguments.env_id)] * arguments.num_envs
        return SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)
    import ale_py

    if arguments.vector == "fast":
        return ale_py.AtariVectorEnv(
            gym.spec(arguments.env_id).kwargs["game"],
            arguments.num_envs,
            repeat_action_probability=0.0,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )

    def make_game() -> gym.Env[Any, Any]:
        env = gym.make(arguments.env_id, frameskip=1, repeat_action_probability=0.0)
        env = gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=84)
        return gym.wrappers.FrameStackObservation(env, 4)

    return SyncVectorEnv([make_game] * arguments.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def main() -> None:
    arguments = parse_args(__doc__)
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)  # noqa: NPY002  # as CleanRL's users seed
    device = torch.device(arguments.device)
    envs = make_envs(arguments)
    shape, num_actions = envs.single_observation_space.shape, int(envs.single_action_space.n)
    agent = Agent(shape, num_actions).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=arguments.learning_rate, eps=1e-5)

    def act(observations: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            policy, _ = agent(torch.as_tensor(observations, device=device))
        greedy: NDArray[Any] = policy.logits.argmax(-1).cpu().numpy()
        return greedy

    meter = Meter(arguments, act)
    num_steps, num_envs = arguments.num_steps, arguments.num_envs
    batch_size = num_steps * num_envs
    dtype = torch.uint8 if len(shape) == 3 else torch.float32
    observations = torch.zeros((num_steps, num_envs, *shape), dtype=dtype, device=device)
    actions = torch.zeros((num_steps, num_envs), dtype=torch.int64, device=device)
    log_probs, rewards, ends, values = (torch.zeros((num_steps, num_envs), device=device) for _ in range(4))
    next_observation = torch.as_tensor(envs.reset(seed=arguments.seed)[0], device=device)
    num_updates = arguments.total_steps // batch_size
    for update in range(num_updates):
        if arguments.anneal:
            optimizer.param_groups[0]["lr"] = arguments.learning_rate * (1 - update / num_updates)
        for step in range(num_steps):
            observations[step] = next_observation
            with torch.no_grad():
                policy, values[step] = agent(next_observation)
                actions[step] = policy.sample()
                log_probs[step] = policy.log_prob(actions[step])
            found, reward, terminated, truncated, info = envs.step(actions[step].cpu().numpy())
            reward = np.asarray(reward, dtype=np.float64)
            cut = np.flatnonzero(truncated & ~terminated)
            if len(cut):  # truncated by the time limit: bootstrap from the value of the last state
                last = np.stack([info["final_obs"][index] for index in cut])
                with torch.no_grad():
                    reward[cut] += arguments.gamma * agent(torch.as_tensor(last, device=device))[1].cpu().numpy()
            rewards[step] = torch.as_tensor(reward, dtype=torch.float32, device=device)
            ends[step] = torch.as_tensor(terminated | truncated, dtype=torch.float32, device=device)
            next_observation = torch.as_tensor(found, device=device)
        learn(agent, optimizer, arguments, (observations, actions, log_probs, rewards, ends, values), next_observation)
        meter.update_done()
        if meter.is_done:
            break
    meter.report()
    envs.close()


def learn(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    arguments: argparse.Namespace,
    rollout: tuple[Tensor, ...],
    next_observation: Tensor,
) -> None:
    """Compute the advantages of one rollout, then train on it for all epochs."""
    observations, actions, log_probs, rewards, ends, values = rollout
    with torch.no_grad():
        next_value = agent(next_observation)[1]
        advantages = torch.zeros_like(rewards)
        running = torch.zeros_like(next_value)
        for step in reversed(range(len(rewards))):
            alive = 1.0 - ends[step]
            delta = rewards[step] + arguments.gamma * next_value * alive - values[step]
            running = delta + arguments.gamma * arguments.gae_lambda * alive * running
            advantages[step], next_value = running, values[step]
        targets = (advantages + values).flatten()
    flat_observations, flat_actions = observations.flatten(0, 1), actions.flatten()
    flat_log_probs, flat_advantages = log_probs.flatten(), advantages.flatten()
    indices = np.arange(len(targets))
    size = len(targets) // arguments.num_minibatches
    for _ in range(arguments.num_epochs):
        np.random.shuffle(indices)  # noqa: NPY002  # as CleanRL's users shuffle
        for start in range(0, len(targets), size):
            chosen = torch.as_tensor(indices[start : start + size])
            policy, new_values = agent(flat_observations[chosen])
            ratio = (policy.log_prob(flat_actions[chosen]) - flat_log_probs[chosen]).exp()
            advantage = flat_advantages[chosen]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            clipped = ratio.clamp(1 - arguments.clip, 1 + arguments.clip)
            policy_loss = -torch.min(advantage * ratio, advantage * clipped).mean()
            # Without CleanRL's factor 1/2, like Stable-Baselines3, so that the coefficient means the same.
            value_loss = (new_values - targets[chosen]).square().mean()
            loss = policy_loss - arguments.entropy * policy.entropy().mean() + arguments.value_coefficient * value_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), arguments.max_grad_norm)
            optimizer.step()


if __name__ == "__main__":
    main()
