"""Image classification: networks that give log-probabilities, trained on the negative log-likelihood."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lockstep.comm.cluster import Cluster
from lockstep.data.data_sets import fetch, load_images
from lockstep.data.loader import BatchLoader, LabelledBatch
from lockstep.data.sharding import shard_bounds
from lockstep.models.classifier import classifier_blocks
from lockstep.parallel.strategy import Strategy
from lockstep.runtime.seeding import seed_model
from lockstep.settings import Settings
from lockstep.tasks.task import Forward, Task, evaluating

EVALUATION_BATCH_SIZE = 500
TOP = 5
MAX_CLASSES_IN_DETAILS = 100


@dataclass(frozen=True)
class Evaluation:
    """A model's results on the held-out samples, each of which counts once.

    Attributes:
        loss: mean negative log-likelihood.
        num_in_top: number of samples whose true class is among the five most likely ones.
        confusion: (num_classes, num_classes) int64; rows are true classes, columns predicted ones.
        classes: the names of the classes.
    """

    loss: float
    num_in_top: int
    confusion: Tensor
    classes: Sequence[str]

    @property
    def scores(self) -> dict[str, float]:
        top = {"top5_accuracy": self.num_in_top / max(1, self.num_samples)} if len(self.confusion) > TOP else {}
        return {"accuracy": self.accuracy, "loss": self.loss, **top}

    @property
    def counts(self) -> dict[str, int]:
        return {"num_held_out_samples": self.num_samples}

    @property
    def details(self) -> dict[str, Any]:
        small = len(self.classes) <= MAX_CLASSES_IN_DETAILS
        return {"classes": list(self.classes), "confusion": self.confusion.tolist()} if small else {}

    @property
    def num_samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return int(self.confusion.trace()) / max(1, self.num_samples)

    def __str__(self) -> str:
        return f"Accuracy: {self.accuracy:.4f} on {self.num_samples} held-out samples, loss {self.loss:.4f}"


class Classify(Task):
    """The classification task: model, data, loss and evaluation."""

    samples = "images"
    num_metric_sums = 3  # loss sum, number correct, number of samples
    curves = ("loss", "accuracy")

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        """Collective: rank 0 downloads the data if need be while the others wait, then all load it.

        Raises:
            DataError: on every rank, if the data is missing on any rank.
        """
        super().__init__(settings, cluster)
        cluster.on_root(lambda: fetch(settings.data))
        sets = cluster.on_every_rank(lambda: [load_images(settings.data, train) for train in (True, False)])
        self._train, self.held_out = (images.to(cluster.device) for images in sets)

    def model_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        seed_model(self.settings.seed)
        for name, block in classifier_blocks(self.settings.model, self._train.shape, len(self._train.classes)):
            yield name, block.to(self.cluster.device, self.dtype).to(memory_format=self._layout)

    def example_inputs(self, num_samples: int) -> Tensor:
        ids = np.arange(min(num_samples, len(self._train)))
        return next(self._train.batches([ids], self.dtype))[0]

    @property
    def num_epochs(self) -> int:
        return self.settings.num_epochs

    @property
    def evaluate_every(self) -> int:
        every = self.settings.evaluate_every
        return 1 if every is None else every

    @override
    def build_loader(self, shard_id: int, num_shards: int, strategy: Strategy | None = None) -> BatchLoader:
        """Build the loader of one shard of the training data."""
        data = self.settings.data
        return BatchLoader(
            self._train,
            data.global_batch_size(num_shards),
            data.sharding,
            shard_id,
            num_shards,
            seed=self.settings.seed,
            dtype=self.dtype,
            mixup=data.mixup,
        )

    def loss_sum(self, outputs: Tensor, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        loss = self._loss(outputs, batch.targets)
        if batch.partner_targets is not None:
            loss = batch.share * loss + (1 - batch.share) * self._loss(outputs, batch.partner_targets)
        num_correct = (outputs.detach().argmax(1) == batch.targets).sum()
        num_samples = torch.full_like(num_correct, len(batch.targets))
        return loss, torch.stack([loss.detach().double(), num_correct, num_samples])

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.nll_loss(outputs, targets, reduction="sum")
        if (smoothing := self.settings.data.label_smoothing) > 0:
            return (1 - smoothing) * loss - smoothing * outputs.mean(1).sum()
        return loss

    def scores(self, metric_sums: Sequence[float]) -> dict[str, float]:
        loss_sum, num_correct, num_samples = metric_sums
        return {"loss": loss_sum / num_samples, "accuracy": num_correct / num_samples} if num_samples else {}

    @override
    def line(
        self, epoch: int, item: LabelledBatch, num_samples: int, mean: dict[str, float], last: dict[str, float]
    ) -> str:
        """Format a log line with the loss of the last global batch, as in the reference."""
        return f"Epoch: {epoch}, Batch: {item.index}, Loss: {last['loss']:.4f}"

    @override
    def immutable_settings(self, loader: BatchLoader, num_shards: int) -> dict[str, Any]:
        data = self.settings.data
        return {
            "data.name": data.name,
            "data.sharding": data.sharding,
            "the number of samples": loader.num_samples,
            "the global batch (data.batch_size, or data.batch_size_per_rank times the shards)": loader.batch_size,
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module, forward: Forward, shard_id: int, num_shards: int) -> Evaluation:
        """Collective: evaluate the held-out samples, divided over the shards; one reduction sums the counts."""
        num_classes = len(self.held_out.classes)
        start, stop = shard_bounds(len(self.held_out), num_shards)[shard_id : shard_id + 2]
        sums = torch.zeros(2 + num_classes**2, dtype=torch.float64, device=self.cluster.device)
        # Equally many batches on every rank: the forward pass of a sharded model is a collective.
        largest = -(-len(self.held_out) // num_shards)
        batches = np.array_split(np.arange(start, stop), max(1, -(-largest // EVALUATION_BATCH_SIZE)))
        with evaluating(model):
            for inputs, labels in self.held_out.batches(batches, self.dtype):
                self.cluster.recorder.beat()
                if (output := forward(inputs)) is not None:
                    sums[0] += F.nll_loss(output.double(), labels, reduction="sum")
                    sums[1] += (output.topk(min(TOP, num_classes)).indices == labels[:, None]).sum()
                    sums[2:] += torch.bincount(labels * num_classes + output.argmax(1), minlength=num_classes**2)
        sums = self.cluster.sum_(sums, name="evaluation").cpu()
        return Evaluation(
            loss=sums[0].item() / max(1, len(self.held_out)),
            num_in_top=int(sums[1]),
            confusion=sums[2:].to(torch.int64).view(num_classes, num_classes),
            classes=self.held_out.classes,
        )

    @torch.no_grad()
    def predict(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities (n, num_classes) and labels (n,) of all held-out samples. Not a collective."""
        count = len(self.held_out)
        batches = np.array_split(np.arange(count), max(1, -(-count // EVALUATION_BATCH_SIZE)))
        with evaluating(model):
            found = [
                (self.outputs(model, inputs), labels) for inputs, labels in self.held_out.batches(batches, self.dtype)
            ]
        return torch.cat([outputs for outputs, _ in found]), torch.cat([labels for _, labels in found])
