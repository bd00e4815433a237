"""The report: one page, which holds everything within itself."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lockstep.commands.report import render
from lockstep.report.drawing import curve_names
from lockstep.report.records import efficiencies, read_record
from lockstep.settings import Settings
from lockstep.settings.reading import dump_settings

RANK = {"rank": 0, "node": "n1", "cpus": [0, 1, 2], "num_cpus_of_node": 8, "cpu": "a CPU", "gpu": None, "threads": 3}


def _make_run(folder: Path, settings: Settings, num_ranks: int, rate: float, **files: Any) -> Path:
    (folder / "recorder").mkdir(parents=True)
    (folder / "settings.yaml").write_text(dump_settings(settings))
    seconds = [
        {"forward and backward pass": 8.0, "waiting": 1.0 + rank, "data loading": 0.5} for rank in range(num_ranks)
    ]
    summary = {
        "accuracy": 0.75,
        "loss": 0.5,
        "num_ranks": num_ranks,
        "num_updates": 20,
        "num_skipped": 1,
        "num_parameters": 1234567,
        "model_digest": "d1ge57",
        "samples_per_second": rate,
        "seconds_of_ranks": seconds,
        "peak_mib_of_ranks": [100 + rank for rank in range(num_ranks)],
    }
    environment = {
        "command": ["python", "app/train.py"],
        "ranks": [{**RANK, "rank": rank} for rank in range(num_ranks)],
    }
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 10, "epoch": 0, "samples": 640, "loss": 1.5, "accuracy": 0.25, "learning_rate": 0.1},
        {"kind": "held_out", "step": 20, "epoch": 0, "samples": 1280, "loss": 0.5, "accuracy": 0.75},
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    confusion = {"classes": ["cats", "dogs"], "confusion": [[3, 1], [0, 4]]}
    first = _make_run(tmp_path / "first", Settings(), 1, 100.0, evaluation=confusion)
    (first / "recorder" / "verdict.txt").write_text("rank 3 <b>stalls</b>\n")
    Image.new("RGB", (8, 8)).save(first / "mistakes.png")
    episodes = {"episodes": [{"seed": 1, "total_reward": 5.0, "length": 3}]}
    second = _make_run(tmp_path / "second", replace(Settings(), num_epochs=3), 2, 150.0, evaluation=episodes)
    return [first, second]


def test_a_page_holds_everything_within_itself(runs: list[Path]) -> None:
    page = render([read_record(run) for run in runs])
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 6  # curves; time and confusion matrix and mistakes; time and returns
    assert all(source.startswith("data:image/") for source in sources)
    assert "rank 3 &lt;b&gt;stalls" in page
    assert "<td>12</td><td>3</td>" in re.sub(r"\s+", "", page)  # num_epochs differs
    assert "d1ge57" in page
    assert "1,234,567 parameters" in page
    assert "0-2 of 8 (a CPU)" in page


def test_efficiency_is_beside_the_run_with_the_fewest_ranks(runs: list[Path]) -> None:
    records = [read_record(run) for run in reversed(runs)]
    assert efficiencies(records) == [0.75, 1.0]
    assert records[0].seconds_of_ranks[1]["waiting"] == 2.0
    assert records[0].seconds_of_ranks[1]["input"] == 0.5
    assert records[0].slowest is not None
    assert records[0].slowest[0] == 0
    assert records[1].slowest is None


def test_curves_begin_with_what_is_judged(runs: list[Path]) -> None:
    assert curve_names([read_record(runs[0])]) == ["accuracy", "loss"]


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(dump_settings(Settings()))
    page = render([read_record(tmp_path)])
    assert "not finished" in page
    assert "Nothing was recorded yet" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_a_browser_shows_it_offline(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(render([read_record(run) for run in runs]))
    finished = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--no-first-run", f"--user-data-dir={tmp_path}/profile", f"--screenshot={tmp_path}/page.png"),
            f"file://{tmp_path}/report.html",
        ],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    with Image.open(tmp_path / "page.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 50


def test_where_an_update_went_is_shown_if_it_was_profiled(tmp_path: Path) -> None:
    share = {"mean": 12.5, "least": 11.25, "most": 13.75}
    profile = {
        "updates": [20, 24],
        "phases": [{"name": "gradient.0 all-reduce", **share}],
        "operators": [{"name": "aten::mm", **share}],
    }
    run = _make_run(tmp_path / "run", Settings(), 2, 100.0)
    assert "as profiled" not in render([read_record(run)])
    (run / "profile").mkdir()
    (run / "profile" / "profile.json").write_text(json.dumps(profile))
    page = render([read_record(run)])
    assert "over updates 20 to 24" in page
    row = r"<td>{}</td><td class=\"number\">12.500</td><td class=\"number\">11.250</td><td class=\"number\">13.750</td>"
    for name in ("gradient.0 all-reduce", "aten::mm"):
        assert re.search(row.format(re.escape(name)), page)
