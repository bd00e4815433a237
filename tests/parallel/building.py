"""Builds a run as app/train.py does, for tests that stop it, look into it or compare it; and small things to train."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lockstep.comm.cluster import Cluster
from lockstep.data.batch import DataBatch
from lockstep.data.image_set import ImageSet
from lockstep.data.loader import BatchLoader
from lockstep.models.networks import vit_blocks
from lockstep.parallel.strategy import Strategy
from lockstep.settings import Settings
from lockstep.tasks.classify import Classify
from lockstep.training import build
from lockstep.training.run_folder import RunFolder
from lockstep.training.trainer import Trainer


def build_trainer(cluster: Cluster, settings: Settings, folder: Path, resume: bool = False) -> tuple[Trainer, Strategy]:
    """Collective."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build.build_trainer(cluster, settings, Classify(settings, cluster), RunFolder(folder), resume)
    return trainer, trainer.strategy


class CrossEntropy:
    """An `Objective`."""

    num_metric_sums = 3

    def weight(self, metric_sums: Tensor) -> Tensor | None:  # noqa: ARG002
        return None

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        outputs: Tensor = model(inputs)
        return outputs

    def loss_sum(self, outputs: Tensor, batch: DataBatch) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(outputs, batch.data[1], reduction="sum")
        return loss, torch.tensor([loss.item(), 0.0, len(batch)], dtype=torch.float64)


def make_batch(shard_id: int, num_shards: int, num_samples: int, shape: tuple[int, int, int] = (2, 3, 3)) -> DataBatch:
    """One shard's part of a global batch of `num_samples` images of `shape`, in 3 classes and float64."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (num_samples, *shape), generator=generator).to(torch.uint8)
    data = ImageSet(images, torch.randint(0, 3, (num_samples,), generator=generator), num_classes=3)
    loader = BatchLoader(data, num_samples, "hash", shard_id, num_shards, 0, torch.float64)
    return next(loader.rest_of_epoch())


def merged_model(cluster: Cluster, strategy: Strategy) -> dict[str, Tensor] | None:
    """Collective: the merged model on rank 0, None elsewhere."""
    merged: dict[str, Tensor] = {}
    strategy.merge(lambda name, tensor: merged.update({name: tensor}))
    return merged if cluster.is_root else None


def whole_values(strategy: Strategy) -> dict[str, Tensor]:
    """What this rank holds, by name."""
    return {name: part.values for name, part in strategy.state().items()}


def vit_blocks_without_key_biases(**settings: Any) -> Iterator[tuple[str, nn.Module]]:
    """Those of `vit_blocks`, but for the biases of attention: softmax takes no notice of that of the keys, so that its
    gradient is rounding alone, by which Adam would move it all the same.
    """
    for name, block in vit_blocks(**settings):
        if isinstance(block, nn.TransformerEncoderLayer):
            width, num_heads = block.self_attn.embed_dim, block.self_attn.num_heads
            block.self_attn = nn.MultiheadAttention(width, num_heads, settings["dropout"], bias=False, batch_first=True)
        yield name, block


def tied_blocks() -> Iterator[tuple[str, nn.Module]]:
    """Two blocks with one weight."""
    torch.manual_seed(1)
    first, second = nn.Linear(18, 18).double(), nn.Linear(18, 18).double()
    second.weight = first.weight
    yield "first", nn.Sequential(nn.Flatten(), first)
    yield "act", nn.Tanh()
    yield "middle", nn.Linear(18, 18).double()
    yield "second", second
    yield "last", nn.Linear(18, 3).double()


def assert_close(found: dict[str, Tensor] | None, expected: dict[str, Tensor] | None) -> None:
    """Two merged models, on every rank."""
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-10, msg=name)
