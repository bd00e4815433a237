"""The pipeline: cuts, schedules, replicas, and what is refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lockstep.benchmark.sharding import proof_settings
from lockstep.comm.cluster import Cluster
from lockstep.parallel.merge import state_digest
from lockstep.parallel.pipeline import Pipeline
from lockstep.parallel.rank_grid import RankGrid
from lockstep.parallel.step import train_step
from lockstep.runtime.errors import NonFiniteError, ReplicasDifferError, SettingsError
from lockstep.settings import (
    CheckpointSettings,
    DataSettings,
    GradientSettings,
    ModelSettings,
    OptimizerSettings,
    PipelineSettings,
    Settings,
    VitSettings,
)
from tests.parallel.building import CrossEntropy, assert_close, build_trainer, make_batch, merged_model, tied_blocks

TOLERANCE = 1e-10
SMALL = ModelSettings(vit=VitSettings(width=16, depth=3, num_heads=2, patch_size=14))


def _pipeline_settings(**pipeline: Any) -> Settings:
    settings = proof_settings(SMALL, "pipeline")
    dropout = replace(settings.model, vit=replace(settings.model.vit, dropout=0.2))
    return replace(
        settings,
        num_epochs=1,
        model=dropout,
        log_interval=1,
        gradient=replace(settings.gradient, num_micro_batches=5),
        pipeline=PipelineSettings(**pipeline),
    )


def _run_pipeline(cluster: Cluster, settings: Settings, folder: Path) -> tuple[list[float], dict[str, Tensor] | None]:
    trainer, strategy = build_trainer(cluster, settings, folder)
    trainer.train()
    cluster.barrier()  # rank 0 has written its last
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return losses, merged_model(cluster, strategy)


@pytest.mark.usefixtures("_no_key_biases")
@pytest.mark.world_size(4)
def test_cut_and_schedule_change_nothing_not_even_with_dropout(cluster: Cluster, tmp_path: Path) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    cuts: dict[str, dict[str, Any]] = {
        "1f1b": {},
        "gpipe": {"schedule": "gpipe"},
        "by hand": {"cuts": ["layer0", "layer2", "head"]},
    }
    runs = {
        name: _run_pipeline(cluster, _pipeline_settings(**pipeline), folder / name) for name, pipeline in cuts.items()
    }
    losses, weights = runs["1f1b"]
    assert len(set(losses)) == len(losses) > 5
    for other_losses, other_weights in runs.values():
        assert other_losses == pytest.approx(losses, rel=1e-12)
        assert_close(other_weights, weights)


@pytest.mark.usefixtures("_no_key_biases")
@pytest.mark.world_size(4)
def test_two_replicas_of_two_stages(cluster: Cluster, tmp_path: Path) -> None:
    """Data parallel times pipeline: as one replica, but for dropout's masks, which are each replica's own."""
    folder = cluster.on_root(lambda: tmp_path)
    calm = {}
    for num_stages in (2, 4):
        settings = _pipeline_settings(num_stages=num_stages)
        settings = replace(settings, model=replace(settings.model, vit=replace(settings.model.vit, dropout=0.0)))
        calm[num_stages] = _run_pipeline(cluster, settings, folder / str(num_stages))
    assert calm[2][0] == pytest.approx(calm[4][0], rel=TOLERANCE)
    assert_close(calm[2][1], calm[4][1])


@pytest.mark.world_size(2)
def test_torchvisions_resnet_learns_what_one_rank_learns_from_the_same_micro_batches(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Its ReLUs change what they are given, which may have come from another stage."""
    settings = Settings(
        precision="float64",
        num_epochs=1,
        log_interval=1,
        parallel="pipeline",
        data=DataSettings(name="synthetic", num_samples=12, batch_size=12, image_size=32),
        model=ModelSettings(name="resnet18"),
        optimizer=OptimizerSettings(learning_rate=0.01, momentum=0.9),
        gradient=GradientSettings(num_micro_batches=3),
        pipeline=PipelineSettings(cuts=["relu"]),
        checkpoint=CheckpointSettings(interval=0),
    )
    folder = cluster.on_root(lambda: tmp_path)
    losses, weights = _run_pipeline(cluster, settings, folder / "pipeline")
    alone = replace(settings, parallel="replicated")
    expected_losses, expected = _run_pipeline(Cluster.alone(), alone, tmp_path / f"alone-{cluster.rank}")
    assert losses == pytest.approx(expected_losses, rel=TOLERANCE)
    if weights is not None:
        assert_close(weights, expected)


