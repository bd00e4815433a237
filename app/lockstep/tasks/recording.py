"""Record an episode as an animated GIF."""

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lockstep.runtime.errors import SettingsError
from lockstep.settings import EnvSettings
from lockstep.tasks.environments import Environments, is_game, make_coloured_game, make_one
from lockstep.tasks.episodes import EVALUATION, Act, Episode

MAX_FRAMES = 1500
GAME_FRAMES_PER_SECOND = 15.0  # every fourth of 60


def record(act: Act, settings: EnvSettings, picture: Path) -> Episode:
    """Play the first episode of an evaluation and write it as a GIF of at most MAX_FRAMES frames.

    Raises:
        OSError: the file cannot be written.
        SettingsError: the environment cannot be made, or does not render RGB arrays.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "offscreen")  # with "dummy" highway-env would draw nothing
    frames: list[NDArray[np.uint8]] = []
    episode, frames_per_second = (_record_game if is_game(settings) else _record_one)(act, settings, frames)
    first, *others = [Image.fromarray(frame).quantize(64) for frame in frames]
    first.save(picture, save_all=True, append_images=others, duration=round(1000 / frames_per_second), loop=0)
    return episode


def _record_one(act: Act, settings: EnvSettings, frames: list[NDArray[np.uint8]]) -> tuple[Episode, float]:
    total, generators = 0.0, [np.random.default_rng(EVALUATION)]
    with closing(make_one(settings, render_mode="rgb_array")) as env:
        observation, _ = env.reset(seed=EVALUATION)
        frames.append(_drawn(env.render()))
        has_ended = False
        while not has_ended and len(frames) < MAX_FRAMES:
            observation, reward, terminated, truncated, _ = env.step(act(observation[np.newaxis], generators)[0])
            total += float(reward)
            frames.append(_drawn(env.render()))
            has_ended = terminated or truncated
        return Episode(EVALUATION, total, len(frames) - 1), float(env.metadata.get("render_fps", 30))


def _record_game(act: Act, settings: EnvSettings, frames: list[NDArray[np.uint8]]) -> tuple[Episode, float]:
    """Play the game twice with the same actions: once grey and small for the agent, once in colour for the frames."""
    total, generators = 0.0, [np.random.default_rng(EVALUATION)]
    with closing(Environments(settings, 1)) as seen, closing(make_coloured_game(settings)) as drawn:
        observations = seen.begin([EVALUATION])
        screens, _ = drawn.reset(seed=np.array([EVALUATION]))  # type: ignore[arg-type]
        frames.append(screens[0, 0])
        has_ended = False
        while not has_ended and len(frames) < MAX_FRAMES:
            actions = act(observations, generators)
            step = seen.step(actions)
            frames.append(drawn.step(actions)[0][0, 0])
            observations, total = step.observations, total + float(step.rewards[0])
            has_ended = bool(step.terminated[0] or step.truncated[0])
    return Episode(EVALUATION, total, len(frames) - 1), GAME_FRAMES_PER_SECOND


def _drawn(frame: Any) -> NDArray[np.uint8]:
    if not isinstance(frame, np.ndarray):
        raise SettingsError("this environment draws no pictures (render_mode rgb_array): it cannot be recorded")
    return frame
