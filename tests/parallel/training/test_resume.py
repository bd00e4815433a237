"""Promise 3: a run that was stopped and went on is the run that never stopped.

Bit for bit on the same number of ranks; within rounding on another. Each stop falls into an epoch, and the updates
since the last checkpoint are lost. Real kills are in tests/launch/training/test_resume.py.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import DataBatch
from lockstep.parallel.merge import state_digest
from lockstep.parallel.replicated import Replicated
from lockstep.parallel.tensor_slices import State, TensorState
from lockstep.runtime.errors import NonFiniteError, ReplicasDifferError, SettingsError
from lockstep.settings import CheckpointSettings, CheckSettings, DataSettings, OptimizerSettings, Settings
from lockstep.training.checkpoint import list_checkpoints, verify_checkpoint, write_parts
from lockstep.training.checkpoint_writer import CheckpointWriter
from lockstep.training.hooks import TrainerHook
from lockstep.training.sample_ledger import read_ledger
from lockstep.training.trainer import Trainer
from tests.parallel.building import build_trainer, whole_values

SETTINGS = Settings(
    num_epochs=3,
    log_interval=2,
    data=DataSettings(name="synthetic", num_samples=50, batch_size=8, sharding="hash"),
    optimizer=OptimizerSettings(name="sgd", momentum=0.9, weight_decay=1e-2, warmup_steps=4),
    checkpoint=CheckpointSettings(interval=5, keep=2),
    checks=CheckSettings(ledger=True, replica_interval=3),
)
ADAM = replace(SETTINGS, optimizer=OptimizerSettings(name="adam", learning_rate=1e-3, weight_decay=1e-2))
LAMB = replace(SETTINGS, optimizer=OptimizerSettings(name="lamb", learning_rate=1e-3, average_decay=0.9))
STOPS = (8, 11)  # the epoch has 7 updates; checkpoints lie at 5 and 10


class Stop(Exception):
    """Takes the place of a kill, on every rank in the same update."""


class StopBefore(TrainerHook):
    def __init__(self, step: int | None) -> None:
        self._step = step

    @override
    def before_update(self, trainer: Trainer, item: object) -> None:
        if trainer.progress.step == self._step:
            raise Stop


def _run(cluster: Cluster, settings: Settings, folder: Path, resume: bool = False, stop: int | None = None) -> Trainer:
    trainer, _ = build_trainer(cluster, settings, folder, resume)
    trainer.hooks.append(StopBefore(stop))
    try:
        trainer.train()
    except Stop:
        trainer.writer.wait()
    cluster.all_gather_object(None)  # nobody goes on before rank 0 has written
    return trainer


def _records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _state(trainer: Trainer) -> dict[str, Tensor]:
    return whole_values(trainer.strategy)


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        pytest.param(n, settings, id=f"{n}-{name}", marks=[pytest.mark.world_size(n), *marks])
        for n, soon in ((1, "sgd"), (2, "lamb"), (3, "adam"))
        for name, settings in {"sgd": SETTINGS, "adam": ADAM, "lamb": LAMB}.items()
        for marks in [[] if name == soon else [pytest.mark.thorough]]
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(cluster: Cluster, size: int, settings: Settings, tmp_path: Path) -> None:
    """Dropout on, momentum and weight decay on, float32, stopped twice in mid-epoch."""
    assert cluster.size == size
    folder = cluster.on_root(lambda: tmp_path)
    never = _run(cluster, settings, folder / "never")
    for index, stop in enumerate(STOPS):
        _run(cluster, settings, folder / "stopped", resume=index > 0, stop=stop)
    resumed = _run(cluster, settings, folder / "stopped", resume=True)
    assert resumed.progress.step == never.progress.step == 21
    assert _state(resumed).keys() == _state(never).keys()
    assert any(name.startswith("optimizer/") for name in _state(never))
    for name, tensor in _state(never).items():
        assert torch.equal(_state(resumed)[name], tensor), name
    assert _records(folder / "stopped") == _records(folder / "never")
    assert all(account.is_exact for account in read_ledger(folder / "stopped"))
    assert len(read_ledger(folder / "stopped")) == 3


@pytest.mark.world_size(3)
def test_a_run_goes_on_with_another_number_of_ranks_within_rounding(cluster: Cluster, tmp_path: Path) -> None:
    """Three ranks, then one: float64 and no dropout, since masks are drawn rank by rank."""
    exact = replace(SETTINGS, precision="float64", model=replace(SETTINGS.model, dropout1=0.0, dropout2=0.0))
    folder = cluster.on_root(lambda: tmp_path)
    never = _run(cluster, exact, folder / "never")
    _run(cluster, exact, folder / "stopped", stop=11)
    if cluster.is_root:
        resumed = _run(Cluster.alone(), exact, folder / "stopped", resume=True)
        for name, tensor in _state(never).items():
            torch.testing.assert_close(_state(resumed)[name], tensor, rtol=1e-10, atol=1e-12)
        losses = [[record["loss"] for record in _records(folder / name)] for name in ("stopped", "never")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        assert all(account.is_exact for account in read_ledger(folder / "stopped"))


def _model_and_optimizer(cluster: Cluster) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    if cluster.is_root:  # only rank 0 has loaded a checkpoint
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.world_size(2)
def test_horovods_broadcast_of_optimizer_state_moves_the_other_ranks_away(cluster: Cluster) -> None:
    """The trap: ranks without state take a step with gradients of zero, and weight decay turns it into a move."""
    model, optimizer = _model_and_optimizer(cluster)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    weights = cluster.all_gather_object(model.weight.tolist())
    assert weights[0] != weights[1]


@pytest.mark.world_size(2)
def test_our_loading_of_state_leaves_all_ranks_equal(cluster: Cluster) -> None:
    model, optimizer = _model_and_optimizer(cluster)
    strategy = Replicated(model, optimizer, cluster)
    strategy.load_state(TensorState(whole_values(strategy)))
    strategy.compare("after loading")
    assert "momentum_buffer" in optimizer.state[model.weight]


@pytest.mark.world_size(3)
@pytest.mark.parametrize(
    "what", ["model/conv2.weight", "optimizer/momentum_buffer/fc1.bias", "optimizer group 0"], ids=str
)
def test_the_replica_check_names_the_first_difference_and_the_rank(cluster: Cluster, what: str, tmp_path: Path) -> None:
    """One bit of a weight, one of the optimizer's state, or another learning rate, on rank 1."""
    # The comparison falls into the update that drifts: the next one would spread it, or set the learning rate anew.
    settings = replace(SETTINGS, checks=replace(SETTINGS.checks, replica_interval=4))
    trainer, strategy = build_trainer(cluster, settings, cluster.on_root(lambda: tmp_path))

    class Drift(TrainerHook):
        def after_update(self, trainer: Trainer) -> None:
            if cluster.rank == 1 and trainer.progress.step == 4:
                if what in strategy.state():
                    bits = strategy.state()[what].values.view(torch.int32)
                    bits[(0,) * bits.dim()] ^= 1 << 3
                else:
                    strategy.optimizer.param_groups[0]["lr"] *= 2

    trainer.hooks.append(Drift())
    with pytest.raises(ReplicasDifferError, match=rf"after update 4: {what} of rank 1 is not the others'") as caught:
        trainer.train()
    assert caught.value.shared


