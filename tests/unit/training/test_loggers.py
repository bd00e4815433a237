"""The loggers hold what metrics.jsonl holds, also after a resume."""

import csv
import json
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lockstep.runtime.errors import SettingsError
from lockstep.settings import Settings
from lockstep.training.loggers import PATIENCE, check_loggers
from lockstep.training.run_folder import RunFolder
from lockstep.training.run_logger import RootRunLogger

EVERYWHERE = Settings(loggers="tensorboard, csv")


def test_csv_holds_the_values_of_the_record_line_by_line(tmp_path: Path) -> None:
    with RootRunLogger(RunFolder(tmp_path), EVERYWHERE, num_updates=2) as run_logger:
        run_logger.record("train", 1, epoch=0, samples=64, loss=2.5, accuracy=0.1)
        run_logger.record("held_out", 2, epoch=0, samples=128, loss=float("nan"), accuracy=0.75)
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["kind", "step", "epoch", "samples", "name", "value"],
            ["train", "1", "0", "64", "loss", "2.5"],
            ["train", "1", "0", "64", "accuracy", "0.1"],
            ["held_out", "2", "0", "128", "accuracy", "0.75"],
        ]


def test_what_came_after_the_place_where_a_run_goes_on_is_forgotten(tmp_path: Path) -> None:
    with RootRunLogger(RunFolder(tmp_path), EVERYWHERE, num_updates=3) as run_logger:
        run_logger.record("train", 1, epoch=0, samples=64, loss=2.5)
        mark = run_logger.mark()
        run_logger.record("train", 2, epoch=0, samples=128, loss=666.0)
    with RootRunLogger(RunFolder(tmp_path), EVERYWHERE, num_updates=3, mark=mark) as run_logger:
        run_logger.record("train", 2, epoch=0, samples=128, loss=2.25)
    steps = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2.5, 2.25]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert rows == ["train,1,0,64,loss,2.5", "train,2,0,128,loss,2.25"]


def test_none_leaves_the_record_alone(tmp_path: Path) -> None:
    with RootRunLogger(RunFolder(tmp_path), Settings(loggers="none"), num_updates=1) as run_logger:
        run_logger.record("train", 1, epoch=0, samples=64, loss=2.5)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_that_were_lost_are_told_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A power cut has left less of the record than the checkpoint knows of, and half a line."""
    with RootRunLogger(RunFolder(tmp_path), EVERYWHERE, num_updates=3) as run_logger:
        run_logger.record("train", 1, epoch=0, samples=64, loss=2.5)
        run_logger.record("train", 2, epoch=0, samples=128, loss=2.25)
        mark = run_logger.mark()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-7])
    with RootRunLogger(RunFolder(tmp_path), EVERYWHERE, num_updates=3, mark=mark) as run_logger:
        run_logger.record("train", 3, epoch=0, samples=192, loss=2.0)
    assert "some of its lines are lost" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 3]


def test_mlflow_that_is_missing_is_told_before_a_folder_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match="mlflow is not installed: pip install mlflow-skinny"):
        check_loggers(["csv", "mlflow"])
    check_loggers(["csv"])


class Server:
    """MLflow's client, as far as it is used, with the runs that it was told of; real ones are below."""

    def __init__(self) -> None:
        self.runs: dict[str, str] = {}
        self.metrics: list[tuple[str, str, float, int]] = []
        self.is_lost = False

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name)

    def create_run(self, experiment: str, run_name: str) -> Any:
        if self.is_lost:
            raise ConnectionError("no route\nto host")
        self.runs[f"{experiment}/{run_name}"] = "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=f"{experiment}/{run_name}"))

    def log_param(self, *_: object) -> None:
        pass

    def log_metric(self, run: str, name: str, value: float, step: int) -> None:
        if self.is_lost:
            raise ConnectionError("no route\nto host")
        self.metrics.append((run, name, value, step))

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run] = status


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: server))
    for variable in PATIENCE:
        monkeypatch.delenv(variable, raising=False)
    return server


def test_a_run_of_mlflow_goes_on_and_ends_as_the_run_does(server: Server, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with suppress(KeyboardInterrupt), RootRunLogger(folder, Settings(loggers="mlflow"), num_updates=2) as run_logger:
        run_logger.record("train", 1, epoch=0, samples=64, loss=2.5)
        mark = run_logger.mark()
        raise KeyboardInterrupt
    run = f"Default/{tmp_path.name}"
    assert server.runs == {run: "KILLED"}
    with RootRunLogger(folder, Settings(loggers="mlflow"), num_updates=2, mark=mark) as run_logger:
        assert server.runs == {run: "RUNNING"}
        run_logger.record("held_out", 2, epoch=0, samples=128, loss=2.25, accuracy=0.5)
    assert server.runs == {run: "FINISHED"}
    assert server.metrics == [
        (run, "train/loss", 2.5, 1),
        (run, "held_out/loss", 2.25, 2),
        (run, "held_out/accuracy", 0.5, 2),
    ]


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_server_that_is_lost_is_told_once_even_if_quiet(
    from_the_start: bool, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.is_lost = from_the_start
    with RootRunLogger(RunFolder(tmp_path), Settings(loggers="mlflow", quiet=True), num_updates=2) as run_logger:
        server.is_lost = True
        for step in (1, 2):
            run_logger.record("train", step, epoch=0, samples=64, loss=2.5)
    told = "lockstep: MLflow is lost, the run goes on without it: no route to host\n"
    assert capsys.readouterr().err == told
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_an_unknown_logger_is_refused() -> None:
    with pytest.raises(ValueError, match="loggers is csv,wandb: name some of tensorboard, csv, mlflow"):
        Settings(loggers="csv,wandb")


def test_mlflow_has_the_curves_and_the_settings_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is a site's own choice")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    mark = 0
    for step in (1, 2):  # the second goes on with the first
        with RootRunLogger(RunFolder(folder), Settings(loggers="mlflow"), num_updates=2, mark=mark) as run_logger:
            run_logger.record("train", step, epoch=0, samples=64 * step, loss=2.0 / step)
            mark = run_logger.mark()
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["optimizer.learning_rate"] == "0.05"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]


def test_an_mlflow_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="MLflow is a site's own choice")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with RootRunLogger(RunFolder(tmp_path), Settings(loggers="mlflow"), num_updates=1) as run_logger:
        run_logger.record("train", 1, epoch=0, samples=64, loss=2.0)
    assert capsys.readouterr().err.count("MLflow is lost, the run goes on without it") == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
