"""What workers pass on to the next generation."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lockstep.comm.cluster import Cluster
from lockstep.parallel.buffers import Buffers
from lockstep.settings import DataSettings, ModelSettings, Settings
from lockstep.tasks.classify import Classify
from lockstep.training.build import build_trainer
from lockstep.training.elastic import ElasticState, Run
from lockstep.training.run_folder import RunFolder
from lockstep.training.trainer import Trainer
from tests.parallel.building import whole_values

SETTINGS = Settings(
    precision="float64",
    num_epochs=2,
    data=DataSettings(name="synthetic", num_samples=40, batch_size=8),
    model=ModelSettings(dropout1=0, dropout2=0),
)


def _trainer(cluster: Cluster, folder: Path, num_updates: int) -> Trainer:
    """Collective: a trainer that has done `num_updates` updates."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(cluster, SETTINGS, Classify(SETTINGS, cluster), RunFolder(folder))
    while trainer.progress.step < num_updates:
        for batch in trainer.loader.rest_of_epoch():
            trainer.update(batch)
            if trainer.progress.step == num_updates:
                break
    return trainer


def _shared_folder(cluster: Cluster, tmp_path: Path) -> Path:
    return cluster.on_root(lambda: tmp_path)


@pytest.mark.world_size(3)
def test_all_go_on_from_the_rank_with_most_updates(cluster: Cluster, tmp_path: Path) -> None:
    """Rank 0 is new, rank 1 has not done the update in which a rank was lost, and rank 2 has."""
    folder = _shared_folder(cluster, tmp_path)
    behind, ahead = _trainer(cluster, folder / "behind", 6), _trainer(cluster, folder / "ahead", 7)
    relay = ElasticState()
    if cluster.rank > 0:
        relay.run = Run(SETTINGS, False, RunFolder(folder / "run"))
        relay.trainer = ahead if cluster.rank == 2 else behind
    run = relay.run_of(cluster)
    assert run is not None
    assert run.settings == SETTINGS
    relay.run = run
    handover = relay.take_over(cluster)
    assert handover is not None
    run.folder.path.mkdir(exist_ok=True)
    trainer = build_trainer(cluster, SETTINGS, Classify(SETTINGS, cluster), run.folder, handover=handover)
    assert trainer.progress.step == 7
    assert (trainer.loader.epoch, trainer.loader.consumed) == (1, 16)
    expected, found = whole_values(ahead.strategy), whole_values(trainer.strategy)
    assert found.keys() == expected.keys()
    assert any(name.startswith("optimizer/") for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    own_tallies = [[0.0] * trainer.task.num_metric_sums, behind.metrics.metric_sums(), ahead.metrics.metric_sums()]
    assert trainer.metrics.metric_sums() == own_tallies[cluster.rank]


@pytest.mark.world_size(2)
def test_a_generation_of_new_workers_starts_from_nothing(cluster: Cluster) -> None:
    relay = ElasticState()
    assert relay.run_of(cluster) is None
    assert relay.take_over(cluster) is None


@pytest.mark.world_size(2)
def test_changes_of_buffers_by_an_interrupted_update_are_undone(cluster: Cluster) -> None:
    norm = nn.BatchNorm1d(3).double()
    buffers = Buffers(norm, cluster)
    norm(torch.randn(4, 3).double())
    buffers.average(0.5)
    agreed = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(torch.randn(4, 3).double())
    assert any(not torch.equal(buffer, agreed[name]) for name, buffer in norm.named_buffers())
    buffers.forget_changes()
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, agreed[name]), name
