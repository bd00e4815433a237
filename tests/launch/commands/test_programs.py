"""The programs under every launcher: the same words, the same exit codes, no hang, nothing left behind."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launching import ROOT, Finished, launch

LAUNCHERS = {
    "python": "python",
    "mpirun": "mpirun -np 2 python",
    "horovodrun": "horovodrun -np 2 python",
}
TRAIN = ROOT / "app" / "train.py"
QUICK = "--data.name synthetic --data.num_samples 64 --data.batch_size 16 --num_epochs 1"


def _train(launcher: str, arguments: str, cwd: Path, **environment: str) -> Finished:
    return launch(f"{launcher} {shlex.quote(str(TRAIN))} {arguments}", cwd=cwd, environment=environment)


def _complaints(finished: Finished) -> list[str]:
    return [line for line in finished.output.splitlines() if "lockstep: " in line]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_leaves_a_whole_folder(launcher: str, tmp_path: Path) -> None:
    """And every rank has CPUs of its own, whatever the launcher did."""
    finished = _train(LAUNCHERS[launcher], f"{QUICK} --run_dir run", tmp_path)
    assert finished.returncode == 0, finished.output
    assert _complaints(finished) == []
    names = {re.sub(r"tfevents\..*", "tfevents", path.name) for path in (tmp_path / "run").iterdir()}
    kept = {
        ".lock",
        "settings.yaml",
        "settings.history.jsonl",
        "environment.json",
        "metrics.jsonl",
        "events.out.tfevents",
        "checkpoints",
        "recorder",
    }
    assert names == kept | {"curves.png", "model.safetensors", "summary.json", "evaluation.json"}
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    num_ranks = 1 if launcher == "python" else 2
    assert [rank["rank"] for rank in environment["ranks"]] == list(range(num_ranks))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_ranks"] == num_ranks
    assert finished.stdout.count("Epoch: 0, Batch: 0, Loss: ") == 1
    if num_ranks == 2 and len(os.sched_getaffinity(0)) >= 2:
        assert "CPUs by local rank: " in finished.stdout
        assert "warning" not in finished.stdout
        first, second = environment["ranks"]
        assert not set(first["cpus"]) & set(second["cpus"])


@pytest.mark.parametrize(
    ("launcher", "arguments", "code", "message"),
    [
        *((launcher, "--nonsense 1", 2, "unrecognized arguments: --nonsense 1") for launcher in LAUNCHERS),
        pytest.param("mpirun", "--run_dir /dev/null/run", 5, "must be yours to write", marks=pytest.mark.thorough),
        pytest.param(
            *("horovodrun", "--data.name mnist --data.root nowhere", 3, "--data.name digits"),
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_mistake_is_told_once_with_its_exit_code(
    launcher: str, arguments: str, code: int, message: str, tmp_path: Path
) -> None:
    finished = _train(LAUNCHERS[launcher], arguments, tmp_path)
    assert finished.returncode == code, finished.output
    (complaint,) = _complaints(finished)
    assert message in complaint
    assert "Traceback" not in finished.output


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("launcher", "option", "told"),
    [("mpirun", "--print_config", "warmup_steps: "), ("horovodrun", "--help", "usage: ")],
)
def test_help_and_print_config_are_said_once(launcher: str, option: str, told: str, tmp_path: Path) -> None:
    finished = _train(LAUNCHERS[launcher], option, tmp_path)
    assert finished.returncode == 0, finished.output
    assert finished.stdout.count(told) == 1


def test_the_merged_model_scores_the_same_when_loaded_alone(tmp_path: Path) -> None:
    finished = _train("mpirun -np 2 python", f"{QUICK} --num_epochs 3 --run_dir run", tmp_path)
    (trained,) = re.findall(r"Accuracy: (.*) on 64 held-out", finished.stdout)
    for evaluate in ("lockstep", "mpirun -np 3 lockstep"):
        evaluated = launch(f"{evaluate} evaluate run", cwd=tmp_path)
        assert evaluated.returncode == 0, evaluated.output
        assert re.findall(r"Accuracy: (.*) on 64 held-out", evaluated.stdout) == [trained]
        assert evaluated.stdout.count("Confusion matrix") == 1
        assert (tmp_path / "run" / "mistakes.png").stat().st_size > 0


@pytest.mark.thorough
def test_evaluate_says_what_is_missing(tmp_path: Path) -> None:
    finished = launch(f"mpirun -np 2 lockstep evaluate {shlex.quote(str(tmp_path))}", cwd=tmp_path)
    assert finished.returncode == 5
    assert len(_complaints(finished)) == 1
    finished = launch("mpirun -np 2 lockstep evaluate", cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.count("the following arguments are required") == 1


@pytest.mark.parametrize(
    "failing", ["rank == 1", pytest.param("True", marks=pytest.mark.thorough)], ids=["one rank", "every rank"]
)
def test_an_unexpected_error_is_told_once_and_ends_all_ranks(failing: str, tmp_path: Path) -> None:
    """The other ranks wait in a collective that rank 1 never enters, or fail in the same moment."""
    program = tmp_path / "fails.py"
    program.write_text(
        "import torch\n"
        "from lockstep.comm.program import run_program\n"
        "def main(cluster):\n"
        "    rank = cluster.rank\n"
        f"    if {failing}:\n"
        "        raise RuntimeError('out of luck')\n"
        "    cluster.sum_(torch.ones(1), name='never')\n"
        "run_program(main)\n"
    )
    finished = launch(f"mpirun -np 4 python {shlex.quote(str(program))}", timeout_seconds=60, cwd=tmp_path)
    assert finished.returncode == 9, finished.output
    assert finished.stderr.count("an error in your own code: RuntimeError: out of luck") == 1
    assert f"{program}, line 6: raise RuntimeError('out of luck')" in finished.stderr
    rank = 1 if failing != "True" else 0
    assert f"lockstep: rank {rank}:" in finished.stderr


def test_three_ranks_end_with_the_weights_of_one(tmp_path: Path) -> None:
    """Promise 1 through the program itself: a global batch that 3 does not divide, float64, dropout off."""
    exact = f"{QUICK} --data.batch_size 20 --precision float64 --model.dropout1 0 --model.dropout2 0 --log_interval 1"
    losses, states = {}, {}
    for name, launcher in {"one": "python", "three": "mpirun -np 3 python"}.items():
        finished = _train(launcher, f"{exact} --run_dir {name}", tmp_path)
        assert finished.returncode == 0, finished.output
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [record["loss"] for record in records]
        states[name] = load_file(tmp_path / name / "model.safetensors")
    assert len(losses["one"]) == 5
    assert losses["three"] == pytest.approx(losses["one"], rel=1e-10)
    for name, tensor in states["one"].items():
        assert (states["three"][name] - tensor).abs().max() <= 1e-10


def test_the_reference_run_prints_the_references_lines(tmp_path: Path) -> None:
    finished = _train("mpirun -np 2 python", "--config reference", tmp_path)
    assert finished.returncode == 0, finished.output
    lines = [line for line in finished.stdout.splitlines() if line.startswith("Epoch")]
    assert len(lines) == 2  # 125 batches of 32: batch 0 and batch 100
    pace = r", \d+ images/s, 0:00:\d\d left"
    for line, batch, after in zip(lines, (0, 100), ("", pace), strict=True):
        assert re.fullmatch(rf"Epoch: 0, Batch: {batch}, Loss: \d\.\d{{4}}{after}", line)
    summary = json.loads((tmp_path / "runs" / "latest" / "summary.json").read_text())
    assert summary["num_parameters"] == 1_199_882
    assert summary["num_updates"] == 125


@pytest.mark.thorough
def test_settings_come_from_the_environment_of_rank_0(tmp_path: Path) -> None:
    finished = _train("mpirun -np 2 python", f"{QUICK} --run_dir run", tmp_path, LOCKSTEP_SEED="41")
    assert finished.returncode == 0, finished.output
    assert "seed: 41" in (tmp_path / "run" / "settings.yaml").read_text()


@pytest.mark.thorough
def test_a_rank_that_fails_before_the_ranks_met_ends_all(tmp_path: Path) -> None:
    """Rank 1 cannot import a module, as on a node with a broken installation, while rank 0 waits for it."""
    program = tmp_path / "fails.py"
    program.write_text(
        "from lockstep.comm.mpi_library import rank_in_job\n"
        "if rank_in_job() == 1:\n"
        "    import a_module_that_this_node_lacks\n"
        "from lockstep.comm.program import run_program\n"
        "run_program(lambda cluster: None)\n"
    )
    finished = launch(f"mpirun -np 2 python {shlex.quote(str(program))}", timeout_seconds=60, cwd=tmp_path)
    assert finished.returncode == 1, finished.output
    assert finished.stderr.count("ModuleNotFoundError") == 1


@pytest.mark.thorough
def test_threads_that_one_rank_has_set_do_not_hold_up_the_others(tmp_path: Path) -> None:
    program = tmp_path / "meets.py"
    program.write_text("from lockstep.comm.program import run_program\nrun_program(lambda cluster: None)\n")
    python = f"python {shlex.quote(str(program))}"
    command = f"mpirun -np 1 env OMP_NUM_THREADS=1 {python} : -np 1 {python}"
    assert launch(command, timeout_seconds=60, cwd=tmp_path).returncode == 0


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to classify."""
    folder = tmp_path_factory.mktemp("classifier")
    finished = _train("python", f"{QUICK} --run_dir run", folder)
    assert finished.returncode == 0, finished.output
    return folder / "run"


