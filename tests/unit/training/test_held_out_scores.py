"""When to stop early, and which checkpoints are the best."""

import json
import math
from collections.abc import Sequence

import pytest

from lockstep.runtime.errors import SettingsError
from lockstep.settings.run import Criterion, parse_criterion
from lockstep.training.held_out_scores import HeldOutScores


def _scores(text: str, values: Sequence[float]) -> HeldOutScores:
    criterion = parse_criterion(text, "stop.early")
    assert criterion
    scores = HeldOutScores(criterion)
    for index, value in enumerate(values):
        scores.add(10 * (index + 1), {"loss": value})
    return scores


def test_a_criterion_is_a_score_a_mode_and_a_number() -> None:
    assert parse_criterion("return:max:3", "x") == Criterion("x", "return", "max", 3)
    assert parse_criterion("a:b:min:12", "x") == Criterion("x", "a:b", "min", 12)
    assert parse_criterion(None, "x") is None


@pytest.mark.parametrize("text", ["loss", "loss:5", "loss:least:5", "loss:min:0", "loss:min:", ":min:5", "loss:min:5:"])
def test_what_is_no_criterion_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="loss:min:5"):
        parse_criterion(text, "x")


def test_the_best_come_first_and_of_equal_ones_the_earliest() -> None:
    values = [3.0, 1.0, math.nan, 2.0, 1.0]
    assert _scores("loss:min:3", values).best == [20, 50, 40]
    assert _scores("loss:max:2", values).best == [10, 40]
    assert _scores("loss:min:2", [math.nan]).best == []


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([3, 2, 1], False),
        ([1, 2], False),
        ([1, 2, 3], True),
        ([1, 1, 1], True),  # equal is not better
        ([3, 4, 2, 3], False),
        ([3, 4, 2, 3, 2.5], True),
        ([math.nan], False),
        ([math.nan, math.nan], True),
    ],
    ids=str,
)
def test_a_run_stops_after_as_many_evaluations_without_a_better_score(values: list[float], stops: bool) -> None:
    assert bool(_scores("loss:min:2", values).why_to_stop()) == stops
    assert bool(_scores("loss:max:2", [-value for value in values]).why_to_stop()) == stops


def test_it_says_what_was_the_best() -> None:
    assert (
        _scores("loss:min:2", [0.5, 1, 1]).why_to_stop() == "no better loss in 2 evaluations than 0.5 after update 10"
    )


def test_the_evaluation_after_a_checkpoint_is_counted_once() -> None:
    scores = _scores("loss:min:2", [1, 2])
    resumed = _scores("loss:min:3", [])
    resumed.restore(json.loads(json.dumps(scores.as_saved())))
    resumed.add(20, {"loss": 2})
    assert resumed.as_saved() == scores.as_saved()
    other = _scores("loss:max:2", [])
    other.restore(scores.as_saved())  # of another mode
    assert other.ranking() == []


def test_an_unknown_score_is_told_with_those_that_there_are() -> None:
    with pytest.raises(SettingsError, match=r"stop.early is lost:min:2: .* known are loss, accuracy") as caught:
        _scores("lost:min:2", []).add(1, {"loss": 1, "accuracy": 2})
    assert caught.value.shared