class Poison(TrainerHook):
    """Rank 1 meets a loss, or a gradient of fc2.bias, that is not a number, in update `step`."""

    def __init__(self, cluster: Cluster, step: int, where: str) -> None:
        self._is_met_here = cluster.rank == 1
        self._step = step
        self._where = where

    def before_update(self, trainer: Trainer, item: DataBatch) -> None:
        if self._is_met_here and trainer.progress.step == self._step:
            if self._where == "the loss":
                item.inputs.fill_(float("nan"))
            else:
                bias = trainer.strategy.model.get_parameter("fc2.bias")
                bias.register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.world_size(3)
@pytest.mark.parametrize("where", ["the loss", "the gradient of fc2.bias"])
def test_what_is_not_finite_stops_all_ranks_in_the_same_update_and_is_named(
    cluster: Cluster, where: str, tmp_path: Path
) -> None:
    trainer, _ = build_trainer(cluster, SETTINGS, cluster.on_root(lambda: tmp_path))
    trainer.hooks.append(Poison(cluster, step=4, where=where))
    with pytest.raises(NonFiniteError, match=f"update 5: {where} on rank 1 is infinite or not a number") as caught:
        trainer.train()
    assert caught.value.shared
    assert set(cluster.all_gather_object(trainer.progress.step)) == {4}


