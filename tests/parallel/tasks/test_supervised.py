"""Any problem: a loss over a global weight that differs by rank, under every strategy, is that of one rank to 1e-10."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.comm.cluster import Cluster
from lockstep.runtime.errors import SettingsError, UserCodeError
from lockstep.settings import DataSettings, GradientSettings, OptimizerSettings, Settings
from lockstep.tasks.supervised import Evaluation, SupervisedTask
from lockstep.training.build import build_task, build_trainer
from lockstep.training.run_folder import RunFolder
from tests.parallel.building import merged_model
from tests.reference.problems import Weather, weather

TOLERANCE = 1e-10
NUM_UPDATES = 12  # of 130 samples in batches of 25: the last of an epoch has 5
OWN = "tests.reference.problems."
STRATEGIES = ("replicated", "zero1", "zero2", "zero3")
SETTINGS = Settings(
    task=f"{OWN}WeatherInBlocks",
    num_epochs=2,
    precision="float64",
    log_interval=1,
    data=DataSettings(batch_size=25, sharding="hash"),
    optimizer=OptimizerSettings(name="adamw", learning_rate=0.01),
    gradient=GradientSettings(clip_norm=1.0),
)
REGRESS = replace(
    SETTINGS,
    task="regress",
    options={"width": 4, "num_blocks": 1},
    data=replace(SETTINGS.data, name=f"{OWN}fields"),
)


class Run:
    """One training to its end, and what it left."""

    def __init__(self, cluster: Cluster, settings: Settings, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trainer = build_trainer(cluster, settings, build_task(settings, cluster), RunFolder(folder))
        evaluation = trainer.train()
        assert isinstance(evaluation, Evaluation)
        self.evaluation = evaluation
        self.num_skipped = trainer.progress.num_skipped
        self.merged: dict[str, Tensor] | None = merged_model(cluster, trainer.strategy)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.curves = [
            {name: value for name, value in record.items() if isinstance(value, float)} for record in records
        ]


def _assert_same(cluster: Cluster, settings: Settings, tmp_path: Path) -> None:
    together = Run(cluster, settings, cluster.on_root(lambda: tmp_path / "together"))
    if not cluster.is_root:
        return
    alone = Run(Cluster.alone(), replace(settings, parallel="replicated"), tmp_path / "alone")
    assert together.merged is not None
    assert alone.merged is not None
    assert len(alone.curves) == NUM_UPDATES + 2
    for found, expected in zip(together.curves, alone.curves, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)
    for name, tensor in alone.merged.items():
        torch.testing.assert_close(together.merged[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    assert together.evaluation.scores == pytest.approx(alone.evaluation.scores, rel=TOLERANCE)


def _cases(soon: set[tuple[int, str]]) -> list[Any]:
    """Numbers of ranks and strategies: those of `soon` for every run, the others for thorough ones."""
    cases = [(size, how) for size in (2, 3, 4) for how in STRATEGIES]
    return [
        pytest.param(*case, marks=[pytest.mark.world_size(case[0]), *([] if case in soon else [pytest.mark.thorough])])
        for case in cases
    ]


@pytest.mark.parametrize(("size", "how"), _cases({(2, "replicated"), (3, "zero1"), (3, "zero3"), (4, "zero2")}))
def test_a_weighted_loss_of_two_inputs(cluster: Cluster, size: int, how: Any, tmp_path: Path) -> None:
    assert cluster.size == size
    _assert_same(cluster, replace(SETTINGS, parallel=how), tmp_path)


@pytest.mark.parametrize(("size", "how"), _cases({(3, "replicated"), (2, "zero3")}))
def test_regression(cluster: Cluster, size: int, how: Any, tmp_path: Path) -> None:
    assert cluster.size == size
    _assert_same(cluster, replace(REGRESS, parallel=how), tmp_path)


@pytest.mark.world_size(4)
def test_a_pipeline_with_replicas(cluster: Cluster, tmp_path: Path) -> None:
    """Its first stage alone sees the inputs, its last one alone the weight."""
    pipeline = replace(SETTINGS.pipeline, num_stages=2)
    _assert_same(cluster, replace(REGRESS, parallel="pipeline", pipeline=pipeline), tmp_path)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("how", ["replicated", "zero3"])
def test_micro_batches_of_items_of_which_some_ranks_have_none(cluster: Cluster, how: Any, tmp_path: Path) -> None:
    """Batches of 4 samples on 3 ranks, in two micro-batches; the last batch of an epoch has 2."""
    settings = replace(
        SETTINGS,
        task=f"{OWN}WeatherInItems",
        parallel=how,
        num_epochs=1,
        data=replace(SETTINGS.data, batch_size=12),
        gradient=replace(SETTINGS.gradient, num_micro_batches=6),
    )
    together = Run(cluster, settings, cluster.on_root(lambda: tmp_path / "together"))
    alone = Run(Cluster.alone(), replace(settings, parallel="replicated"), tmp_path / f"alone-{cluster.rank}")
    assert [found["loss"] for found in together.curves] == pytest.approx(
        [one["loss"] for one in alone.curves], rel=1e-10
    )


@pytest.mark.world_size(2)
@pytest.mark.parametrize("wire", ["full", "fp16"])
def test_without_any_weight_the_update_is_skipped(cluster: Cluster, wire: Any, tmp_path: Path) -> None:
    settings = replace(
        SETTINGS, task=f"{OWN}Unknown", precision="float32", gradient=GradientSettings(wire=wire), log_interval=1
    )
    run = Run(cluster, settings, cluster.on_root(lambda: tmp_path / "run"))
    assert run.num_skipped == NUM_UPDATES
    if run.merged is not None:
        untouched = build_task(settings, Cluster.alone()).build_model().state_dict()
        assert all(torch.equal(run.merged[name], tensor) for name, tensor in untouched.items())


@pytest.mark.world_size(2)
def test_heavy_samples_are_sent_in_two_bytes(cluster: Cluster, tmp_path: Path) -> None:
    """Sums of a million times the mean overflow float16, whose largest number is 65,504."""
    settings = replace(SETTINGS, task=f"{OWN}Weather", precision="float32", gradient=GradientSettings(wire="fp16"))
    runs = [
        Run(cluster, replace(settings, task=f"{OWN}{task}"), cluster.on_root(lambda: tmp_path / task))  # noqa: B023
        for task in ("Weather", "Heavy")
    ]
    losses = [[record["loss"] for record in run.curves] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # of the eleven bits of float16
    assert losses[0][-1] < losses[0][0]


@pytest.mark.world_size(1)
def test_a_part_of_the_training_data_is_held_out(cluster: Cluster) -> None:
    task = build_task(replace(SETTINGS, task=f"{OWN}Split", data=DataSettings(held_out_share=0.3)), cluster)
    assert isinstance(task, SupervisedTask)
    left = [
        next(part.batches([np.arange(len(part))], torch.float64))["left"] for part in (task.train_set, task.held_out)
    ]
    assert torch.equal(torch.cat(left).sort(0).values, weather(train=True)["left"].sort(0).values)
    assert 25 < len(task.held_out) < 55


@pytest.mark.world_size(2)
@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_wrong_weight_of_one_rank_ends_all(
    cluster: Cluster, weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: Weather, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        return outputs.square().sum(), torch.tensor(weight if cluster.rank == 1 else 500.0)

    monkeypatch.setattr(Weather, "loss", loss)
    with pytest.raises(UserCodeError, match="weight of the loss is negative or not finite") as caught:
        Run(cluster, SETTINGS, cluster.on_root(lambda: tmp_path / "run"))
    assert caught.value.shared


@pytest.mark.world_size(2)
def test_adasum_needs_samples_that_weigh_alike(cluster: Cluster) -> None:
    with pytest.raises(SettingsError, match="weigh alike"):
        build_task(replace(SETTINGS, gradient=GradientSettings(reduction="adasum")), cluster)