def _with_norms() -> Iterator[tuple[str, nn.Module]]:
    torch.manual_seed(1)
    yield "first", nn.Conv2d(2, 5, 2, bias=False).double()
    yield "norm", nn.BatchNorm2d(5).double()
    yield "second", nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(5, 4, 1, bias=False)).double()
    yield "norm2", nn.BatchNorm2d(4).double()
    yield "last", nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()


@pytest.mark.world_size(4)
@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_skipped_update_leaves_running_statistics_as_they_were(cluster: Cluster, num_stages: int) -> None:
    """On every stage of every replica: what the last stage of one finds out, all of them undo."""
    cuts = ["second"] if num_stages == 2 else ["norm", "second", "norm2"]
    settings = replace(proof_settings(SMALL, "pipeline"), pipeline=PipelineSettings(num_stages=num_stages, cuts=cuts))
    grid = RankGrid.of(settings, cluster.rank, cluster.size)
    strategy = Pipeline(
        _with_norms,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        cluster,
        settings,
        grid,
        CrossEntropy(),
        make_batch(0, 1, 4).inputs,
    )
    batch = make_batch(grid.replica, grid.num_replicas, 22)
    train_step(strategy, batch, CrossEntropy(), seed=0)
    before = state_digest(dict(strategy.model.named_buffers()))
    is_last = grid.replica == grid.num_replicas - 1
    bad = replace(batch, inputs=batch.inputs * (float("nan") if is_last else 1.0))
    with pytest.raises(NonFiniteError):
        train_step(strategy, bad, CrossEntropy(), seed=0)
    assert state_digest(dict(strategy.model.named_buffers())) == before
    train_step(strategy, batch, CrossEntropy(), seed=0)
    with_norm = any(cluster.all_gather_object(state_digest(dict(strategy.model.named_buffers())) != before))
    assert with_norm
    assert all(tensor.isfinite().all() for tensor in strategy.model.state_dict().values())
    assert strategy.num_parameters == 40 + 10 + 20 + 8 + 51


@pytest.mark.world_size(4)
@pytest.mark.parametrize(
    ("pipeline", "told"),
    [
        ({"num_stages": 3}, r"3 on 4 ranks: stages x replicas must be the number of ranks, and 3 x 1 is 3"),
        ({"cuts": ["layer0", "nose", "head"]}, "the first blocks of the 3 stages after the first"),
        ({"cuts": ["layer2", "layer0", "head"]}, "the order must fit"),
        ({"cuts": ["layer0", "head", "log_softmax"]}, "a stage would have no parameters"),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    cluster: Cluster, pipeline: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        build_trainer(cluster, _pipeline_settings(**pipeline), cluster.on_root(lambda: tmp_path))
    assert caught.value.shared


@pytest.mark.world_size(2)
def test_tied_weights_must_lie_in_one_stage(cluster: Cluster) -> None:
    settings = replace(proof_settings(SMALL, "pipeline"), pipeline=PipelineSettings(cuts=["second"]))
    with pytest.raises(SettingsError, match=r"first\.1\.weight and second\.weight are one parameter"):
        Pipeline(
            tied_blocks,
            lambda model: torch.optim.SGD(model.parameters()),
            cluster,
            settings,
            RankGrid.of(settings, cluster.rank, cluster.size),
            CrossEntropy(),
            make_batch(0, 1, 3).inputs,
        )


@pytest.mark.world_size(4)
def test_a_stage_that_drifts_from_its_replica_is_named(cluster: Cluster, tmp_path: Path) -> None:
    settings = _pipeline_settings(num_stages=2)
    trainer, strategy = build_trainer(cluster, settings, cluster.on_root(lambda: tmp_path))
    if cluster.rank == 3:
        strategy.model.get_parameter("head.bias").data[1] += 1e-9
    with pytest.raises(ReplicasDifferError, match=r"model/head\.bias of rank 3 is not"):
        trainer.strategy.compare("in the test")
