"""Regression with the squared error: from fields to fields, or from fields to numbers.

On the built-in weather-like data set (data/vorticity.py), or on pairs (input, target) of a user's own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lockstep.data.vorticity import energy_and_enstrophy, load_vorticity, make_vorticity
from lockstep.models.field_net import field_net_blocks
from lockstep.runtime.errors import DataError, SettingsError
from lockstep.runtime.importing import construct, import_object
from lockstep.tasks.metric_sums import Metric, Number
from lockstep.tasks.pictures import Pictures
from lockstep.tasks.supervised import Evaluation, SupervisedTask

VORTICITY = "vorticity"
NUM_DRAWN = 4


@dataclass(frozen=True)
class RegressOptions:
    """Settings of regression."""

    target: Literal["fields", "numbers"] = "fields"
    """vorticity: what is predicted: the field after the forecast, or its energy and enstrophy."""

    width: int = 24
    """Channels of the network's hidden layers."""

    num_blocks: int = 3
    """Residual blocks of the network."""

    def __post_init__(self) -> None:
        if min(self.width, self.num_blocks) < 1:
            raise ValueError(f"width is {self.width} and num_blocks {self.num_blocks}: each must be at least 1")


class Regress(SupervisedTask):
    """The regression task: the loss is the mean squared error over all numbers of all samples."""

    Options = RegressOptions
    options: RegressOptions

    @override
    def prepare(self) -> None:
        if self.settings.data.name == VORTICITY:
            try:
                make_vorticity(Path(self.settings.data.root))
            except OSError as error:
                message = f"data.root is {self.settings.data.root}, where {VORTICITY} cannot be made ({error})"
                raise DataError(f"{message}: name a folder that you may write and all nodes see") from error

    @override
    def data_set(self, train: bool) -> Any:
        """Load pairs of inputs and targets.

        Raises:
            SettingsError: `data.name` is no data set for regression.
        """
        name, root = self.settings.data.name, self.settings.data.root
        if "." in name:
            return import_object(name, "data.name")(root, train)
        if name != VORTICITY:
            message = f"data.name is {name}: regress learns {VORTICITY}, or pairs of your own, my_package.my_data"
            raise SettingsError(message)
        before, after = load_vorticity(Path(root), train)
        if self.options.target == "fields":
            return before, after
        scale = energy_and_enstrophy(load_vorticity(Path(root), train=True)[1])
        return before, (energy_and_enstrophy(after) - scale.mean(0)) / scale.std(0)

    @override
    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Build the network, or the user's own, which is called with the shapes of an input and of a target.

        Raises:
            SettingsError: on every rank: it does not fit these shapes.
        """
        inputs, targets = (tensor.shape[1:] for tensor in self._first())
        settings = self.settings.model
        if "." in settings.name:
            yield "network", construct(settings.name, "model.name", nn.Module, inputs, targets, **settings.options)
            return
        try:
            yield from field_net_blocks(inputs, targets, self.options.width, self.options.num_blocks)
        except ValueError as error:
            message = f"the built-in network of regress: {error}; name one of your own, --model.name my_package.MyNet"
            raise SettingsError(message).as_shared() from error

    def _first(self) -> tuple[Tensor, Tensor]:
        inputs, targets = next(self.train_set.batches([np.array([0])], self.dtype))
        return inputs, targets

    @override
    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Number]:
        _, targets = batch
        if outputs.shape != targets.shape:
            raise ValueError(f"the outputs are {tuple(outputs.shape)} and the targets {tuple(targets.shape)}")
        return (outputs - targets).square().sum(), targets.numel()

    @override
    def held_out_metrics(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Mapping[str, Metric]:
        """Compute sums (4,) from which RMSE and R2 follow: of squared errors, of 1, of targets and of their squares."""
        targets = batch[1].double()
        squares = (outputs.double() - targets).square().sum()
        count = torch.full_like(squares, targets.numel())
        moments = torch.stack([squares, count, targets.sum(), targets.square().sum()])
        return {"loss": self.loss(outputs, batch), "moments": moments}

    @override
    def scores_of_counts(self, counts: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute the root mean squared error, and R2: the share of the targets' variance that is explained."""
        if "moments" not in counts:
            return {}
        squares, count, total, total_squares = counts["moments"].tolist()
        variance = total_squares - total**2 / count
        return {"rmse": (squares / count) ** 0.5, "r2": 1 - squares / variance if variance > 0 else math.nan}

    @override
    def evaluation_of(self, scores: dict[str, float], counts: Mapping[str, Tensor]) -> Evaluation:
        return super().evaluation_of({**self.scores_of_counts(counts), **scores}, counts)

    @override
    def pictures(self, model: nn.Module) -> Pictures | None:
        """Draw held-out fields: before, after, predicted, and the error. Numbers are not drawn."""
        batch = next(self.held_out.batches([np.arange(min(NUM_DRAWN, len(self.held_out)))], self.dtype))
        inputs, targets = batch
        outputs = self.outputs(model, inputs)
        if targets.dim() != 4:
            return None
        columns = {"input": inputs, "truth": targets, "prediction": outputs, "error": outputs - targets}
        images = [column[row, 0].cpu().numpy() for row in range(len(targets)) for column in columns.values()]
        return Pictures("predictions", "Held-out samples", images, [*columns] * len(targets), len(columns))
