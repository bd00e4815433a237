"""The task of telling classes apart: images in, log-probabilities out, the negative log-likelihood as loss."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.cluster.comm import Cluster
from app.config import DataSettings, Settings
from app.data.digits import load_digits
from app.data.image_set import ImageSet
from app.data.loader import Batch, BatchLoader
from app.data.mnist import download_mnist, load_mnist
from app.data.sharding import shard_bounds
from app.data.synthetic import load_synthetic
from app.models.net import Net

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
    def num_samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return int(self.confusion.trace()) / max(1, self.num_samples)

    def __str__(self) -> str:
        return f"Accuracy: {self.accuracy:.4f} on {self.num_samples} held-out samples, loss {self.loss:.4f}"


class Classify:
    """Builds the model and its data, gives the loss and evaluates."""

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        """Collective: rank 0 fetches the data while the others wait, then all load it.

        Raises:
            DataError: on every rank, if the data is missing on any.
        """
        self._settings = settings
        self._cluster = cluster
        self._in_bf16 = settings.precision == "bf16"
        self._dtype = torch.float32 if self._in_bf16 else getattr(torch, settings.precision)
        self._layout = torch.channels_last if settings.model.channels_last else torch.contiguous_format
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on GPUs too
        cluster.on_root(lambda: _fetch(settings.data))
        sets = cluster.on_every_rank(lambda: [_load(settings.data, train) for train in (True, False)])
        self._train, self.held_out = (images.to(cluster.device) for images in sets)

    def build_model(self) -> nn.Module:
        """The network, on this rank's device and of the run's data type."""
        settings = self._settings.model
        model = Net(settings.dropout1, settings.dropout2).to(self._cluster.device, self._dtype)
        model.to(memory_format=self._layout)
        if settings.compile:
            model.compile()
        return model

    def build_loader(self) -> BatchLoader:
        """This rank's part of the training data."""
        data = self._settings.data
        return BatchLoader(
            self._train,
            data.global_batch_size(self._cluster.size),
            data.sharding,
            shard_id=self._cluster.rank,
            num_shards=self._cluster.size,
            seed=self._settings.seed,
            dtype=self._dtype,
        )

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss summed over `batch` and its tally (loss sum, number correct, number of samples), (3,) float64."""
        output = self.outputs(model, batch.inputs)
        loss = F.nll_loss(output, batch.targets, reduction="sum")
        num_correct = (output.detach().argmax(1) == batch.targets).sum()
        num_samples = torch.full_like(num_correct, len(batch.targets))
        return loss, torch.stack([loss.detach().double(), num_correct, num_samples])

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Log-probabilities (n, num_classes) of `inputs` (n, channels, height, width), in the run's precision."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._in_bf16):
            output: Tensor = model(inputs.contiguous(memory_format=self._layout))
        return output

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Collective: each rank scores its part of the held-out samples, and the sums are reduced once."""
        num_classes = self.held_out.num_classes
        bounds = shard_bounds(len(self.held_out), self._cluster.size)
        start, stop = bounds[self._cluster.rank : self._cluster.rank + 2]
        ids = torch.arange(start, stop, device=self._cluster.device)
        output, labels = self.predict(model, ids)
        loss = F.nll_loss(output.double(), labels, reduction="sum")
        confusion = torch.bincount(labels * num_classes + output.argmax(1), minlength=num_classes**2)
        sums = self._cluster.sum_(torch.cat([loss.view(1), confusion.double()]), name="evaluation").cpu()
        return Evaluation(
            loss=sums[0].item() / max(1, len(self.held_out)),
            confusion=sums[1:].to(torch.int64).view(num_classes, num_classes),
        )

    @torch.no_grad()
    def predict(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n, num_classes) and labels (n,) of the held-out samples `ids` (n,). Not a collective."""
        was_training = model.training
        model.eval()
        pieces = torch.split(ids, EVALUATION_BATCH_SIZE)
        outputs = [self.outputs(model, self.held_out.batch(piece, self._dtype)[0]) for piece in pieces]
        model.train(was_training)
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
