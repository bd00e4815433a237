"""Checkpoints: there whole or not at all, and found by content."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lockstep.comm.cluster import Cluster
from lockstep.parallel.tensor_slices import Shard, State
from lockstep.runtime.errors import StorageError
from lockstep.settings import CheckpointSettings
from lockstep.training import checkpoint as module
from lockstep.training.checkpoint import (
    commit,
    discard_leftovers,
    latest_checkpoint,
    list_checkpoints,
    verify_checkpoint,
    write_parts,
)
from lockstep.training.checkpoint_writer import CheckpointWriter

STATE = {
    "model/weight": torch.arange(1000, dtype=torch.float32).view(10, 100),
    "model/count": torch.tensor(3),
    "optimizer/momentum_buffer/weight": torch.randn(10, 100, dtype=torch.float64),
    "model/half": torch.randn(5).bfloat16(),
}
COUNTERS = {"epoch": 2, "consumed": 64, "loss": 0.1 + 0.2}


def _write(run: Path, *steps: int, keep: int = 10) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    for step in steps:
        written = write_parts(run / "checkpoints", step, _state(STATE))
        commit(run / "checkpoints", step, [written], {**COUNTERS, "step": step}, keep)


def _state(tensors: dict[str, Tensor]) -> State:
    return {name: Shard.whole(tensor) for name, tensor in tensors.items()}


def _names(run: Path) -> list[int]:
    return [int(path.name) for path in list_checkpoints(run)]


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype for name, tensor in first.items()
    )


@pytest.mark.parametrize("max_file_bytes", [1, 5000, 2**30])
def test_what_was_saved_is_read_from_however_many_files(
    max_file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", max_file_bytes)
    _write(tmp_path, 7)
    found = verify_checkpoint(list_checkpoints(tmp_path)[0])
    assert (found.step, found.counters) == (7, {**COUNTERS, "step": 7})
    assert _same(found.load(), STATE)
    num_files = {1: 4, 5000: 3, 2**30: 1}[max_file_bytes]
    assert len(list(found.path.glob("*.safetensors"))) == num_files


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    _write(tmp_path, 1, 2, 30, 4, keep=2)
    assert _names(tmp_path) == [2, 4]  # 30 was of an attempt that this one has replaced


def test_a_damaged_one_with_a_higher_number_does_not_cost_the_one_just_written(tmp_path: Path) -> None:
    _write(tmp_path, 20, 30)
    _flip_a_byte(tmp_path / "checkpoints" / "000000000030")
    _write(tmp_path, 25, keep=1)
    assert _names(tmp_path) == [25]


def _flip_a_byte(path: Path) -> None:
    file = path / "rank00000-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def _tear(path: Path) -> None:
    file = path / "rank00000-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _lose_a_file(path: Path) -> None:
    (path / "rank00000-00000.safetensors").unlink()


def _lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _tear_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:40])


def _alter_a_counter(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["counters"]["consumed"] += 1
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = [_flip_a_byte, _tear, _lose_a_file, _lose_the_manifest, _tear_the_manifest, _alter_a_counter]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped_for_the_one_before(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    _write(tmp_path, 10, 20, 30)
    damage(tmp_path / "checkpoints" / "000000000030")
    told: list[str] = []
    found = latest_checkpoint(tmp_path, told.append)
    assert found is not None
    assert found.step == 20
    assert len(told) == 1
    assert "000000000030" in told[0]
    assert "altered" in told[0] or "torn" in told[0]
    assert _same(found.load(), STATE)


def test_a_run_none_of_whose_checkpoints_is_whole_does_not_begin_anew_in_silence(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, print) is None
    _write(tmp_path, 10)
    _flip_a_byte(tmp_path / "checkpoints" / "000000000010")
    with pytest.raises(StorageError, match="none of the 1 checkpoints"):
        latest_checkpoint(tmp_path, print)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_writer_saves_what_was_when_it_was_called(asynchronous: bool, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointSettings(asynchronous=asynchronous), Cluster.alone())
    tensor = torch.zeros(1_000_000)
    running_mean = torch.zeros(1000)
    for step in range(1, 4):
        tensor.fill_(step)
        running_mean.fill_(step)
        writer.save(step, _state({"tensor": tensor, "mean": running_mean}), {}, volatile=["mean"])
        running_mean.fill_(-1)  # the next forward pass
        writer.wait_for_copy()
        tensor.fill_(-1)  # the next optimizer step, while the thread writes
    writer.wait()
    for step, path in enumerate(list_checkpoints(tmp_path), start=1):
        loaded = verify_checkpoint(path).load()
        assert {name: tensor.unique().tolist() for name, tensor in loaded.items()} == {"tensor": [step], "mean": [step]}


def test_a_killed_writers_leftovers_are_removed(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    (tmp_path / "checkpoints" / ".writing-000000000010").mkdir()
    CheckpointWriter(tmp_path, CheckpointSettings(), Cluster.alone())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000000005"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_vanished_folder_is_told_by_the_next_call(asynchronous: bool, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointSettings(asynchronous=asynchronous), Cluster.alone())
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(StorageError, match="No such file"):  # noqa: PT012  the thread's error comes with the wait
        writer.save(1, _state(STATE), {})
        writer.wait()


def test_a_disk_that_takes_no_more_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files fails in write(2), as a full disk or a used-up quota does."""
    _write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StorageError, match="must be yours"):
            write_parts(tmp_path / "checkpoints", 2, _state({"large": torch.zeros(1_000_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    discard_leftovers(tmp_path / "checkpoints")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000000001"]
    assert _same(verify_checkpoint(list_checkpoints(tmp_path)[0]).load(), STATE)
