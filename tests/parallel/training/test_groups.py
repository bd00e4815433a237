"""Parameter groups and freezing: what PyTorch's own groups do, under every strategy and on any number of ranks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lockstep import SupervisedTask
from lockstep.comm.cluster import Cluster
from lockstep.parallel.strategy import Strategy
from lockstep.runtime.errors import SettingsError
from lockstep.settings import CheckpointSettings, DataSettings, OptimizerSettings, Settings
from lockstep.training import build
from lockstep.training.run import run
from lockstep.training.run_folder import RunFolder
from tests.parallel.building import assert_close, merged_model

NUM_SAMPLES, NUM_UPDATES = 24, 20
FROZEN = ("stem.0.weight", "body.0.bias")
SETTINGS = Settings(
    task="tests.parallel.training.test_groups.Squares",
    num_epochs=NUM_UPDATES,  # of one update each
    evaluate_every=0,
    precision="float64",
    data=DataSettings(batch_size=NUM_SAMPLES),
    optimizer=OptimizerSettings(
        name="sgd",
        learning_rate=0.1,
        weight_decay=0.01,
        schedule="linear",
        freeze=["stem.*.weight", "body.0.bias"],
        groups={"head.*": {"learning_rate_factor": 0.3}, "*.bias": {"learning_rate_factor": 2, "weight_decay": 0.1}},
    ),
    checkpoint=CheckpointSettings(interval=0),
)
ADAM = replace(SETTINGS, optimizer=replace(SETTINGS.optimizer, name="adam", learning_rate=0.01))
HOW = {
    "replicated": {},
    "zero1": {"parallel": "zero1"},
    "zero2": {"parallel": "zero2"},
    "zero3": {"parallel": "zero3"},
    "pipeline": {"parallel": "pipeline"},
}


class Squares(SupervisedTask):
    """Three blocks, the first of which has a frozen matrix."""

    weight_per_sample = 1

    def data_set(self, train: bool) -> Any:
        generator = torch.Generator().manual_seed(int(train))
        inputs = torch.randn(NUM_SAMPLES, 6, generator=generator)
        return inputs, inputs.prod(1, keepdim=True)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "stem", nn.Sequential(nn.Linear(6, 9), nn.Tanh())
        yield "body", nn.Sequential(nn.Linear(9, 9), nn.Tanh())
        yield "head", nn.Linear(9, 1)

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        return (outputs - batch[1]).square().sum(), len(outputs)


def _train(cluster: Cluster, settings: Settings, folder: Path) -> tuple[Strategy, dict[str, Tensor] | None]:
    """Return the strategy and, on rank 0, the merged model after all updates."""
    folder.mkdir(exist_ok=True)
    trainer = build.build_trainer(cluster, settings, Squares(settings, cluster), RunFolder(folder))
    trainer.train()
    return trainer.strategy, merged_model(cluster, trainer.strategy)


def _train_plainly(settings: Settings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train with PyTorch alone; returns the model before and after."""
    task = Squares(settings, Cluster.alone())
    model = task.build_model()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    named = {name: parameter for name, parameter in model.named_parameters() if name not in FROZEN}
    rate = settings.optimizer.learning_rate
    kinds: dict[str, list[nn.Parameter]] = {"usual": [], "head": [], "bias": []}
    for name, parameter in named.items():
        kinds["head" if name.startswith("head") else "bias" if name.endswith("bias") else "usual"].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": kinds["usual"], "lr": rate, "weight_decay": 0.01},
        {"params": kinds["head"], "lr": 0.3 * rate, "weight_decay": 0.01},
        {"params": kinds["bias"], "lr": 2 * rate, "weight_decay": 0.1},
    ]
    assert all(group["params"] for group in groups)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(groups, momentum=0.9) if settings.optimizer.name == "sgd" else torch.optim.Adam(groups)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / NUM_UPDATES)
    inputs, targets = (tensor.double() for tensor in task.data_set(train=True))
    for _ in range(NUM_UPDATES):
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
        schedule.step()
    return first, {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.world_size(1)
@pytest.mark.parametrize("settings", [SETTINGS, ADAM], ids=["sgd", "adam"])
def test_groups_do_what_pytorchs_own_do(cluster: Cluster, settings: Settings, tmp_path: Path) -> None:
    _, found = _train(cluster, settings, tmp_path)
    first, expected = _train_plainly(settings)
    assert found
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-12 * tensor.abs().max(), name
        assert torch.equal(found[name], first[name]) == (name in FROZEN), name


@pytest.mark.world_size(2)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("settings", [SETTINGS, ADAM], ids=["sgd", "adam"])
def test_two_ranks_do_what_one_does(cluster: Cluster, settings: Settings, how: str, tmp_path: Path) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    _, found = _train(cluster, replace(settings, **HOW[how]), folder)  # type: ignore[arg-type]
    first, _ = _train_plainly(settings)
    expected = cluster.on_root_only(lambda: _train(Cluster.alone(), settings, folder / "alone")[1])
    assert_close(found, expected)
    if found:
        assert all(torch.equal(found[name], first[name]) for name in FROZEN)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("how", HOW)
def test_frozen_blocks_and_averages_go_together(cluster: Cluster, how: str, tmp_path: Path) -> None:
    """The whole first block is frozen; the average has the others."""
    folder = cluster.on_root(lambda: tmp_path)
    optimizer = replace(SETTINGS.optimizer, freeze=["stem.*"], average_decay=0.5)
    if how == "pipeline":  # each stage needs something to learn
        optimizer = replace(optimizer, freeze=["stem.0.*", "body.0.weight"])
    settings = replace(SETTINGS, optimizer=optimizer)
    strategy, found = _train(cluster, replace(settings, **HOW[how]), folder)  # type: ignore[arg-type]
    with strategy.averaged():
        averaged = merged_model(cluster, strategy)
    first, _ = _train_plainly(settings)
    alone = cluster.on_root_only(lambda: _train(Cluster.alone(), settings, folder / "alone")[1])
    assert_close(found, alone)
    if found and averaged:
        for name in first:
            frozen = name.startswith("stem") or (how == "pipeline" and name == "body.0.weight")
            assert torch.equal(found[name], first[name]) == frozen, name
            assert torch.equal(averaged[name], found[name]) == frozen, name


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": ["steam.*"]}, r"optimizer.freeze has steam.\*, which matches no parameter: stem.0.weight, stem.0"),
        ({"freeze": ["*"]}, "no parameter is left that learns"),
        (
            {"groups": {"stem.0.weight": {}}},
            "optimizer.groups has stem.0.weight, which matches no parameter that learns",
        ),
        ({"groups": {"*": {}, "head.*": {}}}, r"optimizer.groups has head.\*, .*: none is left"),
    ],
    ids=["misspelt", "all", "frozen", "taken"],
)
def test_a_pattern_that_cannot_be_meant_is_told_on_all_ranks_and_leaves_no_folder(
    cluster: Cluster, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = cluster.on_root(lambda: tmp_path) / "run"
    settings = replace(SETTINGS, run_dir=str(folder), optimizer=replace(SETTINGS.optimizer, **change))
    with pytest.raises(SettingsError, match=message) as caught:
        run(cluster, read=lambda: (settings, False))
    assert caught.value.shared
    assert not folder.exists()
