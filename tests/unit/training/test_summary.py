"""What a person reads at the end of a run."""

from pathlib import Path
from typing import Any

import pytest

from lockstep.training.run_folder import RunFolder
from lockstep.training.summary import by_group, summary_lines

SECONDS = {
    "forward and backward pass": 6.0,
    "optimizer step": 1.0,
    "waiting": 1.0,
    "data loading": 1.0,
    "checkpoint": 1.0,
}
SUMMARY: dict[str, Any] = {
    "num_updates": 756,
    "training_seconds": 18.24,
    "samples_per_second": 2637.1,
    "num_ranks": 2,
    "peak_mib_of_ranks": [600.2, 612.7],
    "seconds_of_ranks": [SECONDS, {**SECONDS, "something new": 10.0}],
    "share_lost_waiting_for_it": 0.01,
    "slowest_rank": 1,
    "num_parameters": 1199882,
}


def test_every_second_belongs_to_one_group() -> None:
    grouped = by_group({**SECONDS, "something new": 10.0})
    assert grouped == {
        "computing": 7.0,
        "waiting": 1.0,
        "input": 1.0,
        "checkpoint": 1.0,
        "evaluation": 0.0,
        "other": 10.0,
    }


def test_the_lines_say_what_was_done_where_the_time_went_and_what_to_do_next() -> None:
    assert summary_lines(RunFolder(Path("runs/now")), SUMMARY, "images") == [
        "Trained  756 updates in 18.2 s, 2637 images/s",
        "Ranks    2, at most 613 MiB each",
        "Time     computing 47%, waiting 7%, input 7%, checkpoint 7%, other 33%",
        "Model    runs/now/model.safetensors, 1,199,882 parameters",
        "Report   lockstep report runs/now",
    ]


def test_an_early_stop_and_the_best_update_are_told() -> None:
    judged = {"stopped_early": "no better loss in 3 evaluations", "best": {"update": 42, "loss": 0.5}}
    lines = summary_lines(RunFolder(Path("run")), {**SUMMARY, **judged}, "images")
    assert {"Stopped  early: no better loss in 3 evaluations", "Best     after update 42, loss 0.5"} < {*lines}


@pytest.mark.parametrize(("lost", "told"), [(0.049, False), (0.05, True)])
def test_a_slow_rank_is_told_if_it_cost_something(lost: float, told: bool) -> None:
    lines = summary_lines(RunFolder(Path("run")), {**SUMMARY, "share_lost_waiting_for_it": lost}, "images")
    assert ("Slowest  rank 1: 5% of all ranks' time went into waiting for it" in lines) == told
