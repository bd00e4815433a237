"""An evaluation that was due when a run was killed."""

from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.comm.cluster import Cluster
from lockstep.settings import CheckpointSettings
from lockstep.training.hooks import TrainerHook
from lockstep.training.trainer import Trainer
from tests.parallel.building import build_trainer
from tests.parallel.training.test_resume import SETTINGS, Stop
from tests.parallel.training.test_resume import _records as records
from tests.parallel.training.test_resume import _run as run


class KilledAtCheckpoint(TrainerHook):
    """Raised as soon as the checkpoint exists, before anything else is done."""

    def __init__(self, step: int) -> None:
        self._step = step

    def at_checkpoint(self, trainer: Trainer) -> None:
        if trainer.progress.step == self._step:
            trainer.writer.wait()
            raise Stop


@pytest.mark.world_size(2)
def test_an_evaluation_that_was_due_at_the_checkpoint_is_made_by_the_one_who_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Killed between the checkpoint of an epoch's last update and the evaluation of that epoch."""
    folder = cluster.on_root(lambda: tmp_path)
    settings = replace(SETTINGS, checkpoint=CheckpointSettings(interval=7))
    run(cluster, settings, folder / "never")
    stopped, _ = build_trainer(cluster, settings, folder / "stopped")

    stopped.hooks.append(KilledAtCheckpoint(7))
    with pytest.raises(Stop):
        stopped.train()
    cluster.barrier()
    resumed = run(cluster, settings, folder / "stopped", resume=True)
    assert resumed.progress.step == 21
    found = records(folder / "stopped")
    assert [record["step"] for record in found if "learning_rate" not in record] == [7, 14, 21]
    assert found == records(folder / "never")
