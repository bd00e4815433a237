"""The comparison with other PPOs: what it reads and what it tells."""

import json
from pathlib import Path

from lockstep.benchmark.ppo_peers import CLEANRL, LOCKSTEP, Result, read_run, rows


def test_ratios_are_taken_round_by_round_and_unsolved_counts_as_never() -> None:
    results = {
        LOCKSTEP: [Result(200.0, 4096), Result(300.0, 8192), Result(100.0, None)],
        CLEANRL: [Result(100.0, None), Result(100.0, 4096), Result(100.0, None)],
    }
    ours, theirs = rows(results)
    assert ours == (LOCKSTEP, "200 (100 ... 300)", "", "8,192 (2 of 3)")
    assert theirs[:3] == (CLEANRL, "100 (100 ... 100)", "2.00 (1.00 ... 3.00)")
    assert theirs[3].endswith("(1 of 3)")
    assert "4,096" not in theirs[3]  # the median run never solved it


def test_the_first_evaluation_that_solves_it_counts(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"samples_per_second": 1234.5}))
    returns = [(4096, 120.0), (8192, 475.0), (12288, 300.0), (16384, 500.0)]
    lines = [{"kind": "held_out", "samples": samples, "return": value} for samples, value in returns]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(json.dumps(line) for line in [{"kind": "train", "samples": 1024}, *lines])
    )
    assert read_run(tmp_path) == Result(1234.5, 8192)