@pytest.mark.thorough
def test_a_picture_that_cannot_be_written_does_not_cost_the_accuracy(classifier: Path) -> None:
    (classifier / "mistakes.png").unlink(missing_ok=True)
    (classifier / "mistakes.png").mkdir()
    evaluated = launch(["lockstep", "evaluate", str(classifier)])
    assert evaluated.returncode == 5
    assert "Accuracy: " in evaluated.stdout


@pytest.mark.thorough
def test_a_run_of_one_task_is_not_evaluated_as_another(classifier: Path) -> None:
    finished = launch(["lockstep", "evaluate", str(classifier), "--episodes", "3"])
    assert finished.returncode == 2
    assert "has learned classify" in finished.output


@pytest.mark.thorough
def test_a_full_disk_is_told_once(tmp_path: Path) -> None:
    """A limit on the size of files fails in write(2), as a full disk or a used-up quota does."""
    command = f"ulimit -f 4; python {shlex.quote(str(TRAIN))} {QUICK} --log_interval 1 --num_epochs 40 --run_dir run"
    finished = launch(command, cwd=tmp_path, environment={"COVERAGE_PROCESS_CONFIG": ""})  # whose file is larger
    assert finished.returncode == 5, finished.output
    assert len(_complaints(finished)) == 1
    assert "Traceback" not in finished.output


@pytest.mark.thorough
def test_a_loss_that_is_not_finite_ends_all_ranks_with_its_code(tmp_path: Path) -> None:
    finished = _train("mpirun -np 2 python", f"{QUICK} --optimizer.learning_rate 1e30 --num_epochs 9", tmp_path)
    assert finished.returncode == 6, finished.output
    (complaint,) = _complaints(finished)
    assert re.search(r"update \d+: the (loss|gradient of .*) on rank \d is infinite or not a number", complaint)
