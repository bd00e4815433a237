"""Problems of a user's own, as a user would write them, and each once more as a plain PyTorch loop needs it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lockstep import SupervisedTask
from lockstep.data.batch import Tree
from lockstep.tasks.metric_sums import Metric, Number

NUM_SAMPLES = 130


def weather(train: bool) -> dict[str, Tensor]:
    """Two inputs (n, 6) and (n, 3), two targets, of which some are not known: (n, 2)."""
    generator = torch.Generator().manual_seed(int(train))
    left, right = (torch.randn(NUM_SAMPLES, size, generator=generator, dtype=torch.float64) for size in (6, 3))
    target = torch.stack([left.sum(1) * right[:, 0], right.prod(1)], 1)
    # Unevenly, so that the ranks' weights differ; nothing is known of a few samples.
    known = torch.rand(NUM_SAMPLES, 2, generator=generator) < torch.rand(NUM_SAMPLES, 1, generator=generator)
    return {"left": left, "right": right, "target": target, "known": known}


class TwoInputs(nn.Module):
    """A network of two inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, width), nn.Linear(3, width)
        self.last = nn.Linear(width, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.tanh(self.left(left) + self.right(right)))
        return outputs


@dataclass(frozen=True)
class WeatherOptions:
    """Settings of the weather."""

    width: int = 16
    """Units of the hidden layer."""


class Weather(SupervisedTask):
    """Regression of two inputs, whose loss counts what is known."""

    Options = WeatherOptions

    def data_set(self, train: bool) -> Any:
        return weather(train)

    def network(self) -> nn.Module:
        return TwoInputs(self.options.width)

    def inputs(self, batch: Tree) -> Tree:
        return {"left": batch["left"], "right": batch["right"]}

    def loss(self, outputs: Tensor, batch: Tree) -> tuple[Tensor, Number]:
        errors = (outputs - batch["target"]).square()[batch["known"]]
        return errors.sum(), batch["known"].sum()

    def metrics(self, outputs: Tensor, batch: Tree) -> dict[str, Metric]:
        errors = (outputs - batch["target"]).abs()[batch["known"]]
        return {"mean_error": (errors.sum(), batch["known"].sum())}


class WeatherInItems(Weather):
    """The same samples, one by one."""

    def data_set(self, train: bool) -> Any:
        whole = weather(train)
        return [{name: tensor[index] for name, tensor in whole.items()} for index in range(NUM_SAMPLES)]


class WeatherInBlocks(Weather):
    """The same network, in blocks, which zero3 shards one by one."""

    def blocks(self) -> Any:
        yield "first", _First(self.options.width)
        yield "act", nn.Tanh()
        yield "last", nn.Linear(self.options.width, 2)


class _First(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, width), nn.Linear(3, width)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        outputs: Tensor = self.left(left) + self.right(right)
        return outputs


class Heavy(Weather):
    """The same mean, whose sum and weight are a million times as large, as those of images of many pixels."""

    def loss(self, outputs: Tensor, batch: Tree) -> tuple[Tensor, Number]:
        errors, weight = super().loss(outputs, batch)
        return 1e6 * errors, 1e6 * weight


class Split(Weather):
    """Without held-out data."""

    def data_set(self, train: bool) -> Any:
        return weather(train=True) if train else None


class Unknown(Weather):
    """Nothing is known of any sample but those of one batch."""

    def data_set(self, train: bool) -> Any:
        whole = weather(train)
        return {**whole, "known": torch.zeros_like(whole["known"])} if train else whole


def fields(root: str, train: bool) -> tuple[Tensor, Tensor]:
    """Fields and what a known operator makes of them, (n, 1, 6, 6) each, for `regress`."""
    del root
    generator = torch.Generator().manual_seed(2 + int(train))
    before = torch.randn(NUM_SAMPLES, 1, 6, 6, generator=generator, dtype=torch.float64)
    return before, before.roll(1, -1) * before
