"""Vectors of environments: Atari games step in parallel threads in C++, all other environments one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FlattenObservation, FrameStackObservation, RescaleAction
from numpy.typing import NDArray

from lockstep.runtime.affinity import allowed_cpus
from lockstep.runtime.errors import SettingsError
from lockstep.runtime.importing import construct, import_module
from lockstep.settings import EnvSettings

PACKAGES = ("ale_py", "highway_env")  # their import registers environments
GAMES = "ALE/"


@dataclass(frozen=True)
class Step:
    """The result of one action in each of n environments.

    Attributes:
        observations: (n, ...), the inputs of the next actions; where an episode has ended, the first of the next one.
        rewards: (n,) float64.
        terminated, truncated: (n,) bool: the episode reached a terminal state; or else its time limit.
        last_observations: the final observations of the truncated episodes, in order; None if there are none.
    """

    observations: NDArray[Any]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    last_observations: NDArray[Any] | None


class Environments:
    """A vector of environments that reset automatically at the end of an episode.

    Attributes:
        observation_space, action_space: of each single environment.
    """

    def __init__(self, settings: EnvSettings, num_envs: int) -> None:
        """Make the environments.

        Raises:
            SettingsError: the environment is unknown, or cannot be made with `settings`.
        """
        self._is_game = is_game(settings)
        self._vector = _make_game(settings, num_envs) if self._is_game else _make_vector(settings, num_envs)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def begin(self, seeds: Sequence[int]) -> NDArray[Any]:
        """Reset every environment with its seed; returns the first observations (n, ...)."""
        observations: NDArray[Any] = self._vector.reset(seed=np.array(seeds) if self._is_game else list(seeds))[0]  # type: ignore[arg-type]
        return observations

    def step(self, actions: NDArray[np.generic]) -> Step:
        """Take one step with `actions` (n, ...) from `Actions.for_environments`."""
        observations, rewards, terminated, truncated, info = self._vector.step(actions)
        truncated = truncated & ~terminated
        last = np.stack([info["final_obs"][index] for index in np.flatnonzero(truncated)]) if truncated.any() else None
        return Step(observations, rewards.astype(np.float64), terminated, truncated, last)

    def close(self) -> None:
        self._vector.close()


def is_game(settings: EnvSettings) -> bool:
    return settings.id.startswith(GAMES)


def make_one(settings: EnvSettings, **options: Any) -> gym.Env[Any, Any]:
    """Make one environment that is not an Atari game, with flattened observations and bounded actions rescaled to
    -1 ... 1.

    Args:
        options: further arguments of the environment.

    Raises:
        SettingsError: the environment is unknown, or cannot be made with `settings`.
    """
    options = {**settings.options, **options}
    is_class = "." in settings.id and ":" not in settings.id
    if is_class:
        make: Callable[[], gym.Env[Any, Any]] = lambda: construct(settings.id, "env.id", gym.Env, **options)  # noqa: E731
    else:
        _register(settings.id)
        make = lambda: gym.make(settings.id, disable_env_checker=True, **options)  # noqa: E731
    try:
        env = make()
        if not isinstance(env.observation_space, gym.spaces.Box):
            env = FlattenObservation(env)
        if settings.frame_stack > 1:
            env = FrameStackObservation(env, settings.frame_stack)
        space = env.action_space
        if isinstance(space, gym.spaces.Box) and space.is_bounded():
            env = RescaleAction(env, np.float32(-1), np.float32(1))
        return env
    except SettingsError:
        raise
    except Exception as error:  # an environment may raise anything
        raise SettingsError(
            f"env.id is {settings.id}: it cannot be made with env.options {settings.options}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _make_vector(settings: EnvSettings, num_envs: int) -> VectorEnv[Any, Any, Any]:
    # No worker processes: the ranks already run in parallel.
    return SyncVectorEnv([lambda: make_one(settings)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def _make_game(settings: EnvSettings, num_envs: int, **options: Any) -> VectorEnv[Any, Any, Any]:
    """Make a vector of Atari games with the usual preprocessing (Machado et al. 2018): every fourth frame, grey, 84 x
    84; rewards are not clipped, and losing a life does not end an episode.
    """
    _register(settings.id)
    from ale_py.vector_env import AtariVectorEnv  # imported here: it takes a second

    try:
        return AtariVectorEnv(
            gym.spec(settings.id).kwargs["game"],
            num_envs,
            num_threads=min(num_envs, len(allowed_cpus())),
            stack_num=settings.frame_stack,
            repeat_action_probability=settings.sticky_actions,
            autoreset_mode=AutoresetMode.SAME_STEP,
            **{"reward_clipping": False, **settings.options, **options},
        )
    except Exception as error:  # a game may raise anything
        raise SettingsError(
            f"env.id is {settings.id}: it cannot be made with env.options {settings.options}: "
            f"{type(error).__name__}: {error}"
        ) from error


def make_coloured_game(settings: EnvSettings) -> VectorEnv[Any, Any, Any]:
    """Make one game whose observations (1, 1, 210, 160, 3) are the screen in colour. With the same seed and actions it
    plays out exactly like the game that the agent sees.
    """
    return _make_game(replace(settings, frame_stack=1), 1, grayscale=False, img_height=210, img_width=160)


def _register(name: str) -> None:
    """Import the packages that may register the environment `name`."""
    for package in PACKAGES if ":" not in name else (name.partition(":")[0],):
        if name not in gym.registry:
            import_module(package, "env.id")
