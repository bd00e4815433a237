"""The moving average of the weights, wherever they live: what is evaluated and merged, and that it resumes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.commands.merge import merge_checkpoint
from lockstep.parallel.merge import state_digest
from lockstep.settings import CheckpointSettings, DataSettings, ModelSettings, OptimizerSettings, Settings
from lockstep.tasks.supervised import Evaluation
from lockstep.training.checkpoint import latest_checkpoint
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
        return evaluation.scores["loss"], merged_model(cluster, strategy)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "how", [*(pytest.param(how, marks=pytest.mark.thorough) for how in ("zero1", "zero2")), "zero3", "pipeline"]
)
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


class Tied(nn.Module):
    """A network of a user's own, in which two layers have one weight."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(math.prod(shape), 8), nn.Linear(8, 8)
        self.third, self.last = nn.Linear(8, 8), nn.Linear(8, num_classes)
        self.third.weight = self.second.weight

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(images.flatten(1)))
        output: Tensor = self.last(torch.tanh(self.third(torch.tanh(self.second(hidden)))))
        return output


@pytest.mark.world_size(2)
@pytest.mark.parametrize("how", ["replicated", "zero1", "zero2", "zero3"])
def test_the_offline_merge_of_tied_weights_is_the_runs_model(cluster: Cluster, tmp_path: Path, how: str) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    settings = replace(SETTINGS, parallel=how, model=ModelSettings(name=f"{__name__}.Tied"))  # type: ignore[arg-type]
    merged = _train(cluster, settings, folder / how)[1]
    if merged:
        checkpoint = latest_checkpoint(folder / how, tell=print)
        assert checkpoint
        assert merge_checkpoint(checkpoint, folder / "offline.safetensors") == state_digest(merged)
        of_before = {name: value for name, value in checkpoint.counters.items() if name != "tied_weights"}
        without = replace(checkpoint, counters=of_before)  # as before checkpoints told
        assert merge_checkpoint(without, folder / "before.safetensors") == state_digest(merged)
        assert torch.equal(merged["network.third.weight"], merged["network.second.weight"])
        assert not torch.equal(merged["network.third.weight"], checkpoint.read("model/network.third.weight").view(8, 8))


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
