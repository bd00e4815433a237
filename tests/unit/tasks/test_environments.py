"""Vectors of environments: seeds, ends of episodes, games, and a user's own environments."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lockstep.comm.cluster import Cluster
from lockstep.parallel.rank_grid import RankGrid
from lockstep.runtime.errors import SettingsError
from lockstep.settings import EnvSettings, ModelSettings, PpoSettings, Settings
from lockstep.tasks.environments import Environments, make_one
from lockstep.tasks.episodes import Episode, Episodes, Generators, play
from lockstep.tasks.ppo import Ppo
from lockstep.tasks.recording import record
from lockstep.tasks.rollout import Rollout
from lockstep.training.build import build_strategy

CARTPOLE = EnvSettings(id="CartPole-v1")
PONG = EnvSettings(id="ALE/Pong-v5", frame_stack=4)
CORRIDOR = '''
import gymnasium as gym
import numpy as np


class Corridor(gym.Env):
    """Walk to the end, where the reward is 1 and the episode terminates; it is truncated after `patience` steps."""

    def __init__(self, length=4, patience=6, render_mode=None):
        self.observation_space = gym.spaces.Box(0, length, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.length, self.patience = length, patience

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 0, 0
        return np.array([self.place], np.float32), {}

    def step(self, action):
        self.place, self.steps = self.place + action, self.steps + 1
        there = self.place == self.length
        return np.array([self.place], np.float32), float(there), there, self.steps == self.patience, {}
'''


@pytest.fixture
def corridor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EnvSettings]:
    (tmp_path / "my_walks.py").write_text(CORRIDOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the working folder is added to it
    yield EnvSettings(id="my_walks.Corridor", num_envs=2)
    sys.modules.pop("my_walks", None)


def _always(action: int, num_envs: int = 1) -> np.ndarray:
    return np.full(num_envs, action)


def test_an_environment_does_the_same_whichever_are_beside_it() -> None:
    pair, other = Environments(CARTPOLE, 2), Environments(CARTPOLE, 1)
    assert np.array_equal(pair.begin([3, 7])[1], other.begin([7])[0])
    for _ in range(60):  # beyond the ends of episodes
        mine, alone = pair.step(_always(1, 2)), other.step(_always(1))
        assert np.array_equal(mine.observations[1], alone.observations[0])
        assert mine.terminated[1] == alone.terminated[0]


def test_the_end_of_an_episode_is_told_from_the_end_of_time(corridor: EnvSettings) -> None:
    environments = Environments(corridor, 2)
    environments.begin([0, 1])
    for _ in range(3):
        environments.step(np.array([1, 0]))
    arrived = environments.step(np.array([1, 0]))
    assert (arrived.terminated.tolist(), arrived.truncated.tolist()) == ([True, False], [False, False])
    assert arrived.rewards.tolist() == [1.0, 0.0]
    assert arrived.observations.tolist() == [[0.0], [0.0]]  # of the next episode
    assert arrived.last_observations is None
    environments.step(np.array([0, 1]))
    late = environments.step(np.array([0, 1]))
    assert (late.terminated.tolist(), late.truncated.tolist()) == ([False, False], [False, True])
    assert late.last_observations is not None
    assert late.last_observations.tolist() == [[2.0]]


def test_a_value_is_taken_from_where_time_ended_and_not_from_where_the_walk_did(corridor: EnvSettings) -> None:
    """Next values: that of the last state of a truncated episode, 0 after a terminated one, and that of the present
    state at the end of the rollout.
    """
    settings = Settings(
        task="ppo", precision="float64", env=corridor, model=ModelSettings(name="mlp"), ppo=PpoSettings(num_steps=40)
    )
    task = Ppo(settings, Cluster.alone())
    strategy = build_strategy(Cluster.alone(), settings, task, RankGrid.of(settings, 0, 1))
    rollout: Rollout = next(task.build_loader(0, 1, strategy).rest_of_epoch())

    def value(place: float) -> float:
        with torch.no_grad():
            return float(task.outputs(strategy.model, torch.tensor([[place]]))[0, -1])

    num_seen = {"arrived": 0, "late": 0, "on the way": 0}
    for env in range(2):
        for step in range(40):
            place = float(rollout.observations[step, env, 0]) + float(rollout.actions[step, env])
            ends, arrived = bool(rollout.ends[step, env]), place == 4
            expected = 0.0 if arrived else value(place)
            assert float(rollout.next_values[step, env]) == pytest.approx(expected, abs=1e-12)
            assert ends or not arrived
            num_seen["arrived" if arrived else "late" if ends else "on the way"] += 1
    assert min(num_seen.values()) > 0
    assert float(rollout.episodes[2]) == num_seen["arrived"] + num_seen["late"]
    assert float(rollout.episodes[0]) == num_seen["arrived"]


def test_episodes_are_the_same_played_together_and_apart() -> None:
    def act(observations: np.ndarray, _: Generators) -> np.ndarray:
        return (observations[:, 2] > 0).astype(int)

    together = play(act, CARTPOLE, range(4))
    apart = [episode for number in range(4) for episode in play(act, CARTPOLE, range(number, number + 1))]
    assert together == apart
    assert len({episode.total_reward for episode in together}) > 1
    episodes = Episodes.of([together[:2], together[2:]])
    assert episodes.scores["return"] == np.mean([episode.total_reward for episode in together])
    assert episodes.scores["return_std"] == pytest.approx(np.std([e.total_reward for e in together], ddof=1))
    assert episodes.counts == {"num_episodes": 4}
    assert Episodes((Episode(0, 3.0, 5),)).spread == 0


def test_a_game_is_seen_grey_small_and_four_frames_at_once() -> None:
    environments = Environments(PONG, 2)
    assert environments.observation_space.shape == (4, 84, 84)
    first = environments.begin([1, 2])
    assert first.dtype == np.uint8
    other = Environments(PONG, 1)
    assert np.array_equal(first[1], other.begin([2])[0])
    for _ in range(20):
        assert np.array_equal(environments.step(_always(3, 2)).observations[1], other.step(_always(3)).observations[0])


def test_sticky_actions_change_the_game() -> None:
    plain, sticky = Environments(PONG, 1), Environments(replace(PONG, sticky_actions=0.25), 1)
    plain.begin([5])
    sticky.begin([5])
    differ = False
    for step in range(60):
        action = _always(2 + step % 2)
        differ |= not np.array_equal(plain.step(action).observations, sticky.step(action).observations)
    assert differ


@pytest.mark.parametrize("settings", [CARTPOLE, PONG], ids=["cartpole", "pong"])
def test_an_episode_is_recorded_as_it_was_played(settings: EnvSettings, tmp_path: Path) -> None:
    def act(observations: np.ndarray, _: Generators) -> np.ndarray:
        return np.full(len(observations), 0)

    episode = record(act, settings, tmp_path / "play.gif")
    (played,) = play(act, settings, range(1))
    assert episode == played
    with Image.open(tmp_path / "play.gif") as picture:
        assert picture.is_animated  # type: ignore[attr-defined]
        assert min(picture.size) >= 160


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EnvSettings(id="Nowhere-v0"), "env.id is Nowhere-v0: it cannot be made"),
        (EnvSettings(id="CartPole-v1", options={"gravity": 9}), "env.options {'gravity': 9}"),
        (EnvSettings(id="no_such_package.Env"), "needs the module no_such_package"),
        (EnvSettings(id="pathlib.NoSuchEnv"), "has no NoSuchEnv"),
        (EnvSettings(id="ALE/NoSuchGame-v5"), "env.id is ALE/NoSuchGame-v5"),
        (EnvSettings(id="ALE/Pong-v5", options={"lives": 3}), "env.options {'lives': 3}"),
    ],
)
def test_an_environment_that_cannot_be_made_is_told(settings: EnvSettings, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Environments(settings, 1)


def test_observations_of_another_kind_become_numbers_and_can_be_stacked() -> None:
    walk = EnvSettings(id="FrozenLake-v1", frame_stack=3)  # one of 16 fields
    assert make_one(walk).observation_space.shape == (3, 16)


def test_steering_of_another_range_is_brought_to_one() -> None:
    space = make_one(EnvSettings(id="Pendulum-v1")).action_space  # a torque of -2 ... 2
    assert (space.low.tolist(), space.high.tolist()) == ([-1.0], [1.0])  # type: ignore[attr-defined]


def test_drawn_actions_are_those_of_the_episodes_seed() -> None:
    env = EnvSettings(num_evaluation_episodes=4, evaluation_actions="drawn")
    task = Ppo(Settings(task="ppo", env=env, model=ModelSettings(name="mlp")), Cluster.alone())
    model = task.build_model()

    def outcome(shards: range) -> list[Episode]:
        return [episode for shard in shards for episode in play(partial(task.act, model), env, range(shard, shard + 1))]

    together = task.evaluate(model, model, 0, 1)
    assert list(together.episodes) == outcome(range(4))
    likeliest = replace(task.settings, env=replace(env, evaluation_actions="likeliest"))
    assert list(Ppo(likeliest, Cluster.alone()).evaluate(model, model, 0, 1).episodes) != list(together.episodes)
