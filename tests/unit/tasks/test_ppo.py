"""The terms of PPO, each compared with a direct implementation of the paper's formula."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.comm.cluster import Cluster
from lockstep.models.actions import Actions, Categorical, Gaussian, build_actions
from lockstep.models.policy import mlp_blocks, nature_cnn_blocks
from lockstep.runtime.errors import SettingsError
from lockstep.settings import EnvSettings, ModelSettings, PpoSettings, Settings
from lockstep.tasks.ppo import COUNT, Minibatch, Ppo, generalised_advantages, normalise

DISCRETE = gym.spaces.Discrete(3)
BOX = gym.spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)


def _task(**ppo: float) -> Ppo:
    settings = Settings(
        task="ppo",
        precision="float64",
        model=ModelSettings(name="mlp"),
        ppo=PpoSettings(**ppo),  # type: ignore[arg-type]
    )
    return Ppo(settings, Cluster.alone())


def test_advantages_are_discounted_sums_of_deltas() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, 7, 2, generator=generator, dtype=torch.float64)
    ends = torch.zeros(7, 2, dtype=torch.bool)
    ends[2, 0] = ends[6, 1] = True
    gamma, lam = 0.9, 0.8
    found = generalised_advantages(rewards, values, next_values, ends, gamma, lam)
    deltas = rewards + gamma * next_values - values
    for env in range(2):
        for step in range(7):
            expected, weight = 0.0, 1.0
            for later in range(step, 7):
                expected += weight * float(deltas[later, env])
                weight *= gamma * lam
                if ends[later, env]:
                    break
            assert float(found[step, env]) == pytest.approx(expected, rel=1e-12)


def test_with_lambda_1_an_advantage_is_the_return_less_the_value() -> None:
    rewards = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    values = torch.tensor([[0.5], [0.25], [0.125]], dtype=torch.float64)
    next_values = torch.cat([values[1:], torch.tensor([[8.0]], dtype=torch.float64)])
    found = generalised_advantages(rewards, values, next_values, torch.zeros(3, 1, dtype=torch.bool), 0.5, 1.0)
    assert float(found[0] + values[0]) == 1 + 0.5 * 2 + 0.25 * 4 + 0.125 * 8


def test_normalised_advantages_have_mean_0_and_deviation_1() -> None:
    advantages = torch.arange(10, dtype=torch.float64) ** 2
    found = normalise(advantages, Cluster.alone())
    expected = (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)  # the variance is a difference of sums


def _minibatch(actions: Tensor, log_probs: Tensor) -> Minibatch:
    generator = torch.Generator().manual_seed(2)
    count = len(actions)
    advantages, returns, values = torch.randn(3, count, generator=generator, dtype=torch.float64)
    return Minibatch(torch.zeros(count, 4), count, actions, log_probs, advantages, returns, values)


@pytest.mark.parametrize("clip_value", [None, 0.1])
def test_the_loss_is_equation_9(clip_value: float | None) -> None:
    settings = {"clip": 0.2, "clip_value": clip_value, "value_coefficient": 0.7, "entropy_coefficient": 0.03}
    task = _task(**{name: value for name, value in settings.items() if value is not None})
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    actions = torch.tensor([0, 1, 0, 1, 1, 0])
    old = torch.randn(6, generator=generator, dtype=torch.float64) * 0.3 - 0.7
    batch = _minibatch(actions, old)
    loss, metric_sums = task.loss_sum(outputs, batch)
    expected = 0.0
    for row in range(6):
        logits, value = outputs[row, :2].tolist(), float(outputs[row, 2])
        total = sum(math.exp(logit) for logit in logits)
        probabilities = [math.exp(logit) / total for logit in logits]
        ratio = probabilities[int(actions[row])] / math.exp(float(old[row]))
        advantage = float(batch.advantages[row])
        surrogate = min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
        value_loss = (value - float(batch.returns[row])) ** 2
        if clip_value is not None:
            before = float(batch.values[row])
            near = before + max(-clip_value, min(clip_value, value - before))
            value_loss = max(value_loss, (near - float(batch.returns[row])) ** 2)
        entropy = -sum(p * math.log(p) for p in probabilities)
        expected += -surrogate + 0.7 * value_loss - 0.03 * entropy
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert metric_sums[COUNT] == 6
    assert len(metric_sums) == COUNT + 1


def test_the_divergence_is_0_where_nothing_has_changed() -> None:
    task = _task()
    outputs = torch.randn(5, 3, dtype=torch.float64)
    actions = torch.tensor([0, 1, 1, 0, 1])
    old = outputs[:, :2].log_softmax(1)[range(5), actions]
    scores = task.scores([*task.loss_sum(outputs, _minibatch(actions, old))[1].tolist(), 0, 0, 0])
    assert scores["approx_kl"] == pytest.approx(0, abs=1e-14)
    assert scores["clip_fraction"] == 0
    assert "return" not in scores
    assert task.scores([0.0] * task.num_metric_sums) == {}


@pytest.mark.parametrize("actions", [Categorical(DISCRETE), Gaussian(BOX)], ids=["discrete", "continuous"])
def test_log_probabilities_and_entropy_are_those_of_torch(actions: Actions) -> None:
    outputs = torch.randn(8, actions.num_outputs, dtype=torch.float64)
    noise = torch.from_numpy(actions.noise(np.random.default_rng(0), 8))
    chosen = actions.sample(outputs, noise)
    reference: torch.distributions.Distribution
    if isinstance(actions, Categorical):
        reference = torch.distributions.Categorical(logits=outputs)
        expected = reference.log_prob(chosen), reference.entropy()
    else:
        reference = torch.distributions.Normal(outputs[:, :2], outputs[:, 2:].exp())
        expected = reference.log_prob(chosen).sum(1), reference.entropy().sum(1)
    for found, other in zip(actions.log_prob_and_entropy(outputs, chosen), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)


def test_samples_are_distributed_as_the_policy_says() -> None:
    actions = Categorical(DISCRETE)
    probabilities = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    count = 200_000
    noise = torch.from_numpy(actions.noise(np.random.default_rng(0), count))
    drawn = actions.sample(probabilities.log().expand(count, 3), noise)
    found = torch.bincount(drawn, minlength=3) / count
    torch.testing.assert_close(found.double(), probabilities, rtol=0, atol=0.004)  # 3.6 standard errors
    assert torch.equal(actions.mode(probabilities.log()[None]), torch.tensor([1]))


def test_environments_get_actions_within_their_bounds() -> None:
    continuous = Gaussian(BOX).for_environments(torch.tensor([[3.0, -0.5], [0.0, -7.0]], dtype=torch.float64))
    assert continuous.dtype == np.float32
    assert continuous.tolist() == [[1.0, -0.5], [0.0, -1.0]]
    assert Categorical(gym.spaces.Discrete(3, start=5)).for_environments(torch.tensor([0, 2])).tolist() == [5, 7]
    with pytest.raises(SettingsError, match="one of several"):
        build_actions(gym.spaces.MultiBinary(3))


@pytest.mark.parametrize("gaussian", [False, True])
def test_a_policy_gives_what_its_actions_take_and_a_value(gaussian: bool) -> None:
    width = 2 * 6 + 1 if gaussian else 6 + 1
    mlp = torch.nn.Sequential(*(block for _, block in mlp_blocks((3, 2), 6, gaussian, [8, 8])))
    assert mlp(torch.zeros(5, 3, 2)).shape == (5, width)
    cnn = torch.nn.Sequential(*(block for _, block in nature_cnn_blocks((4, 84, 84), 6, gaussian)))
    assert cnn(torch.zeros(2, 4, 84, 84)).shape == (2, width)
    assert sum(parameter.numel() for parameter in cnn.parameters()) == 1_687_719 + (6 if gaussian else 0)


def test_the_number_of_updates_is_what_fits_into_the_steps() -> None:
    assert _task(total_steps=10_000, num_steps=128).num_epochs == 9  # of 8 environments
    assert EnvSettings().num_envs == 8
