"""A model in parts, with real launchers: stopped and gone on under other strategies and numbers of ranks, merged."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lockstep.parallel.merge import state_digest
from lockstep.parallel.tensor_slices import Shard
from lockstep.training.checkpoint import commit, list_checkpoints, verify_checkpoint, write_parts
from tests.launching import ROOT, launch

PYTHON_IN = f"python {shlex.quote(str(ROOT / 'app'))}"
TRAIN = f"python {shlex.quote(str(ROOT / 'app' / 'train.py'))}"
EXACT = (
    "--precision float64 --model.dropout1 0 --model.dropout2 0 --optimizer.name adam --optimizer.learning_rate 1e-3 "
    "--optimizer.weight_decay 1e-3 --gradient.clip_norm 1 --gradient.num_micro_batches 3 --checkpoint.interval 10 "
    "--checks.ledger true --data.name synthetic --data.num_samples 500 --data.batch_size 25"  # 20 updates an epoch
)
QUICK = "--data.name synthetic --data.num_samples 480 --data.batch_size 16"  # 30 updates an epoch
STOPS = (  # each goes on where the one before has ended
    "mpirun -np 3 {train} --parallel zero3 --num_epochs 1 --optimizer.schedule constant",
    "horovodrun -np 2 {train} --parallel replicated --num_epochs 2 --resume",
    "mpirun -np 3 {train} --parallel pipeline --num_epochs 3 --resume",
)


@pytest.mark.thorough
def test_zero3_then_replicated_then_a_pipeline_is_one_run_and_merges_offline(tmp_path: Path) -> None:
    """3 ranks, 2 ranks, 3 ranks; equal within rounding to a run on one rank that never stopped, and as accurate."""
    for index, stop in enumerate(STOPS):
        command = f"{stop.format(train=TRAIN)} {'' if '--resume' in stop else EXACT} --run_dir run"
        finished = launch(command, timeout_seconds=200, cwd=tmp_path)
        assert finished.returncode == 0, finished.output
        assert index == 0 or f"Goes on after update {20 * index}" in finished.stdout
    never = launch(
        f"{TRAIN} {EXACT} --optimizer.schedule constant --num_epochs 3 --run_dir never",
        timeout_seconds=200,
        cwd=tmp_path,
    )
    assert never.returncode == 0, never.output
    states = [verify_checkpoint(list_checkpoints(tmp_path / run)[-1]).load() for run in ("run", "never")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-9, atol=1e-11, msg=name)
    verified = launch(f"{PYTHON_IN}/verify.py run", cwd=tmp_path)
    assert verified.returncode == 0, verified.output
    assert verified.stdout.count("500 of 500 samples, each exactly once") == 3

    in_run = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model.safetensors").unlink()
    merged = launch(f"{PYTHON_IN}/merge.py run", cwd=tmp_path)
    assert merged.returncode == 0, merged.output
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == in_run
    told = [json.loads((tmp_path / run / "summary.json").read_text())["accuracy"] for run in ("run", "never")]
    assert told[0] == told[1]


@pytest.mark.thorough
def test_zero3_is_killed_and_goes_on_bit_for_bit() -> None:
    certified = launch(
        f"lockstep verify --resume --ranks 2,2 -- --parallel zero3 {QUICK}", timeout_seconds=250, cwd=ROOT
    )
    assert certified.returncode == 0, certified.output
    assert "CERTIFIED: identical" in certified.stdout


def test_what_does_not_go_together_is_told_once(tmp_path: Path) -> None:
    finished = launch(f"mpirun -np 2 {TRAIN} --parallel pipeline --pipeline.num_stages 3", cwd=tmp_path)
    assert finished.returncode == 2, finished.output
    assert finished.output.count("stages x replicas must be the number of ranks") == 1
    assert "Traceback" not in finished.output


def test_a_merge_needs_memory_for_its_largest_tensor_only(tmp_path: Path) -> None:
    """400 MB of model in two parts a tensor, and as much of optimizer: the peak is below one copy of the model."""
    (tmp_path / "checkpoints").mkdir()
    tensors = {f"layer{index}": torch.randn(2_500_000) for index in range(40)}
    written = []
    for rank in range(2):
        half = slice(rank * 1_250_000, (rank + 1) * 1_250_000)
        parts = {
            f"{kind}/{name}": Shard(tensor[half], half.start, tensor.shape)
            for name, tensor in tensors.items()
            for kind in ("model", "optimizer/momentum_buffer")
        }
        written.append(write_parts(tmp_path / "checkpoints", 5, parts, rank))
    commit(tmp_path / "checkpoints", 5, written, {}, keep=1)
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import lockstep.commands.merge as merge; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; merge.main(); "
        "print('grew', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path), "--step", "5", "--out", str(tmp_path / "one")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    grown_kib = int(finished.stdout.split("grew ")[1])
    assert grown_kib < 120_000, grown_kib
    merged = safetensors.torch.load_file(tmp_path / "one")
    assert state_digest(merged) == state_digest(tensors)
    assert state_digest(tensors) in finished.stdout


@pytest.mark.thorough
def test_the_sharding_benchmark_proves_and_counts(tmp_path: Path) -> None:
    finished = launch(
        f"mpirun -np 2 lockstep benchmark sharding --updates 3 --model.vit.width 64 --out {tmp_path}",
        timeout_seconds=200,
    )
    assert finished.returncode == 0, finished.output
    result = json.loads((tmp_path / "sharding.json").read_text())["strategies"]
    for how in ("zero1", "zero2", "zero3"):
        assert result[how]["largest_loss_difference"] < 1e-10
        assert result[how]["largest_weight_difference"] < 1e-10
        assert result[how]["held_bytes"] == pytest.approx(result[how]["held_formula"], rel=0.01)
        # The kernel counts TCP's headers and Horovod's own messages, too: some 10 kB an update beside 1.6 MB and more.
        assert result[how]["sent_bytes"] == pytest.approx(result[how]["sent_formula"], rel=0.05)
    assert (tmp_path / "sharding.png").is_file()


@pytest.mark.thorough
def test_the_pipeline_benchmark_tells_its_ideal(tmp_path: Path) -> None:
    settings = "--rounds 2 --updates 2 --model.name vit --gradient.num_micro_batches 4 --data.name synthetic"
    finished = launch(f"mpirun -np 2 lockstep benchmark pipeline {settings} --out {tmp_path}")
    assert finished.returncode == 0, finished.output
    result = json.loads((tmp_path / "pipeline.json").read_text())
    assert (result["num_stages"], result["bubble"]) == (2, 1 / 5)
    assert all(rate > 0 for rates in result["updates_per_second"].values() for rate in rates)
