"""Data sets: the included digits, downloads and their errors, synthetic images."""

import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lockstep.data import built_in
from lockstep.data.built_in import load_digits, load_synthetic
from lockstep.data.downloads import download, load
from lockstep.runtime.errors import DataError, ExitCode


def test_digits_are_5000_real_ones_split_evenly_by_class() -> None:
    train, held_out = load_digits(train=True), load_digits(train=False)
    assert train.images.shape == (4000, 1, 28, 28)
    assert held_out.images.shape == (1000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [400] * 10
    assert held_out.labels.bincount().tolist() == [100] * 10
    assert train.images.dtype == torch.uint8
    assert int(train.images.max()) == 255
    # Ink: MNIST's mean pixel is 0.1307, that of these 5,000 close to it. Noise or a wrong column would be far off.
    assert float(train.images.double().mean() / 255) == pytest.approx(0.13, abs=0.01)


def test_no_digit_is_both_learned_from_and_held_out() -> None:
    rows = [{row.numpy().tobytes() for row in load_digits(train).images} for train in (True, False)]
    assert len(rows[1]) == 1000
    assert not rows[0] & rows[1]


def test_a_missing_digits_file_is_told_with_its_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(built_in, "files", lambda _: tmp_path)
    built_in._read_table.cache_clear()
    with pytest.raises(DataError, match="env/setup") as caught:
        load_digits(train=True)
    assert caught.value.exit_code == ExitCode.DATA


def _write_mnist(folder: Path, num_samples: int) -> None:
    """Write a tiny MNIST in the format of the real files."""
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.arange(num_samples * 784, dtype=np.uint32).astype(np.uint8)
        header = struct.pack(">IIII", 2051, num_samples, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.arange(num_samples, dtype=np.uint8) % 10
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, num_samples) + labels.tobytes())


def test_mnist_is_read_from_its_files(tmp_path: Path) -> None:
    _write_mnist(tmp_path / "MNIST" / "raw", num_samples=12)
    images = load("mnist", tmp_path, train=True)
    assert images.images.shape == (12, 1, 28, 28)
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert images.images.flatten()[:300].tolist() == [index % 256 for index in range(300)]


@pytest.mark.parametrize("content", [b"garbage, not MNIST", b""], ids=["garbage", "empty"])
def test_damaged_mnist_is_told(content: bytes, tmp_path: Path) -> None:
    _write_mnist(tmp_path / "MNIST" / "raw", num_samples=12)
    for file in (tmp_path / "MNIST" / "raw").iterdir():
        file.write_bytes(content)
    download("mnist", tmp_path)  # the files are there: no download
    with pytest.raises(DataError, match="damaged"):
        load("mnist", tmp_path, train=True)


def test_missing_mnist_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root"):
        load("mnist", tmp_path / "nowhere", train=True)


def test_synthetic_images_can_be_learned_and_are_always_the_same() -> None:
    train, held_out = load_synthetic(200, train=True), load_synthetic(200, train=False)
    assert not torch.equal(train.images, held_out.images)
    assert zlib.crc32(train.images.numpy().tobytes()) == zlib.crc32(load_synthetic(200, True).images.numpy().tobytes())
    centres = torch.stack([train.images[train.labels == label].double().mean(0) for label in range(10)])
    distances = (held_out.images.double().unsqueeze(1) - centres).square().sum((2, 3, 4))
    assert (distances.argmin(1) == held_out.labels).double().mean() > 0.99


class _Runs:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_of_cifars_pickles_only_arrays_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of the files could change them after the check of their MD5."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": images, "labels": [0, 1]}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}, protocol=2))
    assert load("cifar10", tmp_path, train=False).images.flatten().tolist() == images.flatten().tolist()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": _Runs(tmp_path / "mark")}, protocol=2))
    with pytest.raises(DataError, match=r"mkdir, which CIFAR's files do not need"):
        load("cifar10", tmp_path, train=False)
    assert not (tmp_path / "mark").exists()
