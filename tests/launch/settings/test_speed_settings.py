"""Settings for speed: the run still learns, and prints its CPUs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import launch

ONE_EPOCH = "app/train.py --num_epochs 1 --checkpoint.interval 0 --optimizer.schedule constant"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        "--precision bf16",
        "--gradient.wire bf16",
        "--gradient.wire fp16 --gradient.bucket_mib 0.05",
        "--gradient.reduction adasum",
        "--gradient.num_micro_batches 3 --model.channels_last false",
    ],
)
def test_a_run_still_learns(settings: str, tmp_path: Path) -> None:
    """0.80 after one epoch over 4,000 digits, where 0.90 is usual and guessing gives 0.10."""
    finished = launch(f"mpirun -np 2 python {ONE_EPOCH} {settings} --run_dir {tmp_path}/run")
    assert finished.returncode == 0, finished.output
    assert json.loads((tmp_path / "run/summary.json").read_text())["accuracy"] > 0.8
    weights = load_file(tmp_path / "run/model.safetensors").values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}


@pytest.mark.thorough
def test_a_bf16_run_scores_the_same_when_loaded_alone(tmp_path: Path) -> None:
    trained = launch(f"python {ONE_EPOCH} --precision bf16 --run_dir {tmp_path}/run")
    evaluated = launch(f"lockstep evaluate {tmp_path}/run")
    line = f"Accuracy: {json.loads((tmp_path / 'run/summary.json').read_text())['accuracy']:.4f}"
    assert line in trained.stdout
    assert line in evaluated.stdout


@pytest.mark.thorough
def test_a_compiled_model_trains_to_the_same_weights_within_rounding(tmp_path: Path) -> None:
    """Twenty updates in float64, without dropout, since compiled models draw other random numbers."""
    quick = "--data.name synthetic --data.num_samples 160 --data.batch_size 16 --num_epochs 2 --evaluate_every 0"
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
def test_every_rank_has_cpus_of_its_own_whatever_the_launcher_did(tmp_path: Path) -> None:
    quick = "--data.name synthetic --data.num_samples 64 --num_epochs 1"
    finished = launch(f"horovodrun -np 2 python app/train.py {quick} --run_dir {tmp_path}/run")
    assert finished.returncode == 0, finished.output
    assert "CPUs by local rank: " in finished.stdout
    assert "warning" not in finished.stdout
    first, second = json.loads((tmp_path / "run/environment.json").read_text())["ranks"]
    assert not set(first["cpus"]) & set(second["cpus"])


@pytest.mark.thorough
def test_ranks_that_share_a_cpu_are_told(tmp_path: Path) -> None:
    quick = "--data.name synthetic --data.num_samples 64 --num_epochs 1"
    finished = launch(f"taskset -c 1 mpirun -np 2 python app/train.py {quick} --run_dir {tmp_path}/run")
    assert finished.returncode == 0, finished.output
    assert "warning: ranks 0 and 1 share CPU 1 of" in finished.stdout


@pytest.mark.thorough
def test_adasum_on_three_ranks_is_refused(tmp_path: Path) -> None:
    finished = launch(f"mpirun -np 3 python {ONE_EPOCH} --gradient.reduction adasum --run_dir {tmp_path}/run")
    assert finished.returncode == 2, finished.output
    assert "adasum on 3 ranks: it needs 1, 2, 4, 8" in finished.stderr
