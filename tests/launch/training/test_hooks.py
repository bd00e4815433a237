"""Hooks of one's own in a run of real ranks, by their names."""

import json
import shlex
from pathlib import Path

from lockstep.runtime.errors import ExitCode
from tests.launching import ROOT, launch

TRAIN = f"mpirun -np 2 python {shlex.quote(str(ROOT / 'app' / 'train.py'))} --run_dir run"
QUICK = "--data.name synthetic --data.num_samples 64 --data.batch_size 16 --num_epochs 2"
CODE = """
import json
import os
from lockstep import TrainerHook

class Counts(TrainerHook):
    def __init__(self):
        self.updates = 0

    def after_update(self, trainer):
        self.updates += 1

    def at_end(self, trainer, evaluation):
        with open(f"counted-{os.getpid()}.json", "w") as file:
            json.dump([self.updates, evaluation.scores["loss"]], file)

class Fails(TrainerHook):
    def after_update(self, trainer):
        if trainer.progress.step == 3:
            [][0]  # my mistake
"""


def test_every_rank_calls_the_hooks(tmp_path: Path) -> None:
    (tmp_path / "my_hooks.py").write_text(CODE)
    ended = launch(f"{TRAIN} {QUICK} --hooks my_hooks.Counts", cwd=tmp_path)
    assert ended.returncode == 0, ended.output
    counted = [json.loads(file.read_text()) for file in tmp_path.glob("counted-*.json")]
    loss = json.loads((tmp_path / "run" / "summary.json").read_text())["loss"]
    assert counted == [[8, loss]] * 2
    assert "hooks: my_hooks.Counts" in (tmp_path / "run" / "settings.yaml").read_text()


def test_an_error_of_a_hook_is_told_with_the_users_line(tmp_path: Path) -> None:
    (tmp_path / "my_hooks.py").write_text(CODE)
    ended = launch(f"{TRAIN} {QUICK} --hooks my_hooks.Counts,my_hooks.Fails", cwd=tmp_path)
    assert ended.returncode == ExitCode.USER_CODE, ended.output
    assert "my_hooks.Fails.after_update failed: IndexError" in ended.output
    assert "# my mistake" in ended.output
    assert "Traceback" not in ended.output
