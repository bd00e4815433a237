"""The task of telling classes apart: images in, log-probabilities out, the negative log-likelihood as loss."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from app.cluster.comm import Cluster
from app.config import DataSettings, Settings
from app.data.digits import load_digits
from app.data.image_set import ImageSet
from app.data.loader import BatchLoader, LabelledBatch
from app.data.mnist import download_mnist, load_mnist
from app.data.sharding import shard_bounds
from app.data.synthetic import load_synthetic
from app.models.net import net_blocks
from app.models.vit import vit_blocks
from app.parallel.strategy import Strategy
from app.tasks.task import Forward, Task, evaluating
from app.training.seeding import seed_model

EVALUATION_BATCH_SIZE = 500


@dataclass(frozen=True)
class Evaluation:
    """How a model does on the held-out samples, each of which counts once.

    Attributes:
        loss: mean negative log-likelihood.
        confusion: (num_classes, num_classes) int64, rows the true class and columns the predicted one.
    """

    loss: float
    confusion: Tensor

    @property
    def scores(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "loss": self.loss}

    @property
    def counts(self) -> dict[str, int]:
        return {"num_held_out_samples": self.num_samples}

    @property
    def num_samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return int(self.confusion.trace()) / max(1, self.num_samples)

    def __str__(self) -> str:
        return f"Accuracy: {self.accuracy:.4f} on {self.num_samples} held-out samples, loss {self.loss:.4f}"


class Classify(Task):
    """Builds the model and its data, gives the loss and evaluates."""

    samples = "images"
    tally_size = 3  # loss sum, number correct, number of samples
    curves = ("loss", "accuracy")

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        """Collective: rank 0 fetches the data while the others wait, then all load it.

        Raises:
            DataError: on every rank, if the data is missing on any.
        """
        super().__init__(settings, cluster)
        cluster.on_root(lambda: _fetch(settings.data))
        sets = cluster.on_every_rank(lambda: [_load(settings.data, train) for train in (True, False)])
        self._train, self.held_out = (images.to(cluster.device) for images in sets)

    def model_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        settings = self.settings.model
        seed_model(self.settings.seed)
        if settings.name == "vit":
            blocks = vit_blocks(**asdict(settings.vit))
        else:
            blocks = net_blocks(settings.dropout1, settings.dropout2)
        for name, block in blocks:
            yield name, block.to(self.cluster.device, self.dtype).to(memory_format=self._layout)

    def example_inputs(self, num_samples: int) -> Tensor:
        ids = torch.arange(min(num_samples, len(self._train)), device=self.cluster.device)
        return self._train.batch(ids, self.dtype)[0]

    @property
    def num_epochs(self) -> int:
        return self.settings.num_epochs

    @property
    def evaluate_every(self) -> int:
        every = self.settings.evaluate_every
        return 1 if every is None else every

    @override
    def build_loader(self, shard_id: int, num_shards: int, strategy: Strategy | None = None) -> BatchLoader:
        """One shard of the training data."""
        data = self.settings.data
        return BatchLoader(
            self._train,
            data.global_batch_size(num_shards),
            data.sharding,
            shard_id,
            num_shards,
            seed=self.settings.seed,
            dtype=self.dtype,
        )

    def loss_sum(self, outputs: Tensor, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        loss = F.nll_loss(outputs, batch.targets, reduction="sum")
        num_correct = (outputs.detach().argmax(1) == batch.targets).sum()
        num_samples = torch.full_like(num_correct, len(batch.targets))
        return loss, torch.stack([loss.detach().double(), num_correct, num_samples])

    def scores(self, tally: Sequence[float]) -> dict[str, float]:
        loss_sum, num_correct, num_samples = tally
        return {"loss": loss_sum / num_samples, "accuracy": num_correct / num_samples} if num_samples else {}

    @override
    def line(
        self, epoch: int, unit: LabelledBatch, num_samples: int, mean: dict[str, float], last: dict[str, float]
    ) -> str:
        """The loss is that of the named global batch, as in the seed."""
        return f"Epoch: {epoch}, Batch: {unit.index}, Loss: {last['loss']:.4f}"

    @override
    def must_stay(self, loader: BatchLoader, num_shards: int) -> dict[str, Any]:
        data = self.settings.data
        return {
            "data.name": data.name,
            "data.sharding": data.sharding,
            "the number of samples": loader.num_samples,
            "the global batch (data.batch_size, or data.batch_size_per_rank times the shards)": loader.batch_size,
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module, forward: Forward, shard_id: int, num_shards: int) -> Evaluation:
        """Collective: the held-out samples are divided over the shards, and counts are summed over all ranks once."""
        num_classes = self.held_out.num_classes
        start, stop = shard_bounds(len(self.held_out), num_shards)[shard_id : shard_id + 2]
        ids = torch.arange(start, stop, device=self.cluster.device)
        sums = torch.zeros(1 + num_classes**2, dtype=torch.float64, device=self.cluster.device)
        # As many pieces on every rank: a model in parts is gathered for each.
        largest = -(-len(self.held_out) // num_shards)
        with evaluating(model):
            for piece in ids.tensor_split(max(1, -(-largest // EVALUATION_BATCH_SIZE))):
                self.cluster.recorder.beat()
                inputs, labels = self.held_out.batch(piece, self.dtype)
                if (output := forward(inputs)) is not None:
                    sums[0] += F.nll_loss(output.double(), labels, reduction="sum")
                    sums[1:] += torch.bincount(labels * num_classes + output.argmax(1), minlength=num_classes**2)
        sums = self.cluster.sum_(sums, name="evaluation").cpu()
        return Evaluation(
            loss=sums[0].item() / max(1, len(self.held_out)),
            confusion=sums[1:].to(torch.int64).view(num_classes, num_classes),
        )

    @torch.no_grad()
    def predict(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n, num_classes) and labels (n,) of the held-out samples `ids` (n,). Not a collective."""
        with evaluating(model):
            pieces = torch.split(ids, EVALUATION_BATCH_SIZE)
            outputs = [self.outputs(model, self.held_out.batch(piece, self.dtype)[0]) for piece in pieces]
        return torch.cat(outputs), self.held_out.labels[ids]


def _fetch(data: DataSettings) -> None:
    if data.name == "mnist":
        download_mnist(Path(data.root))


def _load(data: DataSettings, train: bool) -> ImageSet:
    if data.name == "mnist":
        return load_mnist(Path(data.root), train)
    if data.name == "synthetic":
        return load_synthetic(data.num_samples, train)
    return load_digits(train)
