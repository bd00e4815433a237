"""Settings for speed: the run still learns; ranks that share a CPU are told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import launch

# 60 updates, after which all held-out images are known; guessing gives 0.10.
SOON = (
    "app/train.py --num_epochs 1 --checkpoint.interval 0 --optimizer.schedule constant --optimizer.learning_rate 0.01 "
    "--data.name synthetic --data.num_samples 960 --data.batch_size 16"
)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        "--precision bf16",
        "--gradient.wire bf16 --model.channels_last false",
        "--gradient.wire fp16 --gradient.bucket_mib 0.05 --gradient.num_micro_batches 3",
        "--gradient.reduction adasum",
    ],
)
def test_a_run_still_learns(settings: str, tmp_path: Path) -> None:
    finished = launch(f"mpirun -np 2 python {SOON} {settings} --run_dir {tmp_path}/run")
    assert finished.returncode == 0, finished.output
    accuracy = json.loads((tmp_path / "run/summary.json").read_text())["accuracy"]
    assert accuracy > 0.9
    weights = load_file(tmp_path / "run/model.safetensors").values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}
    if settings == "--precision bf16":
        evaluated = launch(f"lockstep evaluate {tmp_path}/run")
        assert f"Accuracy: {accuracy:.4f}" in evaluated.stdout, evaluated.output


@pytest.mark.thorough
def test_a_compiled_model_trains_to_the_same_weights_within_rounding(tmp_path: Path) -> None:
    """Ten updates in float64, without dropout, since compiled models draw other random numbers."""
    quick = "--data.name synthetic --data.num_samples 160 --data.batch_size 16 --num_epochs 1 --evaluate_every 0"
    exact = "--precision float64 --model.dropout1 0 --model.dropout2 0 --checkpoint.interval 0"
    for name in ("true", "false"):
        finished = launch(
            f"python app/train.py {quick} {exact} --model.compile {name} --run_dir {tmp_path}/{name}",
            timeout_seconds=300,
        )
        assert finished.returncode == 0, finished.output
    compiled, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("true", "false"))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.thorough
def test_ranks_that_share_a_cpu_are_told(tmp_path: Path) -> None:
    quick = "--data.name synthetic --data.num_samples 64 --num_epochs 1"
    finished = launch(f"taskset -c 1 mpirun -np 2 python app/train.py {quick} --run_dir {tmp_path}/run")
    assert finished.returncode == 0, finished.output
    assert "warning: ranks 0 and 1 share CPU 1 of" in finished.stdout


@pytest.mark.thorough
def test_adasum_on_three_ranks_is_refused(tmp_path: Path) -> None:
    finished = launch(f"mpirun -np 3 python {SOON} --gradient.reduction adasum --run_dir {tmp_path}/run")
    assert finished.returncode == 2, finished.output
    assert "adasum on 3 ranks: it needs 1, 2, 4, 8" in finished.stderr
