"""Where a run log goes on whose writer is gone."""

import json
from pathlib import Path

import pytest

from lockstep.training.run_logger import mark_after

LINES = [("train", 10), ("held_out", 12), ("train", 20), ("held_out", 24), ("train", 30)]


@pytest.mark.parametrize(
    ("step", "num_kept"),
    [(9, 0), (10, 1), (11, 1), (12, 1), (13, 2), (20, 3), (24, 3), (25, 4), (30, 5), (99, 5)],
)
def test_what_is_recorded_anew_is_cut_off(step: int, num_kept: int, tmp_path: Path) -> None:
    """After update 12, its training line stands, and the evaluation that follows it is done again."""
    lines = [json.dumps({"kind": kind, "step": at}) + "\n" for kind, at in LINES]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(lines))
    assert mark_after(metrics, step) == len("".join(lines[:num_kept]))


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 2}'])
def test_a_line_that_was_cut_short_is_cut_off(torn: str, tmp_path: Path) -> None:
    whole = '{"kind": "train", "step": 1}\n'
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(whole + torn)
    assert mark_after(metrics, 5) == len(whole)


def test_a_run_logger_that_was_never_begun_goes_on_at_its_beginning(tmp_path: Path) -> None:
    assert mark_after(tmp_path / "metrics.jsonl", 5) == 0