@pytest.mark.world_size(2)
def test_a_checkpoint_in_the_making_is_finished_before_all_ranks_leave(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the update after a checkpoint, whose writing takes long: it is there when the error comes."""

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write_parts(*arguments)

    monkeypatch.setattr("lockstep.training.checkpoint_writer.write_parts", slowly)
    folder = cluster.on_root(lambda: tmp_path)
    trainer, _ = build_trainer(cluster, SETTINGS, folder)
    trainer.hooks.append(Poison(cluster, step=5, where="the loss"))
    with pytest.raises(NonFiniteError, match="update 6"):
        trainer.train()
    if cluster.is_root:
        assert [int(path.name) for path in list_checkpoints(folder)] == [5]


@pytest.mark.world_size(2)
def test_an_update_that_is_not_finite_is_skipped_by_all_if_so_set(cluster: Cluster, tmp_path: Path) -> None:
    settings = replace(SETTINGS, checks=replace(SETTINGS.checks, non_finite="skip"))
    trainer, strategy = build_trainer(cluster, settings, cluster.on_root(lambda: tmp_path))
    trainer.hooks.append(Poison(cluster, step=4, where="the loss"))
    batches = trainer.loader.rest_of_epoch()
    for _ in range(4):
        trainer.update(next(batches))
    before = state_digest(whole_values(strategy))
    trainer.update(next(batches))
    assert state_digest(whole_values(strategy)) == before
    assert (trainer.progress.step, trainer.progress.num_skipped) == (5, 1)
    assert torch.isfinite(torch.tensor(trainer.train().scores["loss"]))
    strategy.compare("after the skip")
    cluster.all_gather_object(None)
    first, *others = read_ledger(cluster.on_root(lambda: tmp_path))
    assert (first.is_exact, first.num_skipped) == (True, 8)
    assert all(account.is_exact and account.num_skipped == 0 for account in others)


@pytest.mark.world_size(2)
def test_the_optimizer_waits_for_the_copy_of_a_checkpoint(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the copy is, the checkpoint holds what was then."""
    copy = CheckpointWriter._copy

    def slow_copy(writer: CheckpointWriter, state: State) -> State:
        time.sleep(0.3)
        return copy(writer, state)

    monkeypatch.setattr(CheckpointWriter, "_copy", slow_copy)
    folder = cluster.on_root(lambda: tmp_path)
    trainer, strategy = build_trainer(cluster, SETTINGS, folder)
    batches = trainer.loader.rest_of_epoch()
    for _ in range(SETTINGS.checkpoint.interval):
        trainer.update(next(batches))
    digest = state_digest(whole_values(strategy))
    trainer.update(next(batches))
    assert state_digest(whole_values(strategy)) != digest
    trainer.writer.wait()
    if cluster.is_root:
        assert state_digest(verify_checkpoint(list_checkpoints(folder)[0]).load()) == digest
    cluster.all_gather_object(None)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "seed is 7 and was 0"),
        ({"precision": "float64"}, "precision is float64"),
        ({"data": replace(SETTINGS.data, batch_size=9)}, "the global batch"),
        ({"data": replace(SETTINGS.data, num_samples=60)}, "the number of samples is 60 and was 50"),
        ({"optimizer": ADAM.optimizer}, "optimizer.name is adam and was sgd"),
        ({"optimizer": replace(SETTINGS.optimizer, freeze=["conv1.*"])}, r"optimizer.freeze is \['conv1.\*'\] and was"),
        ({"optimizer": replace(SETTINGS.optimizer, groups={"conv1.*": {"weight_decay": 0.0}})}, "optimizer.groups is"),
        ({"model": replace(SETTINGS.model, dropout1=0.0)}, "model is"),
        ({"checks": replace(SETTINGS.checks, ledger=False)}, "checks.ledger is False and was True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_run_cannot_change_is_refused_when_it_goes_on(
    cluster: Cluster, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    _run(cluster, SETTINGS, folder, stop=6)
    with pytest.raises(SettingsError, match=named) as caught:
        build_trainer(cluster, replace(SETTINGS, **change), folder, resume=True)
    assert caught.value.shared
    _run(cluster, replace(SETTINGS, num_epochs=2), folder, resume=True)  # the length may change
    with pytest.raises(SettingsError, match="14 updates, and the settings ask for 7 in all"):
        build_trainer(cluster, replace(SETTINGS, num_epochs=1), folder, resume=True)
