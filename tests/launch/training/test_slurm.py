"""The scripts in slurm/ on a real Slurm of two nodes: they train, stop in time, go on, and never do so without end."""

import hashlib
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import psutil
import pytest

from lockstep.training.checkpoint import list_checkpoints
from tests.launching import ROOT
from tests.slurm_cluster import Job, SlurmCluster

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
FOUR_RANKS = "--nodes=2 --ntasks-per-node=2"
QUICK = "--data.name synthetic --data.num_samples 64 --data.batch_size 16 --num_epochs 1"
SMALL = "--data.name synthetic --data.num_samples 480 --data.batch_size 16 --optimizer.learning_rate 0.001"
SIXTY = f"{SMALL} --num_epochs 2 --checkpoint.interval 20"  # updates
ENDLESS = f"{SMALL} --num_epochs 100000 --evaluate_every 0"
PMIX = "srun --mpi=pmix"  # where the choice is not what is tested: saves the trial
NOT_AGAIN, AGAIN = "not put back into the queue", "back in the queue"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The clone as another user might have it, with a blank in its path; what jobs write stays in there."""
    return make_clone(tmp_path)


def make_clone(folder: Path) -> Path:
    clone = folder / "a clone"
    clone.mkdir()
    for name in ("app", "env", "slurm", ".venv"):
        (clone / name).symlink_to(ROOT / name)
    return clone


@pytest.fixture(scope="module")
def job_in_its_last_minute(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job of one minute that would need days, and that no signal reaches. It runs beside the other tests."""
    clone = make_clone(tmp_path_factory.mktemp("last-minute"))
    return slurm.submit(f"--time=1 --signal=B:CONT@1 --no-requeue slurm/train.sbatch {ENDLESS}", clone)


