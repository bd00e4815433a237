"""What a run leaves behind, whole or not at all."""

import contextlib
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lockstep.runtime.errors import ExitCode, SettingsError, StorageError
from lockstep.settings import Settings
from lockstep.tasks.pictures import Pictures
from lockstep.training.model_file import TensorFileWriter
from lockstep.training.plots import plot_curves, plot_pictures
from lockstep.training.run_folder import RunFolder
from lockstep.training.run_logger import RootRunLogger

PNG_HEADER = b"\x89PNG\r\n"


def test_a_run_without_a_name_gets_a_new_folder_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = RunFolder.create(Settings()), RunFolder.create(Settings())
    assert first.path != second.path
    assert Path("runs/latest").resolve() == second.path.resolve()
    second.begin(Settings(seed=3, run_dir=str(second.path)), {})
    assert second.load_settings() == Settings(seed=3)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    settings = Settings(run_dir=str(tmp_path / "run"))
    RunFolder.create(settings).write("metrics.jsonl", "")
    with pytest.raises(SettingsError, match="not empty") as caught:
        RunFolder.create(settings)
    assert caught.value.exit_code == ExitCode.SETTINGS


def test_two_jobs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(Settings(run_dir=str(tmp_path / "run")))
    with folder.locked(), pytest.raises(StorageError, match="another job"), folder.locked():
        pass
    with folder.locked():
        pass


def test_the_lock_of_one_that_has_ended_is_waited_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with contextlib.ExitStack() as other:
        other.enter_context(folder.locked())
        threading.Timer(0.7, other.close).start()
        started = time.monotonic()
        with folder.locked(wait_seconds=30):
            assert 0.5 < time.monotonic() - started < 30


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="must be yours") as caught:
        RunFolder.create(Settings(run_dir=str(tmp_path / "file" / "run")))
    assert caught.value.exit_code == ExitCode.STORAGE


def _save(folder: RunFolder, state: dict[str, Tensor]) -> None:
    with folder.model_writer(state) as writer:
        for name in reversed(state):
            writer.write(name, state[name])


def test_a_model_is_read_as_it_was_saved(tmp_path: Path) -> None:
    state = {
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "weight": torch.randn(4, 2, dtype=torch.float64).T,  # not contiguous
    }
    folder = RunFolder(tmp_path)
    _save(folder, state)
    loaded = RunFolder.open(tmp_path).load_model()
    assert loaded.keys() == state.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in state.items()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_torn_model_and_a_missing_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no model"):
        RunFolder.open(tmp_path)
    _save(RunFolder(tmp_path), {"weight": torch.zeros(1000)})
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StorageError, match="altered"):
        RunFolder.open(tmp_path).load_model()
    file.write_bytes(whole[:-100])
    with pytest.raises(StorageError, match="torn"):
        RunFolder.open(tmp_path).load_model()


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write("summary.json", "before")
    with pytest.raises(UnicodeEncodeError):
        folder.write("summary.json", "\ud800")
    assert (tmp_path / "summary.json").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """/dev/full is a real full disk: every write to it fails with ENOSPC."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(StorageError, match="No space left"),
        RootRunLogger(RunFolder(tmp_path), Settings(), num_updates=1) as run_logger,
    ):
        run_logger.record("train", 1, epoch=0, samples=64, loss=1.0, accuracy=0.5)


def test_the_run_logger_keeps_every_value_in_both_formats(tmp_path: Path) -> None:
    with RootRunLogger(RunFolder(tmp_path), Settings(), num_updates=2) as run_logger:
        run_logger.record("train", 1, epoch=0, samples=64, loss=2.5, accuracy=0.25, learning_rate=0.125)
        run_logger.record("held_out", 2, epoch=1, samples=128, loss=1.5, accuracy=0.75)
        run_logger.advance(2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"kind": "train", "step": 1, "epoch": 0, "samples": 64, "loss": 2.5, "accuracy": 0.25, "learning_rate": 0.125},
        {"kind": "held_out", "step": 2, "epoch": 1, "samples": 128, "loss": 1.5, "accuracy": 0.75},
    ]
    events = next(tmp_path.glob("events.out.tfevents.*")).read_bytes()
    assert all(tag in events for tag in (b"train/loss", b"train/accuracy", b"held_out/loss", b"held_out/accuracy"))
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", ("loss", "accuracy"), "images")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG_HEADER)


def test_what_json_cannot_say_is_null_and_still_drawn(tmp_path: Path) -> None:
    with RootRunLogger(RunFolder(tmp_path), Settings(), num_updates=2) as run_logger:
        run_logger.record("held_out", 1, epoch=0, samples=64, loss=2.0, accuracy=0.5)
        run_logger.record("held_out", 2, epoch=1, samples=128, loss=float("inf"), accuracy=0.5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["loss"] is None
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", ("loss", "accuracy"), "images")


@pytest.mark.parametrize("num_images", [0, 1, 24])
def test_mistakes_are_drawn_however_few(num_images: int, tmp_path: Path) -> None:
    images = [np.full((28, 28), index, dtype=np.uint8) for index in range(num_images)]
    plot_pictures(
        Pictures("mistakes", "mistakes", images, ["4 taken for 9"] * num_images, 8), tmp_path / "mistakes.png"
    )
    assert (tmp_path / "mistakes.png").read_bytes().startswith(PNG_HEADER)


def test_a_quiet_run_logger_writes_and_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, said in ((True, ""), (False, "Epoch: 0\n")):
        (tmp_path / str(quiet)).mkdir()
        with RootRunLogger(RunFolder(tmp_path / str(quiet)), Settings(quiet=quiet), num_updates=1) as run_logger:
            run_logger.say("Epoch: 0")
            run_logger.record("train", 1, epoch=0, samples=64, loss=2.0)
        assert capsys.readouterr().out == said
        assert '"loss": 2.0' in (tmp_path / str(quiet) / "metrics.jsonl").read_text()


def test_a_file_is_written_row_by_row_in_any_order(tmp_path: Path) -> None:
    """As it would be written at once, also if its rows have no numbers."""
    tensors = {"field": torch.randn(5, 2, 3), "flag": torch.rand(5) < 0.5, "none": torch.empty(5, 0)}
    meta_state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    with TensorFileWriter(tmp_path / "rows", meta_state, {"num_samples": "5"}) as writer:
        for start, stop in ((3, 5), (0, 2), (2, 2), (2, 3)):
            for name, tensor in tensors.items():
                writer.write_rows(name, start, tensor[start:stop])
    with safe_open(tmp_path / "rows", "pt") as file:
        assert file.metadata() == {"format": "pt", "num_samples": "5"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
