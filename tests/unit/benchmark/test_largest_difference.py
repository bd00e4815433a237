"""The largest difference that a benchmark tells is NaN if any is."""

import math

import pytest
import torch

from lockstep.benchmark.inside_job import _compare
from lockstep.benchmark.sharding import StrategyResult

NAN = float("nan")


def _found(losses: list[float], weight: float) -> StrategyResult:
    return StrategyResult(losses, {"a": torch.ones(2), "b": torch.tensor([weight])}, 0, 0.0, 0.0, None)


@pytest.mark.parametrize("losses", [[NAN, 1.0], [1.0, NAN]])
def test_a_loss_that_is_no_number_is_told(losses: list[float]) -> None:
    told = _compare(_found(losses, 1.0), _found([1.0, 1.0], 1.0))
    assert told["largest_loss_difference"] is not None
    assert math.isnan(told["largest_loss_difference"])
    assert told["largest_weight_difference"] == 0.0


def test_a_weight_that_is_no_number_is_told() -> None:
    told = _compare(_found([1.0], NAN), _found([1.5], 1.0))
    assert told["largest_loss_difference"] == pytest.approx(1 / 3)
    assert told["largest_weight_difference"] is not None
    assert math.isnan(told["largest_weight_difference"])
