"""Runs that are really killed, and go on: with the README's commands, through kills and other numbers of ranks."""

import hashlib
import json
import shlex
from pathlib import Path

import pytest

from lockstep.training.checkpoint import list_checkpoints
from tests.launching import ROOT, kill_after_a_checkpoint, launch

TRAIN = ROOT / "app" / "train.py"
LAUNCH = f"horovodrun -np 2 python {shlex.quote(str(TRAIN))}"
SHORT = "--num_epochs 2 --checkpoint.interval 20"
QUICK = "--data.name synthetic --data.num_samples 480 --data.batch_size 16 --optimizer.learning_rate 0.001"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_killed_run_ends_with_the_model_of_one_that_was_not(tmp_path: Path) -> None:
    short = f"{QUICK} --num_epochs 4 --checkpoint.interval 20"  # 120 updates
    never = launch(f"{LAUNCH} {short} --run_dir never", cwd=tmp_path)
    assert never.returncode == 0, never.output
    kill_after_a_checkpoint(f"{LAUNCH} {short} --run_dir stopped", tmp_path / "stopped", tmp_path)
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    checkpoint = list_checkpoints(tmp_path / "stopped")[-1]
    resumed = launch(f"{LAUNCH} --resume --run_dir stopped", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.output
    assert f"Goes on after update {int(checkpoint.name)}" in resumed.stdout
    assert _sha256(tmp_path / "stopped" / "model.safetensors") == _sha256(tmp_path / "never" / "model.safetensors")
    metrics = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("stopped", "never")]
    assert metrics[0] == metrics[1]


@pytest.mark.thorough
def test_an_early_stop_and_the_best_model_are_the_same_over_a_kill(tmp_path: Path) -> None:
    """The accuracy soon reaches 1: the first update with it is the best."""
    judged = "--checkpoint.best accuracy:max:2 --stop.early accuracy:max:2 --optimizer.learning_rate 0.004"
    judged = f"{QUICK} --num_epochs 20 --checkpoint.interval 20 {judged}"
    never = launch(f"{LAUNCH} {judged} --run_dir never", cwd=tmp_path)
    assert never.returncode == 0, never.output
    kill_after_a_checkpoint(f"{LAUNCH} {judged} --run_dir stopped", tmp_path / "stopped", tmp_path)
    resumed = launch(f"{LAUNCH} --resume --run_dir stopped", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.output
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("stopped", "never")]
    for name in ("stopped_early", "best", "accuracy", "loss", "num_updates", "model_digest"):
        assert summaries[0][name] == summaries[1][name], name
    best, num_updates = summaries[0]["best"], summaries[0]["num_updates"]
    assert best["update"] < num_updates < 20 * 30
    assert best["accuracy"] == summaries[0]["accuracy"]
    assert f"after update {best['update']}, accuracy {best['accuracy']}" in resumed.stdout
    assert _sha256(tmp_path / "stopped" / "model.safetensors") == _sha256(tmp_path / "never" / "model.safetensors")
    checkpoints = [[path.name for path in list_checkpoints(tmp_path / run)] for run in ("stopped", "never")]
    assert checkpoints[0] == checkpoints[1]
    merge = launch(f"lockstep merge stopped --step {best['update']} --out best.safetensors", cwd=tmp_path)
    assert merge.returncode == 0, merge.output
    assert summaries[0]["model_digest"] in merge.stdout
    again = launch("lockstep merge stopped", cwd=tmp_path)  # the best, too, in place of the last
    assert summaries[0]["model_digest"] in again.stdout, again.output