@pytest.fixture(scope="module")
def never_stopped(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job on two nodes that trained from its beginning to its end."""
    job = slurm.submit(f"{FOUR_RANKS} slurm/train.sbatch {SIXTY}", make_clone(tmp_path_factory.mktemp("never-stopped")))
    assert job.wait() == 0, job.output
    return job


def run_of(job: Job) -> Path:
    return job.cwd / "runs" / f"train-{job.id}"


def ranks_of(job: Job) -> list[psutil.Process]:
    """The processes that train in the job's own folder."""
    mine = []
    for process in psutil.Process(job.cluster.pid).children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if command[1:5] == ["-P", "-m", "lockstep", "train"] and f"runs/train-{job.id}" in command:
            mine.append(process)
    return mine


def has_checkpoint(job: Job) -> bool:
    return bool(list_checkpoints(run_of(job)))


def complaints(job: Job) -> list[str]:
    return [line for line in job.output.splitlines() if "lockstep: " in line]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_job_on_two_nodes_trains_and_another_evaluates(
    slurm: SlurmCluster, never_stopped: Job, tmp_path: Path
) -> None:
    """The second is submitted from elsewhere."""
    assert "slurm: 4 rank(s) on 2 node(s), started by srun --mpi=pmix (Open MPI" in never_stopped.output
    run = run_of(never_stopped)
    environment = json.loads((run / "environment.json").read_text())
    assert [rank["node"] for rank in environment["ranks"]] == ["n1", "n1", "n2", "n2"]
    evaluate = slurm.submit(f"'{never_stopped.cwd}/slurm/evaluate.sbatch' '{run}'", tmp_path)
    assert evaluate.wait() == 0, evaluate.output
    (accuracy,) = re.findall(r"^Accuracy: .*", evaluate.output, re.MULTILINE)
    assert accuracy in never_stopped.output


@pytest.mark.thorough
def test_where_srun_cannot_start_mpi_mpirun_does(slurm: SlurmCluster, clone: Path) -> None:
    """A plugin that Slurm lists and that fails; a setting with a blank in it passes through."""
    (plugin,) = Path("/usr/lib").glob("*/slurm*/mpi_pmix.so")
    in_slurmd = "nsenter --mount --target $(cat /run/slurmd.n1.pid)"
    hidden = slurm.run(f"{in_slurmd} mount --bind /dev/null {plugin}", clone)
    assert hidden.returncode == 0, hidden.output
    try:
        job = slurm.submit(f"{FOUR_RANKS} slurm/train.sbatch {QUICK} --run_dir 'my run'", clone)
        assert job.wait() == 0, job.output
    finally:
        slurm.run(f"{in_slurmd} umount {plugin}", clone)
    assert "started by mpirun -np 4 (Open MPI" in job.output
    assert "; not by srun --mpi=pmix: " in job.output
    assert "; not by srun --mpi=pmi2: the ranks do not find each other (" in job.output
    assert json.loads((clone / "my run" / "summary.json").read_text())["num_ranks"] == 4


@pytest.mark.thorough
def test_a_stopped_job_goes_on_and_ends_with_the_model_of_one_that_never_stopped(
    slurm: SlurmCluster, never_stopped: Job, clone: Path
) -> None:
    job = slurm.submit(f"{FOUR_RANKS} slurm/train.sbatch {SIXTY}", clone, LOCKSTEP_LAUNCHER=PMIX)
    job.wait_until(partial(has_checkpoint, job))
    slurm.run(f"scancel --signal=USR1 --batch {job.id}", clone)
    job.wait_until(lambda: AGAIN in job.output)
    assert "ended with exit code 75 " in job.output
    (stopped_after,) = re.findall(r"stopped by SIGUSR1 after update (\d+) of 60", job.output)
    assert job.wait() == 0, job.output
    assert f"Goes on after update {stopped_after} from runs/train-{job.id}/checkpoints/" in job.output
    assert job.output.count(AGAIN) == 1
    models = [run_of(each) / "model.safetensors" for each in (job, never_stopped)]
    assert sha256(models[0]) == sha256(models[1])


@pytest.mark.thorough
@pytest.mark.usefixtures("job_in_its_last_minute")
def test_a_lost_rank_is_worth_another_attempt_only_after_progress(slurm: SlurmCluster, clone: Path) -> None:
    """And a job that was cancelled is not worth any."""
    lost, lost_later, cancelled = (
        slurm.submit(f"--ntasks=2 slurm/train.sbatch {settings}", clone, LOCKSTEP_LAUNCHER=PMIX)
        for settings in (
            f"{ENDLESS} --checkpoint.interval 0",
            f"{ENDLESS} --checkpoint.interval 10",
            f"{ENDLESS} --checkpoint.interval 10",
        )
    )
    lost.wait_until(lambda: "Epoch: 0, Batch: 0" in lost.output)
    ranks_of(lost)[1].kill()
    for job in (lost_later, cancelled):
        job.wait_until(partial(has_checkpoint, job))
    cancelled.cancel()
    ranks_of(lost_later)[1].kill()
    assert lost.wait() == 137, lost.output
    assert f"{NOT_AGAIN}: no checkpoint is newer than none" in lost.output
    lost_later.wait_until(lambda: AGAIN in lost_later.output)
    assert "ended with exit code 137 " in lost_later.output
    lost_later.cancel()
    assert cancelled.states() == {"CANCELLED"}
    assert AGAIN not in cancelled.output


@pytest.mark.thorough
def test_a_mistake_is_told_once_with_its_exit_code_and_not_repeated(slurm: SlurmCluster, clone: Path) -> None:
    jobs = {
        launcher: slurm.submit(f"{FOUR_RANKS} slurm/train.sbatch --nonsense", clone, LOCKSTEP_LAUNCHER=launcher)
        for launcher in (PMIX, "mpirun")
    }
    for launcher, job in jobs.items():
        assert job.wait() == 2, job.output
        assert f"started by {launcher}, as LOCKSTEP_LAUNCHER says" in job.output
        (complaint,) = complaints(job)
        assert "unrecognized arguments: --nonsense" in complaint
        assert f"ended with exit code 2 (docs/exit-codes.md); {NOT_AGAIN}" in job.output


@pytest.mark.thorough
def test_a_sweep_ends_with_one_table(slurm: SlurmCluster, clone: Path) -> None:
    """One of its runs fails, and one row too many is asked for."""
    rows = ("--optimizer.learning_rate 0.02 --data.root 'a folder'", "--optimizer.learning_rate -1", "--seed 7")
    (clone / "rows.txt").write_text("# what is tried\n\n" + "\n".join(rows) + "\n")
    job = slurm.submit(f"--array=1-4 slurm/sweep.sbatch rows.txt {QUICK} --seed 3", clone, LOCKSTEP_LAUNCHER=PMIX)
    assert job.wait() == 2, job.output
    assert "slurm: rows.txt has 3 rows: submit it with --array=1-3" in job.output
    sweep = clone / "runs" / f"sweep-{job.id}"
    runs = json.loads((sweep / "table.json").read_text())["runs"]
    assert [(run["name"], run["state"]) for run in runs] == [("1", "done"), ("2", "SETTINGS (2)"), ("3", "done")]
    assert runs[0]["settings"] == {"seed": 3, "data.root": "a folder", "optimizer.learning_rate": 0.02}
    assert runs[1]["asked"] == "--optimizer.learning_rate -1"
    assert runs[2]["settings"]["seed"] == 7
    summary = json.loads((sweep / "3" / "summary.json").read_text())
    assert runs[2]["results"]["model_digest"] == summary["model_digest"]
    table = (sweep / "table.txt").read_text()
    assert any(table in file.read_text() for file in clone.glob(f"sweep-{job.id}_*.out"))
    assert re.search(r"^│ 3 .* done .* 7 +│", table, re.MULTILINE)
    two_runs = slurm.run(f"source env/activate; lockstep report --table runs/{sweep.name}/1 runs/{sweep.name}/3", clone)
    assert two_runs.returncode == 0, two_runs.output
    assert " optimizer.learning_rate ┃" in two_runs.stdout


@pytest.mark.thorough
def test_doctor_and_benchmark_start_as_training_does(slurm: SlurmCluster, clone: Path) -> None:
    doctor = slurm.submit(f"{FOUR_RANKS} slurm/doctor.sbatch", clone)
    assert doctor.wait() in (0, 8), doctor.output  # nodes that share two cores may well be found unhealthy
    assert "4 ranks on 2 nodes, started by srun --mpi=pmix" in doctor.output
    benchmark = slurm.submit(
        "--ntasks=2 slurm/benchmark.sbatch throughput --updates 5 --rounds 1 --limit false --json true", clone
    )
    assert benchmark.wait() == 0, benchmark.output
    assert '"num_ranks": 2' in benchmark.output


@pytest.mark.thorough
def test_gpus_that_no_task_will_use_are_told(slurm: SlurmCluster, clone: Path) -> None:
    job = slurm.submit("--gpus-per-node=2 --cpus-per-task=2 slurm/train.sbatch --print_config", clone)
    assert job.wait() == 0, job.output
    assert "warning: 2 GPUs on this node and 1 task(s)" in job.output
    assert job.output.count("\nnum_epochs: ") == 1  # ppo has one, too


def test_a_script_that_cannot_find_the_clone_says_so(slurm: SlurmCluster, tmp_path: Path) -> None:
    shutil.copy(ROOT / "slurm" / "train.sbatch", tmp_path)
    job = slurm.submit("train.sbatch", tmp_path)
    assert job.wait() == 2, job.output
    assert job.output == f"slurm: Lockstep is not in {tmp_path}: submit from its clone\n"


@pytest.mark.thorough
def test_the_end_of_the_time_stops_a_job_that_no_signal_reaches(job_in_its_last_minute: Job) -> None:
    job = job_in_its_last_minute
    assert job.wait() == 75, job.output
    assert job.states() == {"FAILED"}  # and not TIMEOUT
    assert "stopped by the end of the job's time after update " in job.output
    assert "a signal came" not in job.output
    assert f"Slurm does not take it back. To go on: sbatch ... --run_dir runs/train-{job.id}" in job.output


# -- without a Slurm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_nobodys_own(script: Path) -> None:
    text = script.read_text()
    options = [line.removeprefix("#SBATCH --").partition("=")[0] for line in text.splitlines() if "#SBATCH" in line]
    assert set(options) <= {"job-name", "output", "open-mode", "requeue", "signal"}
    assert re.search(r'"\$@"', text)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_that_is_not_submitted_says_how(script: Path) -> None:
    done = subprocess.run(["bash", script], cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 2
    assert done.stderr == f"slurm: this is not a Slurm job: sbatch slurm/{script.name}\n"
