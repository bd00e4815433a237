"""What is certified must have been compared, and must be numbers."""

import argparse

import pytest
import torch

from lockstep.drill.certificate import _check_finite, _compare_tensors, _numbers_of_ranks
from lockstep.runtime.errors import LockstepError, NonFiniteError

STATE = {"model/weight": torch.ones(3), "optimizer/step": torch.tensor(4)}


@pytest.mark.parametrize("text", ["1", "2,0", "two"])
def test_numbers_of_ranks_without_a_kill_are_refused(text: str) -> None:
    assert _numbers_of_ranks("2,3") == [2, 3]
    with pytest.raises(argparse.ArgumentTypeError, match="is not two or more numbers of ranks"):
        _numbers_of_ranks(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_no_numbers_is_not_certified(value: float) -> None:
    _check_finite(STATE)
    with pytest.raises(NonFiniteError, match="model/weight is infinite or not a number"):
        _check_finite({**STATE, "model/weight": torch.tensor([1.0, value])})
    with pytest.raises(LockstepError, match="holds no model"):
        _check_finite({"optimizer/step": STATE["optimizer/step"]})


def test_tensors_that_are_missing_differ() -> None:
    assert _compare_tensors("model", STATE, STATE, same=False)
    assert not _compare_tensors("model", STATE, {"model/weight": STATE["model/weight"]}, same=False)
    assert not _compare_tensors("model", STATE, {**STATE, "model/weight": torch.full((3,), 1.001)}, same=False)