KILLER = """
import os
import signal
from lockstep import TrainerHook

class Kill(TrainerHook):
    def before_update(self, trainer, item):
        if trainer.progress.step == int(os.environ.get("KILL_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.thorough
def test_an_agents_best_checkpoint_is_the_same_over_a_kill(tmp_path: Path) -> None:
    """The environments are reset after each checkpoint: best ones, too, are taken at the same updates."""
    (tmp_path / "killer.py").write_text(KILLER)
    train = f"mpirun -np 2 python {shlex.quote(str(TRAIN))} --hooks killer.Kill"
    judged = "--ppo.total_steps 12000 --evaluate_every 2 --checkpoint.interval 3 --checkpoint.best return:max:2"
    judged = f"--config cartpole {judged} --env.num_evaluation_episodes 6"
    assert launch(f"{train} {judged} --run_dir never", cwd=tmp_path).returncode == 0
    assert launch(f"env KILL_AT=5 {train} {judged} --run_dir stopped", cwd=tmp_path).returncode != 0
    resumed = launch(f"{train} --resume --run_dir stopped", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.output
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("stopped", "never")]
    assert summaries[0]["best"] == summaries[1]["best"]
    for file in ("model.safetensors", "metrics.jsonl"):
        assert _sha256(tmp_path / "stopped" / file) == _sha256(tmp_path / "never" / file)


@pytest.mark.thorough
def test_a_checkpoint_with_a_flipped_byte_is_skipped_for_the_one_before(tmp_path: Path) -> None:
    quick = "--data.name synthetic --data.num_samples 64 --data.batch_size 16 --checkpoint.interval 2"
    train = f"mpirun -np 2 python {shlex.quote(str(TRAIN))} --run_dir run"
    assert launch(f"{train} {quick} --num_epochs 2", cwd=tmp_path).returncode == 0
    model = _sha256(tmp_path / "run" / "model.safetensors")
    last = list_checkpoints(tmp_path / "run")[-1] / "rank00000-00000.safetensors"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    (tmp_path / "run" / "summary.json").unlink()  # killed before it was through
    verify = f"python {shlex.quote(str(ROOT / 'app' / 'verify.py'))} run"
    verified = launch(verify, cwd=tmp_path)
    assert verified.returncode == 5
    assert "rank00000-00000.safetensors was altered" in verified.stdout
    resumed = launch(f"{train} --resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.output
    assert "skipped: " in resumed.stdout
    assert "Goes on after update 6" in resumed.stdout
    assert _sha256(tmp_path / "run" / "model.safetensors") == model
    verified = launch(verify, cwd=tmp_path)
    assert verified.returncode == 0, verified.output


def test_a_run_that_never_began_begins(tmp_path: Path) -> None:
    """What a job script says each time it is started: go on, if there is something to go on from."""
    (tmp_path / "run").mkdir()
    finished = launch(
        f"python {shlex.quote(str(TRAIN))} --resume --run_dir run --data.name synthetic --data.num_samples 32",
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.output
    assert "no checkpoint yet: the run begins at update 0" in finished.stdout


def test_a_run_that_is_not_there_is_not_resumed(tmp_path: Path) -> None:
    for where in ("--run_dir run", ""):
        finished = launch(f"python {shlex.quote(str(TRAIN))} --resume {where}", cwd=tmp_path)
        assert finished.returncode == 2, finished.output
        assert "there is no such folder" in finished.stderr
        assert list(tmp_path.iterdir()) == []


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.thorough
def test_a_finished_run_changes_only_to_go_on_for_longer(tmp_path: Path) -> None:
    train = f"python {shlex.quote(str(TRAIN))} --run_dir run"
    quick = "--data.name synthetic --data.num_samples 64 --data.batch_size 16 --checkpoint.interval 2"
    assert launch(f"{train} {quick} --num_epochs 1 --checks.ledger true", cwd=tmp_path).returncode == 0
    run = tmp_path / "run"
    before = _contents(run)
    refused = launch(f"{train} --resume --optimizer.learning_rate 0.3", cwd=tmp_path)
    assert refused.returncode == 2, refused.output
    assert "run is finished, and optimizer.learning_rate is 0.3 and was 0.05" in refused.stderr
    refused = launch(f"{train} --resume --num_epochs 2 --seed 7", cwd=tmp_path)
    assert refused.returncode == 2, refused.output
    assert "seed is 7 and was 0: a run that goes on cannot change it" in refused.stderr
    assert _contents(run) == before
    over = launch(f"mpirun -np 2 {train} --resume", cwd=tmp_path)
    assert over.returncode == 0, over.output
    assert "is finished: nothing is left to do" in over.stdout
    assert _contents(run) == before
    longer = launch(f"mpirun -np 2 {train} --resume --num_epochs 2 --optimizer.learning_rate 0.01", cwd=tmp_path)
    assert longer.returncode == 0, longer.output
    first, second = (json.loads(line) for line in (run / "settings.history.jsonl").read_text().splitlines())
    assert (first["update"], first["num_ranks"], first["changed"]) == (0, 1, {})
    assert (second["update"], second["num_ranks"]) == (4, 2)
    assert second["changed"] == {"num_epochs": [1, 2], "optimizer.learning_rate": [0.05, 0.01]}
    verify = f"python {shlex.quote(str(ROOT / 'app' / 'verify.py'))} run"
    assert launch(verify, cwd=tmp_path).returncode == 0
    for file in run.glob("ledger/*"):
        file.write_bytes(file.read_bytes()[:8])
    cut = launch(verify, cwd=tmp_path)
    assert cut.returncode == 5, cut.output
    assert "ledger: INCOMPLETE: updates 1 ... 4 are missing" in cut.stdout
    for file in run.glob("ledger/*"):
        file.unlink()
    gone = launch(verify, cwd=tmp_path)
    assert gone.returncode == 5, gone.output
    assert "ledger: MISSING" in gone.stdout


def test_a_certificate_without_a_kill_is_refused() -> None:
    finished = launch("lockstep verify --resume --ranks 2")
    assert finished.returncode == 2, finished.output
    assert "two or more numbers of ranks" in finished.stderr


def test_the_certificate_on_the_same_number_of_ranks() -> None:
    finished = launch(f"lockstep verify --resume --ranks 2,2 -- {QUICK}", timeout_seconds=400)
    assert finished.returncode == 0, finished.output
    assert "CERTIFIED: identical" in finished.stdout
    assert finished.stdout.count(" identical\n") == 5


@pytest.mark.thorough
def test_the_certificate_through_two_kills_and_other_numbers_of_ranks() -> None:
    small = (
        "--model.name vit --model.vit.width 32 --model.vit.depth 1 --model.vit.num_heads 2 --model.vit.patch_size 14"
    )
    finished = launch(f"lockstep verify --resume --ranks 2,3,1 -- {small}", timeout_seconds=600)
    assert finished.returncode == 0, finished.output
    assert "CERTIFIED: equal within 1e-09" in finished.stdout
    assert finished.stdout.count("killed: ") == 2
    assert "each sample exactly once" in finished.stdout


@pytest.mark.thorough
def test_a_checkpoint_that_cannot_be_written_ends_all_ranks_with_one_message(tmp_path: Path) -> None:
    """A limit of 2 MB on the size of files lets everything pass but a checkpoint, as a nearly full disk does."""
    train = f"mpirun -np 2 python {shlex.quote(str(TRAIN))} --run_dir run {SHORT}"
    finished = launch(f"ulimit -f 2000; {train}", cwd=tmp_path)
    assert finished.returncode == 5, finished.output
    assert finished.stderr.count("lockstep: ") == 1
    assert "Traceback" not in finished.output
    assert list_checkpoints(tmp_path / "run") == []
