"""What the PPO peers have in common: options, the greedy evaluation, and the reported result.

`lockstep benchmark ppo` starts them in turn.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

GAMES = "ALE/"
NUM_EPISODES = 100  # of one evaluation
EVALUATION_SEED = 1_000_000  # differs from all seeds of the training

Act = Callable[[NDArray[Any]], NDArray[Any]]  # greedy actions (n,) for observations (n, ...)


def parse_args(description: str | None) -> argparse.Namespace:
    """Parse the options of the PPO peers, whose defaults are Lockstep's preset `cartpole`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--env-id", default="CartPole-v1")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--num-steps", type=int, default=64, help="per environment and rollout")
    parser.add_argument("--total-steps", type=int, default=150_000, help="of all environments together")
    parser.add_argument("--num-minibatches", type=int, default=2)
    parser.add_argument("--num-epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--anneal", action="store_true", help="decay the learning rate linearly to 0")
    parser.add_argument("--gamma", type=float, default=0.98)
    parser.add_argument("--gae-lambda", type=float, default=0.8)
    parser.add_argument("--clip", type=float, default=0.2)
    parser.add_argument("--entropy", type=float, default=0.0)
    parser.add_argument("--value-coefficient", type=float, default=0.5)
    parser.add_argument("--max-grad-norm", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: torch's default")
    parser.add_argument("--vector", choices=["plain", "fast"], default="plain", help="how environments are stepped")
    parser.add_argument("--warmup-updates", type=int, default=5, help="not timed")
    parser.add_argument("--until-return", type=float, help="stop at this mean return of a greedy evaluation")
    parser.add_argument("--evaluate-every", type=int, default=4096, help="steps between two evaluations")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


class Meter:
    """Times the training without evaluations, evaluates between updates, and reports.

    Attributes:
        is_done: whether the return of `--until-return` has been reached.
    """

    def __init__(self, arguments: argparse.Namespace, act: Act) -> None:
        self.is_done = False
        self._arguments = arguments
        self._act = act
        self._batch_size = arguments.num_envs * arguments.num_steps
        self._num_steps = 0
        self._num_timed = 0
        self._seconds = 0.0
        self._return: float | None = None
        self._steps_to_return: int | None = None
        self._next_evaluation = arguments.evaluate_every
        self._started = time.perf_counter()

    def update_done(self) -> None:
        """Count one update: a rollout was collected and trained on."""
        arguments = self._arguments
        seconds = time.perf_counter() - self._started
        self._num_steps += self._batch_size
        if self._num_steps > arguments.warmup_updates * self._batch_size:
            self._seconds += seconds
            self._num_timed += self._batch_size
        if arguments.until_return is not None and self._num_steps >= self._next_evaluation:
            self._next_evaluation += arguments.evaluate_every
            self._return = evaluate(arguments.env_id, self._act)
            if self._return >= arguments.until_return:
                self._steps_to_return = self._num_steps
                self.is_done = True
        self._started = time.perf_counter()

    def report(self) -> None:
        """Print the result as one line of JSON."""
        result = {
            "steps_per_second": self._num_timed / self._seconds if self._seconds else None,
            "steps_to_return": self._steps_to_return,
            "return": self._return,
            "num_steps": self._num_steps,
        }
        print(json.dumps(result), flush=True)


def evaluate(env_id: str, act: Act) -> float:
    """The mean return of `NUM_EPISODES` episodes, one per environment, each with another seed."""
    if env_id.startswith(GAMES):
        raise SystemExit("--until-return is for classic control only: 100 episodes of a game take too long")
    envs = [gym.make(env_id) for _ in range(NUM_EPISODES)]
    observations = np.stack([env.reset(seed=EVALUATION_SEED + index)[0] for index, env in enumerate(envs)])
    returns = np.zeros(NUM_EPISODES)
    alive = list(range(NUM_EPISODES))
    while alive:
        actions = act(observations[alive])
        for index, action in zip(list(alive), actions, strict=True):
            observations[index], reward, terminated, truncated, _ = envs[index].step(action)
            returns[index] += float(reward)
            if terminated or truncated:
                alive.remove(index)
    return float(returns.mean())
