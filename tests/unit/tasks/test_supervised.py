"""What is asked of a user's task, on one rank."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.runtime.errors import LockstepError, SettingsError, UserCodeError
from lockstep.settings import DataSettings, Settings
from lockstep.tasks.metric_sums import Metric
from lockstep.tasks.supervised import SupervisedTask

SETTINGS = Settings(precision="float64", data=DataSettings(batch_size=8))


class Line(SupervisedTask):
    """The smallest task: a line through points."""

    def data_set(self, train: bool) -> Any:
        del train
        inputs = np.random.rand(20, 1)  # noqa: NPY002  # drawn anew by each rank, but for the seed
        return inputs, 3 * inputs

    def network(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        return (outputs - batch[1]).square().sum(), len(batch[1])


def _task(kind: type[SupervisedTask], settings: Settings = SETTINGS) -> SupervisedTask:
    return kind(settings, Cluster.alone())


def test_what_a_data_set_draws_as_it_is_loaded_is_the_same_on_every_rank() -> None:
    first, second = (_task(Line).train_set for _ in range(2))
    other = _task(Line, replace(SETTINGS, seed=1)).train_set
    drawn = [next(data.batches([np.arange(20)], torch.float64))[0] for data in (first, second, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class NamedLoss(Line):
    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Metric]:  # noqa: ARG002
        return {"loss": (outputs.sum(), 1)}


class NoMetrics(Line):
    def held_out_metrics(self, outputs: Tensor, batch: Any) -> dict[str, Metric]:  # noqa: ARG002
        return {}


class TwoParts(Line):
    """Its blocks pass on a pair."""

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "first", _Pair()
        yield "second", _Sum()


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * inputs, inputs


class _Sum(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


class TwoInputs(Line):
    def inputs(self, batch: Any) -> Any:
        return batch[0], batch[0]

    def network(self) -> nn.Module:
        return nn.Bilinear(1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "settings", "error", "told"),
    [
        (NamedLoss, {}, UserCodeError, "a metric called loss"),
        (NoMetrics, {}, UserCodeError, "gave no metric"),
        (
            TwoParts,
            {"parallel": "zero3"},
            SettingsError,
            "passes on one tensor, and what block 2",
        ),
        (TwoInputs, {"parallel": "pipeline"}, SettingsError, "passes on one tensor, and the network's inputs"),
    ],
)
def test_what_does_not_fit_is_told_before_a_run(
    kind: type[SupervisedTask], settings: dict[str, Any], error: type[LockstepError], told: str
) -> None:
    with pytest.raises(error, match=told):
        _task(kind, replace(SETTINGS, **settings)).try_out()


@pytest.mark.parametrize("kind", [TwoParts, TwoInputs])
def test_blocks_that_pass_on_a_pair_and_several_inputs_fit_replicas(kind: type[SupervisedTask]) -> None:
    task = _task(kind)
    task.try_out()
    model = task.build_model()
    scores = task.evaluate(model, lambda inputs: task.outputs(model, inputs), 0, 1).scores
    assert scores["loss"] > 0


class OnlyCounts(Line):
    def held_out_metrics(self, outputs: Tensor, batch: Any) -> dict[str, Metric]:  # noqa: ARG002
        return {"count": torch.ones(3)}


class Seldom(Line):
    def held_out_metrics(self, outputs: Tensor, batch: Any) -> dict[str, Metric]:
        return {"seldom": (0.0, 0.0), "loss": self.loss(outputs, batch)}


def test_an_evaluation_has_a_score_and_keeps_their_order() -> None:
    task = _task(OnlyCounts)
    model = task.build_model()
    with pytest.raises(UserCodeError, match="counts alone"):
        task.evaluate(model, model, 0, 1)
    task = _task(Seldom)
    evaluation = task.evaluate(task.build_model(), model, 0, 1)
    assert list(evaluation.scores) == ["seldom", "loss"]
    assert np.isnan(evaluation.scores["seldom"])


def test_a_constant_target_has_no_r2(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_constants")
    module.data = lambda *_: (torch.rand(8, 1, 6, 6), torch.ones(8, 1))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_constants", module)
    from lockstep.tasks.regress import Regress

    settings = replace(SETTINGS, task="regress", data=replace(SETTINGS.data, name="my_constants.data"))
    task = Regress(settings, Cluster.alone())
    model = task.build_model()
    scores = task.evaluate(model, lambda inputs: task.outputs(model, inputs), 0, 1).scores
    assert scores["rmse"] > 0
    assert np.isnan(scores["r2"])
    assert task.settings.options == {"target": "fields", "width": 24, "num_blocks": 3}
