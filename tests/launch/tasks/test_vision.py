"""Image classification by the programs as users start them."""

import json
import shlex
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.launching import ROOT, block_of, launch

DOC = ROOT / "docs" / "vision.md"
FOLDER = "--data.name image_folder --data.root images --data.image_size 32 --data.batch_size 8 --model.name resnet18"


def _make_folder(root: Path) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 18), ("val", 5)):
        for label, name in enumerate(("cats", "dogs")):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 80, (40, 48, 3), dtype=np.uint8) + np.uint8(150 * label)
                Image.fromarray(pixels).save(root / part / name / f"{index}.jpg")


def _workers() -> set[int]:
    return {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any("multiprocessing.forkserver" in word for word in process.info["cmdline"] or ())
    }


@pytest.mark.thorough
def test_a_folder_of_images_is_learned_by_ranks_with_workers(tmp_path: Path) -> None:
    """With augmentation and mixup: each image once an epoch, and no leftover worker process."""
    _make_folder(tmp_path / "images")
    before = _workers()
    settings = f"{FOLDER} --data.augmentation resized_crop --data.num_workers 2 --data.mixup 0.2 --checks.ledger true"
    train = f"mpirun -np 2 python {shlex.quote(str(ROOT))}/app/train.py {settings} --num_epochs 2 --run_dir run"
    finished = launch(train, cwd=tmp_path, timeout_seconds=180)
    assert finished.returncode == 0, finished.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_held_out_samples"] == 10
    assert launch("lockstep verify run", cwd=tmp_path).returncode == 0  # each image once an epoch
    evaluated = launch("lockstep evaluate run", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.output
    assert f"Accuracy: {summary['accuracy']:.4f} on 10 held-out samples" in evaluated.stdout
    assert (tmp_path / "run" / "mistakes.png").is_file()
    assert _workers() <= before


def test_a_broken_image_ends_all_ranks_with_its_name(tmp_path: Path) -> None:
    _make_folder(tmp_path / "images")
    (tmp_path / "images" / "train" / "dogs" / "7.jpg").write_bytes(b"no picture")
    before = _workers()
    settings = f"{FOLDER} --data.num_workers 1 --num_epochs 1 --run_dir run"
    train = f"mpirun -np 2 python {shlex.quote(str(ROOT))}/app/train.py {settings}"
    finished = launch(train, cwd=tmp_path)
    assert finished.returncode == 3, finished.output
    assert "dogs/7.jpg cannot be used" in finished.output
    assert "Traceback" not in finished.output
    psutil.wait_procs([psutil.Process(pid) for pid in _workers() - before if psutil.pid_exists(pid)], timeout=15)
    assert _workers() <= before


@pytest.mark.thorough
def test_a_data_set_and_a_network_of_ones_own(tmp_path: Path) -> None:
    """The example of docs/vision.md."""
    (tmp_path / "my_shapes.py").write_text(block_of(DOC, "python", "# my_shapes.py"))
    for name in ("app", "env"):
        (tmp_path / name).symlink_to(ROOT / name)
    trained = launch(
        f"{block_of(DOC, 'bash', 'env/run mpirun').strip()} --run_dir run", timeout_seconds=120, cwd=tmp_path
    )
    assert trained.returncode == 0, trained.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy"] >= 0.95
    evaluated = launch("lockstep evaluate run", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.output
    assert "standing" in evaluated.stdout
