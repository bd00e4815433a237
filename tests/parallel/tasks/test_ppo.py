"""PPO over real ranks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.comm.cluster import Cluster
from lockstep.runtime.errors import SettingsError
from lockstep.settings import CheckpointSettings, EnvSettings, ModelSettings, OptimizerSettings, PpoSettings, Settings
from lockstep.tasks.ppo import Ppo
from lockstep.tasks.rollout_preemption import RolloutPreemption
from lockstep.training.build import build_trainer
from lockstep.training.run_folder import RunFolder
from lockstep.training.trainer import Trainer
from tests.parallel.building import whole_values
from tests.parallel.tasks.test_evaluations import KilledAtCheckpoint
from tests.parallel.training.test_resume import Stop

SETTINGS = Settings(
    task="ppo",
    precision="float64",
    env=EnvSettings(num_envs=5, num_evaluation_episodes=5),
    model=ModelSettings(name="mlp", mlp_widths=[16]),
    ppo=PpoSettings(total_steps=5 * 32 * 4, num_steps=32, num_epochs=3, num_minibatches=3),
    optimizer=OptimizerSettings(name="adam", learning_rate=3e-3, weight_decay=0.0),
    checkpoint=CheckpointSettings(interval=2),
    log_interval=1,
)
PENDULUM = replace(SETTINGS, env=replace(SETTINGS.env, id="Pendulum-v1"))


def _build(cluster: Cluster, settings: Settings, folder: Path, resume: bool = False) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    return build_trainer(cluster, settings, Ppo(settings, cluster), RunFolder(folder), resume)


def _run(cluster: Cluster, settings: Settings, folder: Path) -> tuple[list[dict[str, float]], dict[str, Tensor], str]:
    """Train; return the logged metrics, the final model and optimizer state, and the evaluation."""
    trainer = _build(cluster, settings, folder)
    evaluation = trainer.train()
    lines = (folder / "metrics.jsonl").read_text().splitlines() if cluster.is_root else []
    return [json.loads(line) for line in lines], whole_values(trainer.strategy), str(evaluation)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("settings", [SETTINGS, PENDULUM], ids=["discrete", "continuous"])
def test_two_ranks_do_what_one_does_with_the_same_environments(
    cluster: Cluster, tmp_path: Path, settings: Settings
) -> None:
    """5 environments, on 2 ranks 2 and 3: statistics of every update, weights and evaluation are the same."""
    folder = cluster.on_root(lambda: tmp_path)
    lines, values, evaluation = _run(cluster, settings, folder / "together")
    alone_lines, alone_values, alone_evaluation = _run(Cluster.alone(), settings, folder / f"alone-{cluster.rank}")
    if cluster.is_root:
        assert len(lines) == len(alone_lines) == 4 + 1
        for line, alone in zip(lines, alone_lines, strict=True):
            assert line.pop("kind") == alone.pop("kind")
            assert line == pytest.approx(alone, rel=1e-9, abs=1e-9)
        assert len({line["entropy"] for line in lines if "entropy" in line}) == 4  # it does learn
    for name, tensor in alone_values.items():
        torch.testing.assert_close(values[name], tensor, rtol=1e-8, atol=1e-10, msg=name)
    assert evaluation == alone_evaluation


@pytest.mark.world_size(2)
def test_a_run_that_goes_on_from_a_checkpoint_is_the_run_that_never_stopped(cluster: Cluster, tmp_path: Path) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    _, never, never_evaluation = _run(cluster, SETTINGS, folder / "never")
    stopped = _build(cluster, SETTINGS, folder / "stopped")
    for _ in range(3):  # one more than at the checkpoint
        stopped.update(next(stopped.loader.rest_of_epoch()))
        stopped.loader.epoch = stopped.progress.step
    stopped.writer.wait()
    trainer = _build(cluster, SETTINGS, folder / "stopped", resume=True)
    assert trainer.progress.step == 2
    evaluation = trainer.train()
    assert str(evaluation) == never_evaluation
    found = whole_values(trainer.strategy)
    assert all(torch.equal(found[name], tensor) for name, tensor in never.items())


@pytest.mark.world_size(2)
@pytest.mark.parametrize("num_done", [1, 2, 3])
def test_an_evaluation_that_was_due_at_the_checkpoint_is_made_by_the_one_who_goes_on(
    cluster: Cluster, tmp_path: Path, num_done: int
) -> None:
    """Killed between the checkpoint and the evaluation of an update: each record once, as without a stop."""
    folder = cluster.on_root(lambda: tmp_path)
    settings = replace(SETTINGS, evaluate_every=1, checkpoint=CheckpointSettings(interval=1))
    never, *_ = _run(cluster, settings, folder / "never")
    stopped = _build(cluster, settings, folder / "stopped")

    stopped.hooks.append(KilledAtCheckpoint(num_done))
    with pytest.raises(Stop):
        stopped.train()
    cluster.barrier()
    trainer = _build(cluster, settings, folder / "stopped", resume=True)
    assert trainer.progress.step == num_done
    trainer.train()
    if cluster.is_root:
        found = [json.loads(line) for line in (folder / "stopped" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in found if line["kind"] == "held_out"] == [1, 2, 3, 4]
        assert found == never


@pytest.mark.world_size(2)
def test_zero1_learns_what_replicas_learn(cluster: Cluster, tmp_path: Path) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    lines, _, evaluation = _run(cluster, SETTINGS, folder / "replicated")
    parted, _, parted_evaluation = _run(cluster, replace(SETTINGS, parallel="zero1"), folder / "zero1")
    assert evaluation == parted_evaluation
    if cluster.is_root:
        entropies = [[line["entropy"] for line in each if "entropy" in line] for each in (lines, parted)]
        assert entropies[0] == pytest.approx(entropies[1], rel=1e-9)


@pytest.mark.world_size(2)
def test_all_ranks_end_an_update_together_when_the_policy_has_gone_too_far(cluster: Cluster, tmp_path: Path) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    cautious = replace(SETTINGS, ppo=replace(SETTINGS.ppo, target_kl=1e-9, total_steps=5 * 32))
    trainer = _build(cluster, cautious, folder / "cautious")
    rollout = next(trainer.loader.rest_of_epoch())
    metric_sums = trainer.task.learn(rollout, trainer.strategy, seed=0)
    done = cluster.all_gather_object(float(metric_sums[5]))
    assert done == [2 * 32, 3 * 32]  # each step once: one epoch of three
    trainer.strategy.compare("after an update that ended early")


@pytest.mark.world_size(3)
def test_a_race_tells_who_has_finished(cluster: Cluster) -> None:
    preemption = RolloutPreemption(cluster)
    for round_ in range(3):
        cluster.barrier()
        if cluster.rank == 2:
            while preemption.num_finished() < 2:
                pass
        else:
            assert preemption.num_finished() <= 1
        assert preemption.finish(10 * round_ + cluster.rank) == [10 * round_, 10 * round_ + 1, 10 * round_ + 2]
    cluster.barrier()


@pytest.mark.world_size(2)
def test_a_slow_rank_is_preempted_and_what_it_did_counts_once(cluster: Cluster, tmp_path: Path) -> None:
    """Rank 1 collects only a quarter of its steps; each step has the same weight as one of the other rank."""
    folder = cluster.on_root(lambda: tmp_path)
    settings = replace(SETTINGS, ppo=replace(SETTINGS.ppo, preemption_threshold=0.5))
    trainer = _build(cluster, settings, folder / "preempted")
    environments = trainer.task.environments  # type: ignore[attr-defined]
    step = environments.step
    if cluster.rank == 1:

        def slow(actions: object) -> object:
            np.random.default_rng(0).random(3_000_000)  # busy like an environment, not asleep
            return step(actions)

        environments.step = slow
    rollout = next(trainer.loader.rest_of_epoch())
    assert rollout.steps_of_ranks[0] == 32
    assert 8 <= rollout.steps_of_ranks[1] < 32
    assert rollout.global_size == 2 * 32 + 3 * rollout.steps_of_ranks[1]
    metric_sums = trainer.task.learn(rollout, trainer.strategy, seed=0)
    assert cluster.all_gather_object(float(metric_sums[5])) == [3 * 2 * 32, 3 * 3 * rollout.steps_of_ranks[1]]
    trainer.strategy.compare("after a preempted update")


@pytest.mark.world_size(3)
def test_fewer_environments_than_ranks_are_refused(cluster: Cluster) -> None:
    with pytest.raises(SettingsError, match="each of the 3 ranks needs one or more") as refused:
        Ppo(replace(SETTINGS, env=EnvSettings(num_envs=2)), cluster)
    assert refused.value.shared
