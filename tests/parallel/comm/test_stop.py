"""All ranks stop after the same update."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.comm.cluster import Cluster
from lockstep.comm.stop import StopRequests, StopVote
from lockstep.runtime.errors import ExitCode, StoppedError
from lockstep.settings import CheckpointSettings, DataSettings, Settings
from lockstep.training.checkpoint import list_checkpoints
from lockstep.training.hooks import TrainerHook
from lockstep.training.trainer import Trainer
from tests.parallel.building import assert_close, build_trainer, merged_model

SETTINGS = Settings(
    precision="float64",
    num_epochs=2,
    data=DataSettings(name="synthetic", num_samples=40, batch_size=8),
    checkpoint=CheckpointSettings(interval=4),
)


@pytest.fixture
def requests() -> Iterator[StopRequests]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield StopRequests()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.world_size(3)
@pytest.mark.parametrize(
    "parallel", ["replicated", *(pytest.param(how, marks=pytest.mark.thorough) for how in ("zero3", "pipeline"))]
)
def test_a_signal_to_one_rank_stops_all_after_the_same_update(
    cluster: Cluster, tmp_path: Path, requests: StopRequests, parallel: str
) -> None:
    settings = replace(SETTINGS, parallel=parallel)  # type: ignore[arg-type]
    folder = cluster.on_root(lambda: tmp_path)
    never, strategy = build_trainer(cluster, settings, folder / "never")
    never.train()
    expected = merged_model(cluster, strategy)
    trainer, _ = build_trainer(cluster, settings, folder / "stopped")

    class Signal(TrainerHook):
        def after_update(self, trainer: Trainer) -> None:
            if trainer.progress.step == 2 and cluster.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.hooks.append(Signal())
    with pytest.raises(
        StoppedError, match="stopped by SIGTERM after update 3 of 10, which is saved: 7 are left"
    ) as stop:
        trainer.train(StopVote(cluster, requests, None))
    assert stop.value.shared
    assert stop.value.exit_code == ExitCode.STOPPED
    assert cluster.all_gather_object(trainer.progress.step) == [3, 3, 3]
    assert [int(path.name) for path in list_checkpoints(folder / "stopped")] == [3]
    resumed, strategy = build_trainer(cluster, settings, folder / "stopped", resume=True)
    assert resumed.progress.step == 3
    resumed.train(StopVote(cluster, StopRequests(), None))
    assert_close(merged_model(cluster, strategy), expected)


@pytest.mark.world_size(2)
def test_a_stop_on_a_checkpoint_does_not_write_it_twice(
    cluster: Cluster, tmp_path: Path, requests: StopRequests
) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    trainer, _ = build_trainer(cluster, SETTINGS, folder)
    requests.received = signal.SIGUSR1 if cluster.rank == 1 else 0
    saved: list[int] = []

    class Count(TrainerHook):
        def at_checkpoint(self, trainer: Trainer) -> None:
            saved.append(trainer.progress.step)

    trainer.hooks.append(Count())
    trainer.progress.step = 2  # so that the vote of update 3 is read after update 4, where a checkpoint is due
    with pytest.raises(StoppedError, match="after update 4"):
        trainer.train(StopVote(cluster, requests, None))
    assert saved == [4]


@pytest.mark.world_size(2)
def test_a_run_that_is_not_stopped_leaves_no_vote_behind(
    cluster: Cluster, tmp_path: Path, requests: StopRequests
) -> None:
    trainer, _ = build_trainer(cluster, SETTINGS, cluster.on_root(lambda: tmp_path))
    vote = StopVote(cluster, requests, None)
    trainer.train(vote)
    assert vote.close() == 0
    assert cluster.all_gather_object(cluster.rank) == [0, 1]
