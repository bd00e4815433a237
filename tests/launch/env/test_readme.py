"""The README's first command; test_pages.py has the commands of all pages."""

import json
import re
import shlex
import shutil
from pathlib import Path

from tests.launching import ROOT, block_of, launch

TRAIN = block_of(ROOT / "README.md", "bash", "env/run").splitlines()[0].split("  #")[0].strip()


def test_the_first_command_reaches_its_accuracy_and_evaluate_repeats_it(tmp_path: Path) -> None:
    """At least 0.95 on the 1,000 held-out digits; the runs go to a folder of this test's own."""
    trained = launch(f"{TRAIN} --run_dir {tmp_path}/run", timeout_seconds=300)
    assert trained.returncode == 0, trained.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_held_out_samples"] == 1000
    assert summary["accuracy"] >= 0.95
    line = f"Accuracy: {summary['accuracy']:.4f} on 1000 held-out samples"
    assert line in trained.stdout
    evaluated = launch(f"env/run lockstep evaluate {tmp_path}/run")
    assert evaluated.returncode == 0, evaluated.output
    assert line in evaluated.stdout


def test_check_build_ticks_what_is_needed() -> None:
    finished = launch("env/run horovodrun --check-build")
    assert finished.returncode == 0, finished.output
    ticked = set(re.findall(r"\[X\] (\w+)", finished.stdout))
    assert {"PyTorch", "MPI", "Gloo"} | ({"NCCL"} if shutil.which("nvcc") else set()) <= ticked


def test_an_activated_shell_needs_no_env_run(tmp_path: Path) -> None:
    """`source env/activate`, in a new shell without the environment."""
    finished = launch(f"source {shlex.quote(str(ROOT))}/env/activate && lockstep train --print_config", cwd=tmp_path)
    assert finished.returncode == 0, finished.output
    assert "num_epochs: " in finished.stdout
