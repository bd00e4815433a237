"""A peer: PPO of Stable-Baselines3, in the style of its users. The package must be on PYTHONPATH; see ppo_peers.py."""

import argparse
from typing import Any

import ale_py  # noqa: F401  # registers the games
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack

from lockstep.benchmark.peers.ppo_common import GAMES, Meter, parse_args


class Clock(BaseCallback):  # type: ignore[misc]  # of an untyped package
    """Calls the meter after each update, that is, a rollout and the training on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self._arguments = arguments
        self.meter: Meter | None = None

    def _on_training_start(self) -> None:
        self.meter = Meter(
            self._arguments, lambda observations: self.model.predict(observations, deterministic=True)[0]
        )

    def _on_rollout_start(self) -> None:
        assert self.meter
        if self.num_timesteps > 0:
            self.meter.update_done()

    def _on_step(self) -> bool:
        assert self.meter
        return not self.meter.is_done


def make_envs(arguments: argparse.Namespace) -> Any:
    vector = SubprocVecEnv if arguments.vector == "fast" else DummyVecEnv
    if not arguments.env_id.startswith(GAMES):
        return make_vec_env(arguments.env_id, arguments.num_envs, arguments.seed, vec_env_cls=vector)
    plain = {"repeat_action_probability": 0.0, "frameskip": 1}
    envs = make_atari_env(arguments.env_id, arguments.num_envs, arguments.seed, env_kwargs=plain, vec_env_cls=vector)
    return VecFrameStack(envs, n_stack=4)


def main() -> None:
    arguments = parse_args(__doc__)
    envs = make_envs(arguments)
    rate = arguments.learning_rate
    model = PPO(
        "CnnPolicy" if arguments.env_id.startswith(GAMES) else "MlpPolicy",
        envs,
        learning_rate=(lambda left: rate * left) if arguments.anneal else rate,
        n_steps=arguments.num_steps,
        batch_size=arguments.num_envs * arguments.num_steps // arguments.num_minibatches,
        n_epochs=arguments.num_epochs,
        gamma=arguments.gamma,
        gae_lambda=arguments.gae_lambda,
        clip_range=arguments.clip,
        ent_coef=arguments.entropy,
        vf_coef=arguments.value_coefficient,
        max_grad_norm=arguments.max_grad_norm,
        seed=arguments.seed,
        device=arguments.device,
    )
    clock = Clock(arguments)
    model.learn(arguments.total_steps, callback=clock)
    assert clock.meter
    if not clock.meter.is_done:
        clock.meter.update_done()  # the last update, which no further rollout follows
    clock.meter.report()
    envs.close()


if __name__ == "__main__":
    main()
