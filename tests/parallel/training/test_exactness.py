"""Promise 1: the same answer on any number of ranks.

In float64 with dropout off, the loss curve of 2, 3 and 4 ranks is that of one rank to 1e-10, for each kind of sharding
and with a global batch that the ranks do not divide. Each rank computes the one-rank reference for itself, beside it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from lockstep.comm.cluster import Cluster
from lockstep.parallel.merge import state_digest
from lockstep.settings import DataSettings, ModelSettings, OptimizerSettings, Settings
from lockstep.tasks.supervised import Evaluation
from tests.parallel.building import build_trainer, merged_model

TOLERANCE = 1e-10
NUM_SAMPLES = 100  # with a global batch of 22: the last batch has 12 samples, no batch divides by 3 or 4
BATCH_SIZE = 22

SETTINGS = Settings(
    num_epochs=2,
    precision="float64",
    log_interval=1,
    data=DataSettings(name="synthetic", num_samples=NUM_SAMPLES, batch_size=BATCH_SIZE),
    model=ModelSettings(dropout1=0.0, dropout2=0.0),
    optimizer=OptimizerSettings(name="sgd", learning_rate=0.02, momentum=0.9, weight_decay=1e-3, warmup_steps=3),
)


class Run:
    """One training to its end, and what it left."""

    def __init__(self, cluster: Cluster, settings: Settings, folder: Path) -> None:
        trainer, strategy = build_trainer(cluster, settings, folder)
        evaluation = trainer.train()
        assert isinstance(evaluation, Evaluation)
        self.evaluation = evaluation
        self.state: dict[str, Tensor] = strategy.model.state_dict()
        self.merged = merged_model(cluster, strategy)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.losses = [record["loss"] for record in records if record["kind"] == "train"]


SOON = ((2, "contiguous"), (3, "random"), (3, "hash"))  # the others are left to the thorough tests


def _compare(cluster: Cluster, settings: Settings, tmp_path: Path) -> None:
    together_folder = cluster.on_root(lambda: tmp_path / "together")
    together = Run(cluster, settings, together_folder)
    alone = Run(Cluster.alone(), settings, tmp_path / f"alone-{cluster.rank}")
    assert len(alone.losses) == 2 * 5
    assert together.losses == pytest.approx(alone.losses, rel=TOLERANCE, abs=TOLERANCE)
    assert len(set(alone.losses)) == 10  # or the comparison shows nothing
    for name, tensor in alone.state.items():
        torch.testing.assert_close(together.state[name], tensor, rtol=TOLERANCE, atol=TOLERANCE)
    assert together.evaluation.num_samples == NUM_SAMPLES
    assert together.evaluation.details == alone.evaluation.details
    assert together.evaluation.scores == pytest.approx(alone.evaluation.scores, rel=TOLERANCE)
    assert len(set(cluster.all_gather_object(state_digest(together.state)))) == 1
    if together.merged is not None:
        assert state_digest(together.merged) == state_digest(together.state)


@pytest.mark.parametrize(
    ("size", "sharding"),
    [
        pytest.param(n, how, marks=[pytest.mark.world_size(n), *([] if (n, how) in SOON else [pytest.mark.thorough])])
        for n in (2, 3, 4)
        for how in ("contiguous", "random", "hash")
    ],
)
def test_any_number_of_ranks_gives_the_same_answer(
    cluster: Cluster, size: int, sharding: Literal["contiguous", "random", "hash"], tmp_path: Path
) -> None:
    assert cluster.size == size
    _compare(cluster, replace(SETTINGS, data=replace(SETTINGS.data, sharding=sharding)), tmp_path)


@pytest.mark.world_size(4)
def test_a_last_batch_with_fewer_samples_than_ranks(cluster: Cluster, tmp_path: Path) -> None:
    """90 samples in batches of 22: the last has 2, so two ranks of four have none."""
    settings = replace(SETTINGS, data=replace(SETTINGS.data, num_samples=90))
    together = Run(cluster, settings, cluster.on_root(lambda: tmp_path / "together"))
    alone = Run(Cluster.alone(), settings, tmp_path / f"alone-{cluster.rank}")
    assert together.losses == pytest.approx(alone.losses, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.world_size(2)
def test_adam_too(cluster: Cluster, tmp_path: Path) -> None:
    _compare(cluster, replace(SETTINGS, optimizer=OptimizerSettings(name="adam", learning_rate=1e-3)), tmp_path)
