"""The moving average of the weights, wherever they live: what is evaluated and merged, and that it resumes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.cluster.comm import Cluster
from app.config import CheckpointSettings, DataSettings, ModelSettings, OptimizerSettings, Settings
from app.merge import merge_checkpoint
from app.tasks.classify import Evaluation
from app.training.checkpoint import latest_checkpoint
from tests.parallel.building import assert_close, build_trainer, merged_model, whole_values

SETTINGS = Settings(
    precision="float64",
    num_epochs=1,
    data=DataSettings(name="synthetic", num_samples=60, batch_size=10),
    model=ModelSettings(dropout1=0.0, dropout2=0.0),
    optimizer=OptimizerSettings(learning_rate=0.05, average_decay=0.8),
    checkpoint=CheckpointSettings(interval=3),
)


def _train(cluster: Cluster, settings: Settings, folder: Path) -> tuple[float, dict[str, Tensor] | None]:
    """The loss of the evaluation, and the merged model on rank 0."""
    trainer, strategy = build_trainer(cluster, settings, folder)
    evaluation = trainer.train()
    assert isinstance(evaluation, Evaluation)
    with strategy.averaged():
        return evaluation.loss, merged_model(cluster, strategy)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("how", ["zero1", "zero2", "zero3", "pipeline"])
def test_the_average_is_the_same_wherever_the_model_lives(cluster: Cluster, tmp_path: Path, how: str) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    loss, merged = _train(cluster, SETTINGS, folder / "replicated")
    parted_loss, parted = _train(cluster, replace(SETTINGS, parallel=how), folder / how)  # type: ignore[arg-type]
    last_loss, last = _train(
        cluster, replace(SETTINGS, optimizer=replace(SETTINGS.optimizer, average_decay=None)), folder / "last"
    )
    assert parted_loss == pytest.approx(loss, rel=1e-10)
    assert last_loss != pytest.approx(loss, rel=1e-4)  # or nothing is averaged
    assert_close(parted, merged)
    if merged and last:
        assert not torch.equal(merged["fc2.weight"], last["fc2.weight"])
        checkpoint = latest_checkpoint(folder / how, tell=print)
        assert checkpoint
        merge_checkpoint(checkpoint, folder / "offline.safetensors")
        offline = load_file(folder / "offline.safetensors")
        assert_close({name: offline[name] for name in merged}, merged)


@pytest.mark.world_size(2)
def test_the_average_goes_on_bit_for_bit(cluster: Cluster, tmp_path: Path) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    never, strategy = build_trainer(cluster, SETTINGS, folder / "never")
    never.train()
    stopped, _ = build_trainer(cluster, SETTINGS, folder / "stopped")
    batches = stopped.loader.rest_of_epoch()
    for _ in range(4):
        stopped.update(next(batches))
    stopped.writer.wait()
    trainer, _ = build_trainer(cluster, SETTINGS, folder / "stopped", resume=True)
    assert trainer.progress.step == 3
    trainer.train()
    expected, found = whole_values(strategy), whole_values(trainer.strategy)
    assert any(name.startswith("optimizer/average/") for name in expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
