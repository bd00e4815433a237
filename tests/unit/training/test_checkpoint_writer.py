"""What a checkpoint holds is the state at its update, however late the writing thread copies it."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.parallel.replicated import Replicated
from lockstep.parallel.tensor_slices import State, whole_tensors
from lockstep.settings import CheckpointSettings, DataSettings, ModelSettings, OptimizerSettings, Settings
from lockstep.tasks.task import Evaluation
from lockstep.training.build import build_task, build_trainer
from lockstep.training.checkpoint import latest_checkpoint
from lockstep.training.checkpoint_writer import CheckpointWriter
from lockstep.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _slow_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = CheckpointWriter._copy

    def copy_late(self: CheckpointWriter, state: State) -> State:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        return copy(self, state)

    monkeypatch.setattr(CheckpointWriter, "_copy", copy_late)


def _saved(run: Path) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(run, tell=print)
    assert checkpoint
    return whole_tensors(checkpoint)


def test_what_a_forward_pass_changes_is_copied_before_the_next_one(tmp_path: Path) -> None:
    cluster = Cluster.alone()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    strategy = Replicated(model, torch.optim.SGD(model.parameters(), lr=0.1), cluster)
    model(torch.randn(8, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writer = CheckpointWriter(tmp_path, CheckpointSettings(), cluster)
    writer.save(1, strategy.saved_state(), {}, strategy.changed_by_forward)
    model(torch.randn(8, 3))  # while the thread has not copied yet
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    writer.wait()
    assert {f"model/{name}" for name in changed} == set(strategy.changed_by_forward)
    assert len(changed) == 3
    found = _saved(tmp_path)
    for name, tensor in before.items():
        assert torch.equal(found[f"model/{name}"], tensor), name


def test_an_evaluation_of_averaged_weights_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        num_epochs=2,
        data=DataSettings(name="synthetic", num_samples=32, batch_size=16),
        model=ModelSettings(dropout1=0.0, dropout2=0.0),
        optimizer=OptimizerSettings(average_decay=0.5),
        checkpoint=CheckpointSettings(interval=2),  # just before each evaluation
    )
    cluster = Cluster.alone()
    task = build_task(settings, cluster)
    evaluate = task.evaluate

    def evaluate_long(*arguments: Any) -> Evaluation:
        time.sleep(0.6)  # longer than the thread takes
        return evaluate(*arguments)

    monkeypatch.setattr(task, "evaluate", evaluate_long)
    trainer = build_trainer(cluster, settings, task, RunFolder(tmp_path))
    trainer.train()
    found: dict[str, Any] = _saved(tmp_path)
    for name, tensor in trainer.strategy.model.state_dict().items():
        assert torch.equal(found[f"model/{name}"], tensor), name
    alone = replace(settings, checkpoint=replace(settings.checkpoint, asynchronous=False))
    (tmp_path / "plain").mkdir()
    build_trainer(cluster, alone, build_task(alone, cluster), RunFolder(tmp_path / "plain")).train()
    expected = _saved(tmp_path / "plain")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
