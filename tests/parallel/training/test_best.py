"""Early stopping and best checkpoints: all ranks and resumed runs decide alike, and the best model is merged."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lockstep import SupervisedTask
from lockstep.comm.cluster import Cluster
from lockstep.runtime.errors import SettingsError, StorageError
from lockstep.settings import CheckpointSettings, DataSettings, OptimizerSettings, Settings, StopSettings
from lockstep.tasks.task import Evaluation
from lockstep.training import build
from lockstep.training.checkpoint import list_checkpoints, verify_checkpoint
from lockstep.training.hooks import TrainerHook
from lockstep.training.run_folder import RunFolder
from lockstep.training.trainer import Trainer
from tests.parallel.building import merged_model, whole_values

SETTINGS = Settings(
    task="tests.parallel.training.test_best.Halfway",
    num_epochs=30,
    log_interval=2,
    data=DataSettings(batch_size=8, sharding="hash"),
    optimizer=OptimizerSettings(name="sgd", learning_rate=0.002, momentum=0.5, schedule="constant"),
    checkpoint=CheckpointSettings(interval=5, keep=1, best="loss:min:2"),
    stop=StopSettings(early="loss:min:3"),
)
STOPS = (8, 15, 26, 39)  # in the midst of epochs of 7 updates; checkpoints lie at every fifth
AVERAGED = replace(SETTINGS.optimizer, name="adam", learning_rate=0.01, average_decay=0.8)
HOW: dict[str, dict[str, Any]] = {
    "replicated": {"optimizer": AVERAGED},
    "zero1": {
        "parallel": "zero1",
        "optimizer": replace(
            SETTINGS.optimizer, freeze=["first.0.bias"], groups={"last.*": {"learning_rate_factor": 0.5}}
        ),
    },
    "zero3": {"parallel": "zero3", "optimizer": AVERAGED},
    "pipeline": {"parallel": "pipeline"},
}


class Halfway(SupervisedTask):
    """Held-out targets lie halfway between where training begins and where it leads: the loss falls, then rises."""

    weight_per_sample = 1

    def data_set(self, train: bool) -> Any:
        inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(int(train)))
        return inputs, inputs.sum(1, keepdim=True) * (1 if train else 0.3)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "first", nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.2))
        yield "last", nn.Linear(9, 1)

    def loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        return (outputs - batch[1]).square().sum(), len(outputs)


class Stop(Exception):
    """Takes the place of a kill, on every rank in the same update."""


class StopBefore(TrainerHook):
    def __init__(self, step: int | None) -> None:
        self._step = step

    def before_update(self, trainer: Trainer, item: Any) -> None:  # noqa: ARG002
        if trainer.progress.step == self._step:
            raise Stop


def _run(
    cluster: Cluster, settings: Settings, folder: Path, resume: bool = False, stop: int | None = None
) -> tuple[Trainer, Evaluation | None]:
    folder.mkdir(exist_ok=True)
    task = Halfway(settings, cluster)
    trainer = build.build_trainer(cluster, settings, task, RunFolder(folder), resume, hooks=[StopBefore(stop)])
    evaluation = None
    try:
        evaluation = trainer.train()
    except Stop:
        trainer.writer.wait()
    cluster.barrier()  # nobody goes on before rank 0 has written
    return trainer, evaluation


def _model(cluster: Cluster, trainer: Trainer) -> dict[str, Tensor]:
    """What the end of a run merges, on rank 0."""
    with trainer.strategy.averaged():
        return merged_model(cluster, trainer.strategy) or {}


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in list_checkpoints(folder)]


def _assert_equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.world_size(2)
@pytest.mark.parametrize("how", HOW)
def test_early_stop_and_best_checkpoint_over_kills_bit_for_bit(cluster: Cluster, how: str, tmp_path: Path) -> None:
    folder, settings = cluster.on_root(lambda: tmp_path), replace(SETTINGS, **HOW[how])
    never, evaluation = _run(cluster, settings, folder / "never")
    assert evaluation
    best, last = never.judgement["best"]["update"], never.progress.step
    assert STOPS[-1] < last < 30 * 7
    assert best < last  # it is put back
    assert "no better loss in 3 evaluations" in never.judgement["stopped_early"]
    assert evaluation.scores["loss"] == never.judgement["best"]["loss"]
    killed = 0
    for stop in STOPS:
        _, ended = _run(cluster, settings, folder / "stopped", resume=killed > 0, stop=stop)
        killed += ended is None
    assert killed == len(STOPS)
    for _ in range(2):  # the second one was killed before it was merged
        resumed, again = _run(cluster, settings, folder / "stopped", resume=True)
        assert again
        assert (resumed.judgement, again.scores) == (never.judgement, evaluation.scores)
        assert resumed.progress.step == last
        _assert_equal(whole_values(resumed.strategy), whole_values(never.strategy))
        _assert_equal(_model(cluster, resumed), _model(cluster, never))
        if cluster.is_root:
            assert _steps(folder / "stopped") == _steps(folder / "never")
            texts = [(folder / name / "metrics.jsonl").read_text() for name in ("stopped", "never")]
            assert texts[0] == texts[1]
        cluster.barrier()
    if cluster.is_root:
        assert len(_steps(folder / "never")) == 3  # two best ones and the last
        assert {best, last} < {*_steps(folder / "never")}
        saved = verify_checkpoint(list_checkpoints(folder / "never")[0]).load()
        assert ("optimizer/average/last.bias" in saved) == (settings.optimizer.average_decay is not None)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("how", HOW)
def test_the_merged_model_is_the_one_that_was_best(cluster: Cluster, how: str, tmp_path: Path) -> None:
    """A run that ends at its best update, with the same schedule, has the same model."""
    folder, settings = cluster.on_root(lambda: tmp_path), replace(SETTINGS, **HOW[how])
    trainer, _ = _run(cluster, settings, folder / "best")
    best = trainer.judgement["best"]["update"]
    plain = replace(settings, num_epochs=best // 7, checkpoint=CheckpointSettings(), stop=StopSettings())
    shorter, _ = _run(cluster, plain, folder / "shorter")
    assert shorter.progress.step == best
    assert shorter.judgement == {}
    _assert_equal(_model(cluster, trainer), _model(cluster, shorter))


@pytest.mark.world_size(2)
def test_a_finished_run_goes_on_with_more_patience_from_its_last_update(cluster: Cluster, tmp_path: Path) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    settings = replace(SETTINGS, optimizer=AVERAGED, stop=StopSettings(early="loss:min:1"))
    hasty, _ = _run(cluster, settings, folder / "run")
    resumed, _ = _run(cluster, replace(settings, stop=SETTINGS.stop), folder / "run", resume=True)
    patient, _ = _run(cluster, replace(settings, stop=SETTINGS.stop), folder / "patient")
    assert hasty.progress.step < resumed.progress.step
    assert resumed.judgement == patient.judgement
    _assert_equal(_model(cluster, resumed), _model(cluster, patient))


@pytest.mark.world_size(2)
def test_if_the_best_checkpoint_is_gone_the_next_one_counts(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    best = _run(cluster, SETTINGS, folder)[0].judgement["best"]["update"]
    if cluster.is_root:
        shutil.rmtree(folder / "checkpoints" / f"{best:012d}")
    cluster.barrier()
    resumed, _ = _run(cluster, SETTINGS, folder, resume=True)
    assert resumed.judgement["best"]["update"] not in (best, resumed.progress.step)
    if cluster.is_root:
        assert f"The checkpoint of update {best} was the best, and is gone" in capsys.readouterr().out


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "change",
    [{"stop": StopSettings(early="accuracy:max:3")}, {"checkpoint": CheckpointSettings(best="accuracy:max:3")}],
    ids=["early", "best"],
)
def test_an_unknown_score_is_told_on_all_ranks(cluster: Cluster, change: dict[str, Any], tmp_path: Path) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    with pytest.raises(SettingsError, match="is accuracy:max:3: there is no such score; known are loss") as caught:
        _run(cluster, replace(SETTINGS, **change), folder)
    assert caught.value.shared


@pytest.mark.world_size(2)
def test_an_altered_best_checkpoint_is_told_on_all_ranks(cluster: Cluster, tmp_path: Path) -> None:
    folder = cluster.on_root(lambda: tmp_path)
    trainer, _ = _run(cluster, SETTINGS, folder)
    if cluster.is_root:
        file = folder / "checkpoints" / f"{trainer.judgement['best']['update']:012d}" / "rank00000-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    cluster.barrier()
    with pytest.raises(StorageError, match="is torn") as caught:
        _run(cluster, SETTINGS, folder, resume=True)
    assert caught.value.shared
