"""The README's own commands, to the letter."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.launching import ROOT, launch

README = (ROOT / "README.md").read_text()


def _commands() -> list[str]:
    """Every line of the README's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_the_readme_opens_with_the_two_commands() -> None:
    assert _commands()[:2] == ["env/run horovodrun -np 2 python app/train.py", "env/run pytest"]


def test_the_first_command_reaches_its_accuracy_and_evaluate_repeats_it(tmp_path: Path) -> None:
    """At least 0.95 on the 1,000 held-out digits; the runs go to a folder of this test's own."""
    trained = launch(f"{_commands()[0]} --run_dir {tmp_path}/run", timeout_seconds=300)
    assert trained.returncode == 0, trained.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_held_out_samples"] == 1000
    assert summary["accuracy"] >= 0.95
    line = f"Accuracy: {summary['accuracy']:.4f} on 1000 held-out samples"
    assert line in trained.stdout
    (evaluate,) = [command for command in _commands() if "evaluate.py" in command]
    evaluated = launch(evaluate.replace("runs/latest", f"{tmp_path}/run"), timeout_seconds=120)
    assert evaluated.returncode == 0, evaluated.output
    assert line in evaluated.stdout


@pytest.mark.parametrize("command", [c for c in _commands() if "train.py" in c and "sbatch" not in c][1:])
def test_every_other_launch_line_works(command: str, tmp_path: Path) -> None:
    finished = launch(f"{command} --num_epochs 1 --run_dir {tmp_path}/run", timeout_seconds=200)
    assert finished.returncode == 0, finished.output
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_check_build_ticks_what_is_needed() -> None:
    finished = launch("env/run horovodrun --check-build")
    assert finished.returncode == 0, finished.output
    ticked = set(re.findall(r"\[X\] (\w+)", finished.stdout))
    assert {"PyTorch", "MPI", "Gloo"} | ({"NCCL"} if shutil.which("nvcc") else set()) <= ticked


def test_an_activated_shell_needs_no_env_run(tmp_path: Path) -> None:
    """`source env/activate`, in a shell that has not got the environment yet."""
    finished = launch(
        f"source {shlex.quote(str(ROOT))}/env/activate && python -m app.train --print_config", cwd=tmp_path
    )
    assert finished.returncode == 0, finished.output
    assert "num_epochs: " in finished.stdout


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
