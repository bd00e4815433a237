"""Numbers of Lockstep beside those of other libraries, or of formulas written out here."""

import copy
import hashlib
import math
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import (  # type: ignore[import-untyped]
    accuracy_score,
    confusion_matrix,
    log_loss,
    top_k_accuracy_score,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from lockstep.comm.cluster import Cluster
from lockstep.data.built_in import load_synthetic
from lockstep.data.loader import BatchLoader
from lockstep.parallel.replicated import Replicated
from lockstep.parallel.weight_average import exchange_with_average, keep_average
from lockstep.runtime.seeding import update_seed
from lockstep.settings import DataSettings, EnvSettings, ModelSettings, OptimizerSettings, PpoSettings, Settings
from lockstep.tasks.classify import Classify
from lockstep.tasks.environments import Environments
from lockstep.tasks.metric_sums import MetricLayout
from lockstep.tasks.ppo import COUNT, LOSSES, Ppo
from lockstep.training.optim import learning_rate_at

F64 = torch.float64


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _classify(**data: Any) -> Classify:
    settings = Settings(precision="float64", data=DataSettings(name="synthetic", num_samples=60, **data))
    return Classify(settings, Cluster.alone())


def test_the_scores_of_an_evaluation_are_scikit_learns() -> None:
    task, scores, labels = _classify(), _random(60, 10), torch.from_numpy(np.arange(60) * 7 % 10)
    likelihoods, names = scores.softmax(1).numpy(), range(10)
    metrics = task.held_out_metrics(scores.log_softmax(1), (torch.empty(0), labels))
    layout = MetricLayout.of(metrics)
    found, counts = layout.unpack(layout.pack(metrics, torch.device("cpu")))
    expected = {
        "accuracy": accuracy_score(labels, likelihoods.argmax(1)),
        "loss": log_loss(labels, likelihoods, labels=names),
        "top5_accuracy": top_k_accuracy_score(labels, likelihoods, k=5, labels=names),
    }
    assert found == pytest.approx(expected, rel=1e-12)
    assert counts["confusion"].tolist() == confusion_matrix(labels, likelihoods.argmax(1), labels=names).tolist()


def test_mixup_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which mixes with the sample before in place of the one after, and has soft labels in float32."""
    images = load_synthetic(24, train=True)
    (plain,), (mixed,) = (
        list(BatchLoader(images, 24, "contiguous", 0, 1, 3, F64, mixup).rest_of_epoch()) for mixup in (0.0, 0.7)
    )
    share, (inputs, labels) = mixed.data[3], plain.data
    monkeypatch.setattr(v2.MixUp, "make_params", lambda *_: {"lam": share})
    theirs, soft = v2.MixUp(alpha=0.7, num_classes=10)(inputs.flip(0), labels.flip(0))
    torch.testing.assert_close(mixed.inputs, theirs.flip(0), rtol=1e-12, atol=1e-12)
    scores = _random(24, 10)
    found, weight = _classify(mixup=0.7).loss(scores.log_softmax(1), mixed.data)
    expected = F.cross_entropy(scores, soft.flip(0).double(), reduction="sum")
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert weight == 24
    assert abs(share - 0.5) > 0.05  # or swapped weights would pass


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_average_of_weights_is_that_of_pytorch(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    kind: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    optimizer = kind(model.parameters(), lr=0.1)
    keep_average(optimizer, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(20):
        optimizer.zero_grad()
        model(_random(5, 4, seed=step)).square().sum().backward()
        optimizer.step()
        theirs.update_parameters(model)
    exchange_with_average(optimizer)
    for found, expected in zip(model.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
def test_schedules_are_pytorchs(schedule: Literal["cosine", "linear", "step"], warmup: int) -> None:
    steps, rate = 40, 0.3
    settings = OptimizerSettings(learning_rate=rate, schedule=schedule, warmup_steps=warmup, step_at=[0.5, 0.75])
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=rate)
    after: Any = {
        "cosine": lambda: CosineAnnealingLR(optimizer, steps - warmup),
        "linear": lambda: LinearLR(optimizer, 1.0, 0.0, steps - warmup),
        "step": lambda: MultiStepLR(optimizer, [steps // 2 - warmup, steps * 3 // 4 - warmup], gamma=0.1),
    }[schedule]
    theirs = (
        SequentialLR(optimizer, [LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1), after()], [warmup])
        if warmup
        else after()
    )
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_at(step, steps, settings, num_ranks=1) == pytest.approx(expected, rel=1e-12), step
        optimizer.step()
        theirs.step()


def test_seeds_of_updates_are_as_docs_exactness_says() -> None:
    """And differ for any two updates and any two shards: no two ranks drop the same units."""
    digest = hashlib.sha256(b"5 17 3").digest()
    assert update_seed(5, 17, 3) == int.from_bytes(digest[:8], "big") // 2
    assert len({update_seed(5, step, shard) for step in range(50) for shard in range(8)}) == 400


@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_an_update_of_ppo_is_that_of_loops_over_the_papers_equations(num_minibatches: int) -> None:
    """Two epochs by SGD: advantages, losses, divergence, clip fraction and the new weights.

    After the first step the ratio is not 1, so that clipping and the divergence count. Each environment's steps are
    shuffled by its own generator, and a minibatch has equally many of each.
    """
    settings = Settings(
        task="ppo",
        precision="float64",
        env=EnvSettings(id="CartPole-v1", num_envs=2),
        model=ModelSettings(name="mlp", mlp_widths=[8]),
        ppo=PpoSettings(
            num_steps=16, num_epochs=2, num_minibatches=num_minibatches, clip=0.02, gamma=0.9, gae_lambda=0.8
        ),
        optimizer=OptimizerSettings(name="sgd", learning_rate=0.5, momentum=0.0, weight_decay=0.0),
    )
    cluster = Cluster.alone()
    task = Ppo(settings, cluster)
    model = task.build_model()
    plain = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    strategy = Replicated(model, optimizer, cluster)
    item = next(task.build_loader(0, 1, strategy).rest_of_epoch())
    generators = copy.deepcopy(item.generators)
    metric_sums = task.learn(item, strategy, seed=0)

    num_steps, num_envs = item.rewards.shape
    assert (num_steps, num_envs) == (16, 2)
    values = item.outputs[..., 2]
    advantages = torch.zeros(num_steps, num_envs, dtype=F64)
    for env in range(num_envs):  # equation 11
        for step in range(num_steps):
            for later in range(step, num_steps):
                delta = item.rewards[later, env] + 0.9 * item.next_values[later, env] - values[later, env]
                advantages[step, env] += (0.9 * 0.8) ** (later - step) * delta
                if item.ends[later, env]:
                    break
    returns, flat = (advantages + values).flatten(), advantages.flatten().numpy()
    normalised = torch.from_numpy((flat - flat.mean()) / (flat.std() + 1e-8))
    actions = item.actions.flatten()
    old = torch.distributions.Categorical(logits=item.outputs[..., :2].flatten(0, 1)).log_prob(actions)
    ppo, expected = settings.ppo, np.zeros(len(LOSSES))
    theirs = torch.optim.SGD(plain.parameters(), lr=0.5)
    orders = [generator.permuted(np.tile(np.arange(num_steps), (2, 1)), axis=1) for generator in generators]
    for epoch in range(2):
        for part in np.split(np.arange(num_steps), num_minibatches):
            rows = torch.tensor([step * num_envs + env for env in range(num_envs) for step in orders[env][epoch][part]])
            outputs = plain(item.observations.flatten(0, 1)[rows].double())
            policy = torch.distributions.Categorical(logits=outputs[:, :2])
            ratio = (policy.log_prob(actions[rows]) - old[rows]).exp()
            clipped = ratio.clamp(1 - 0.02, 1 + 0.02)
            policy_loss = -torch.minimum(ratio * normalised[rows], clipped * normalised[rows]).mean()  # equation 7
            value_loss = F.mse_loss(outputs[:, 2], returns[rows])
            entropy = policy.entropy().mean()
            loss = policy_loss + ppo.value_coefficient * value_loss - ppo.entropy_coefficient * entropy  # equation 9
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            divergence = (ratio - 1 - ratio.log()).mean()
            fraction = ((ratio - 1).abs() > 0.02).double().mean()
            expected += np.array([each.item() for each in (policy_loss, value_loss, entropy, divergence, fraction)])
    assert expected[LOSSES.index("clip_fraction")] > 0
    found = (metric_sums[: len(LOSSES)] / metric_sums[COUNT]).tolist()
    assert found == pytest.approx(
        (expected / (2 * num_minibatches)).tolist(), rel=1e-9
    )  # the variance is a difference of sums
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_rewards_are_clipped_to_their_sign_where_asked() -> None:
    """Mnih et al. 2015: -1, 0 or 1. Pendulum's rewards lie between -16 and 0."""
    settings = Settings(
        task="ppo",
        env=EnvSettings(id="Pendulum-v1", num_envs=1),
        model=ModelSettings(name="mlp", mlp_widths=[8]),
        ppo=PpoSettings(num_steps=16, num_minibatches=1),
    )
    found = {}
    for clip in (True, False):
        chosen = replace(settings, ppo=replace(settings.ppo, clip_rewards=clip))
        task = Ppo(chosen, Cluster.alone())
        model = task.build_model()
        strategy = Replicated(model, torch.optim.SGD(model.parameters(), lr=0.1), Cluster.alone())
        found[clip] = next(task.build_loader(0, 1, strategy).rest_of_epoch()).rewards.flatten().tolist()
    assert found[True] == [math.copysign(1, reward) for reward in found[False]]
    assert min(found[False]) < -1


def test_an_agent_is_evaluated_in_other_episodes_than_it_has_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same ones for every seed of a run, so that runs can be compared."""
    begun: list[list[int]] = []
    begin = Environments.begin

    def record(self: Environments, seeds: list[int]) -> Any:
        begun.append(list(seeds))
        return begin(self, seeds)

    monkeypatch.setattr(Environments, "begin", record)
    of_evaluations, of_training = [], []
    for seed in (0, 1):
        settings = Settings(
            task="ppo",
            seed=seed,
            env=EnvSettings(id="CartPole-v1", num_envs=8, num_evaluation_episodes=4),
            model=ModelSettings(name="mlp", mlp_widths=[8]),
            ppo=PpoSettings(num_steps=2, num_minibatches=1),
        )
        task = Ppo(settings, Cluster.alone())
        model = task.build_model()
        loader = task.build_loader(
            0, 1, Replicated(model, torch.optim.SGD(model.parameters(), lr=0.1), Cluster.alone())
        )
        for _ in range(20):
            next(loader.rest_of_epoch())
            loader.epoch += 1
            loader.after_checkpoint()
        of_training.append(list(chain(*begun)))
        begun.clear()
        task.evaluate(model, lambda inputs: task.outputs(model, inputs), 0, 1)  # noqa: B023
        of_evaluations.append(list(chain(*begun)))
        begun.clear()
    assert of_evaluations[0] == of_evaluations[1]
    assert len(set(of_evaluations[0])) == 4
    assert len({*of_training[0], *of_training[1]}) == 2 * 20 * 8  # of other seeds other episodes
    assert not {*of_training[0], *of_training[1]} & set(of_evaluations[0])
