"""Twenty updates of Lockstep on one rank beside a loop of plain PyTorch, in float64: the same weights to 1e-12.

The loops share no code with Lockstep. They know what docs/exactness.md tells: the order of the samples of an epoch is
`numpy.random.default_rng((seed, epoch)).permutation(num_samples)`, batches are consecutive pieces of it, and the model
is built after `torch.manual_seed(seed)`. Optimizers and schedules are PyTorch's own.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.built_in import load_synthetic
from lockstep.settings import DataSettings, ModelSettings, OptimizerSettings, Settings
from lockstep.training.build import build_task, build_trainer
from lockstep.training.run_folder import RunFolder
from tests.reference.problems import NUM_SAMPLES, TwoInputs, fields, weather

TOLERANCE = 1e-12
SEED, BATCH_SIZE, NUM_EPOCHS = 5, 33, 5
RATES = {"sgd": 0.01, "adamw": 0.001}  # at larger ones AdamW multiplies rounding errors by tens
NUM_UPDATES = NUM_EPOCHS * -(-NUM_SAMPLES // BATCH_SIZE)

Sum = Callable[[nn.Module, Any], tuple[Tensor, float]]
Optimizer = Literal["sgd", "adamw"]
Updated = tuple[dict[str, Tensor], list[float]]


def _settings(optimizer: Optimizer, **others: Any) -> Settings:
    return Settings(
        **others,
        seed=SEED,
        num_epochs=NUM_EPOCHS,
        precision="float64",
        log_interval=1,
        evaluate_every=0,
        optimizer=OptimizerSettings(name=optimizer, learning_rate=RATES[optimizer], momentum=0.9, weight_decay=0.02),
    )


def _lockstep(settings: Settings, folder: Path) -> Updated:
    """The weights that Lockstep trains, without the names of blocks, and its losses."""
    cluster = Cluster.alone()
    folder.mkdir()
    trainer = build_trainer(cluster, settings, build_task(settings, cluster), RunFolder(folder))
    trainer.train()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == NUM_UPDATES == 20
    return trainer.strategy.model.state_dict(), losses


def _batches() -> Iterator[Tensor]:
    for epoch in range(NUM_EPOCHS):
        order = torch.from_numpy(np.random.default_rng((SEED, epoch)).permutation(NUM_SAMPLES))
        yield from order.split(BATCH_SIZE)


def _plain(model: nn.Module, optimizer: Optimizer, rows: Callable[[Tensor], Any], sum_and_weight: Sum) -> Updated:
    """The weights and losses of a loop of plain PyTorch."""
    parameters = list(model.parameters())
    chosen: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, RATES[optimizer], momentum=0.9, weight_decay=0.02, foreach=False)
        if optimizer == "sgd"
        else torch.optim.AdamW(parameters, RATES[optimizer], weight_decay=0.02, foreach=False)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, NUM_UPDATES)
    losses = []
    for ids in _batches():
        total, weight = sum_and_weight(model, rows(ids))
        loss = total / weight
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        schedule.step()
        losses.append(loss.item())
    return model.state_dict(), losses


def _assert_equal(found: Updated, expected: Updated) -> None:
    names = [name.removeprefix("network.") for name in found[0]]
    assert len(names) == len(expected[0])
    for (name, tensor), (other, plain) in zip(found[0].items(), expected[0].items(), strict=True):
        assert tensor.shape == plain.shape, (name, other)
        difference = (tensor - plain).abs().max() / plain.abs().max()
        assert difference <= TOLERANCE, (name, other, float(difference))
    assert found[1] == pytest.approx(expected[1], rel=TOLERANCE)
    assert len(set(found[1])) == NUM_UPDATES


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("task", ["Weather", "WeatherInItems", "WeatherInBlocks"])
def test_a_users_own_problem(task: str, optimizer: Optimizer, tmp_path: Path) -> None:
    """Two inputs, and a loss that counts what is known."""
    settings = _settings(optimizer, task=f"tests.reference.problems.{task}", data=DataSettings(batch_size=BATCH_SIZE))
    torch.manual_seed(SEED)
    model, whole = TwoInputs(16).double(), weather(train=True)

    def sum_and_weight(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        errors = (model(batch["left"], batch["right"]) - batch["target"]).square()
        return (errors * batch["known"]).sum(), float(batch["known"].sum())

    def rows(ids: Tensor) -> dict[str, Tensor]:
        return {name: tensor[ids] for name, tensor in whole.items()}

    expected = _plain(model, optimizer, rows, sum_and_weight)
    _assert_equal(_lockstep(settings, tmp_path / "run"), expected)


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 5, padding=2, padding_mode="circular")


class _Fields(nn.Module):
    """The network of `regress` with one residual block, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = _convolution(1, width)
        self.first, self.second = _convolution(width, width), _convolution(width, width)
        self.head = _convolution(width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        hidden = hidden + self.second(F.gelu(self.first(F.gelu(hidden))))
        outputs: Tensor = self.head(hidden)
        return outputs


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_regression(optimizer: Optimizer, tmp_path: Path) -> None:
    data = DataSettings(name="tests.reference.problems.fields", batch_size=BATCH_SIZE)
    settings = _settings(optimizer, task="regress", data=data, options={"width": 4, "num_blocks": 1})
    torch.manual_seed(SEED)
    model, (before, after) = _Fields(4).double(), fields("", train=True)

    def sum_and_weight(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        return F.mse_loss(model(batch[0]), batch[1], reduction="sum"), batch[1].numel()

    expected = _plain(model, optimizer, lambda ids: (before[ids], after[ids]), sum_and_weight)
    _assert_equal(_lockstep(settings, tmp_path / "run"), expected)


def test_classification(tmp_path: Path) -> None:
    """The reference network without dropout, with label smoothing as PyTorch has it.

    With SGD alone: many of its gradients are nearly 0, and Adam divides them, with their rounding, by their own size.
    """
    data = DataSettings(name="synthetic", num_samples=NUM_SAMPLES, batch_size=BATCH_SIZE, label_smoothing=0.1)
    settings = _settings("sgd", data=data, model=ModelSettings(dropout1=0.0, dropout2=0.0))
    images = load_synthetic(NUM_SAMPLES, train=True)
    inputs = (images.images.double() / 255 - 0.5) / 0.5
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ).double()

    def sum_and_weight(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1, reduction="sum"), len(batch[1])

    expected = _plain(model, "sgd", lambda ids: (inputs[ids], images.labels[ids]), sum_and_weight)
    _assert_equal(_lockstep(settings, tmp_path / "run"), expected)
