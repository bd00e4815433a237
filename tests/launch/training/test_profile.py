"""`--profile`: one trace of all ranks on one clock, a table, and a run that ends as it would have without."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, launch, slowness

TRAIN = f"{ROOT}/app/train.py"
COMMON = ["--data.name", "synthetic", "--data.num_samples", "640", "--data.batch_size", "64", "--num_epochs", "2"]
Events = list[dict[str, Any]]


def _train(prefix: list[str], folder: Path, *settings: str) -> str:
    finished = launch([*prefix, "python", TRAIN, *COMMON, *settings, "--run_dir", str(folder)])
    assert finished.returncode == 0, finished.output
    return finished.stdout


def _trace(folder: Path) -> Events:
    events: Events = json.loads(gzip.decompress((folder / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]
    return events


def _table(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "profile" / "profile.json").read_text())
    return table


def _named(events: Events, name: str, pid: int) -> Events:
    return [event for event in events if event.get("name") == name and event["pid"] == pid]


@pytest.mark.thorough
def test_two_ranks_and_horovod_are_in_one_trace_on_one_clock(tmp_path: Path) -> None:
    output = _train(["mpirun", "-np", "2"], tmp_path / "run", "--profile", "9-11")
    events = _trace(tmp_path / "run")
    names = {event["args"]["name"]: event["pid"] for event in events if event.get("name") == "process_name"}
    assert len(names) == 3
    of_ranks = [pid for name, pid in names.items() if name.startswith("rank ")]
    for pid in of_ranks:
        assert len(_named(events, "optimizer step", pid)) == 3
        assert len(_named(events, "aten::convolution_backward", pid)) == 6  # two layers, three updates
    # Horovod began with the gradient while both ranks were waiting for it, and rank 0 waited until it had ended.
    horovod = names["Horovod on rank 0"]
    of_horovod = [event for event in events if event["pid"] == horovod and "ts" in event]
    waits = [_named(events, "gradient.0 all-reduce", pid) for pid in of_ranks]
    sums = [event["ts"] for event in of_horovod if event.get("name") == "ALLREDUCE"]
    assert len(waits[0]) == len(waits[1]) == 3
    for first, second in zip(*waits, strict=True):
        begin = max(first["ts"], second["ts"])
        end = min(first["ts"] + first["dur"], second["ts"] + second["dur"])
        assert any(begin - 100 <= moment <= end + 100 for moment in sums), (begin, end, sums)
    assert {event["name"] for event in of_horovod if event["ph"] == "i"} == {
        "rank 0 of its group is ready",
        "rank 1 of its group is ready",
    }
    table = _table(tmp_path / "run")
    assert table["updates"] == [9, 11]
    assert {share["name"] for share in table["phases"]} >= {"forward and backward pass", "gradient.0 all-reduce"}
    assert "updates 9-11: ms an update" in output
    assert "\x1b" not in output
    assert sorted(path.name for path in (tmp_path / "run" / "profile").iterdir()) == ["profile.json", "trace.json.gz"]
    _train(["mpirun", "-np", "2"], tmp_path / "plain")
    digests = [json.loads((tmp_path / run / "summary.json").read_text())["model_digest"] for run in ("run", "plain")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("prefix", "settings", "phase"),
    [
        ([], ["--profile", "11-99"], "forward and backward pass"),  # from an epoch's first update to the end of the run
        pytest.param(
            *(
                ["mpirun", "-np", "2"],
                ["--profile", "3", "--parallel", "pipeline", "--quiet", "true"],
                "message from rank",
            ),
            marks=pytest.mark.thorough,
        ),
        pytest.param(  # no timeline
            *(["horovodrun", "--gloo", "-np", "2"], ["--profile", "10", "--parallel", "zero3"], "all-gather"),
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_whatever_the_strategy_and_the_launcher(
    prefix: list[str], settings: list[str], phase: str, tmp_path: Path
) -> None:
    output = _train(prefix, tmp_path / "run", *settings)
    ranks = {event["pid"] for event in _trace(tmp_path / "run") if event.get("cat") == "phase"}
    assert len(ranks) == (2 if prefix else 1)
    table = _table(tmp_path / "run")
    assert table["updates"] == {"11-99": [11, 20], "3": [3, 3], "10": [10, 10]}[settings[1]]
    names = {share["name"] for share in table["phases"]}
    assert any(phase in name for name in names), names
    assert not names & {"evaluation", "profiling"}  # which lie between or behind these updates
    assert ("ms an update" in output) == ("--quiet" not in settings)


@pytest.mark.thorough
def test_agents_are_profiled_update_by_update(tmp_path: Path) -> None:
    settings = ["--config", "cartpole", "--ppo.total_steps", "512", "--ppo.num_steps", "8", "--profile", "3-4"]
    finished = launch(
        ["mpirun", "-np", "2", "python", TRAIN, *settings, "--run_dir", str(tmp_path / "run")], timeout_seconds=120
    )
    assert finished.returncode == 0, finished.output
    table = _table(tmp_path / "run")
    assert table["updates"] == [3, 4]
    assert "steps of the environments" in {share["name"] for share in table["phases"]}


@pytest.mark.thorough
def test_a_run_that_is_stopped_keeps_what_was_recorded_and_is_not_profiled_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopping = ["--num_epochs", "100000", "--stop.after_minutes", f"{0.2 * slowness()}", "--stop.margin_seconds", "1"]
    stopping += ["--profile", "9-999999", "--data.batch_size", "640", "--evaluate_every", "0"]  # few: a small trace
    finished = launch(["python", TRAIN, *COMMON, *stopping, "--run_dir", str(run)], timeout_seconds=120)
    assert finished.returncode == 75, finished.output
    table = _table(run)
    assert 9 <= table["updates"][1] < 999999
    resumed = launch(["python", TRAIN, "--resume", "--run_dir", str(run), "--stop.after_minutes", "0.01"])
    assert resumed.returncode == 75, resumed.output
    assert _table(run) == table


@pytest.mark.thorough
def test_updates_that_never_come_are_refused(tmp_path: Path) -> None:
    finished = launch(["mpirun", "-np", "2", "python", TRAIN, *COMMON, "--profile", "21", "--run_dir", str(tmp_path)])
    assert finished.returncode == 2, finished.output
    assert finished.output.count("profile is 21: the run has 20 updates") == 1
    taken = {"HOROVOD_TIMELINE": str(tmp_path / "mine.json")}
    finished = launch(["python", TRAIN, *COMMON, "--profile", "2"], environment=taken)
    assert finished.returncode == 2, finished.output
    assert finished.output.count("profile is set, and so is HOROVOD_TIMELINE") == 1
